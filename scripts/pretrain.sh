#!/usr/bin/env bash
# pretrain.sh [CONFIG] [--key.sub value ...]: stage 1, the projector on captions.
# Without CONFIG the paper's, configs/pretrain.yaml, for 8 machines of 8 GPUs. See _launch.sh for the topology.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
config=configs/pretrain.yaml
if [ $# -gt 0 ] && [[ $1 != --* ]]; then config=$1; shift; fi
exec bash "$here/_launch.sh" "$config" "$@"
