#!/usr/bin/env bash
# finetune.sh [CONFIG] [--key.sub value ...]: stage 2 with the whole language model, as LLaVA-1.5's finetune.sh.
# Without CONFIG configs/finetune.yaml, for 8 GPUs with ZeRO-3. See _launch.sh for the topology.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
config=configs/finetune.yaml
if [ $# -gt 0 ] && [[ $1 != --* ]]; then config=$1; shift; fi
exec bash "$here/_launch.sh" "$config" "$@"
