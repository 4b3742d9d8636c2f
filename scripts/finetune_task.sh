#!/usr/bin/env bash
# finetune_task.sh [CONFIG] [--key.sub value ...]: goes on from a stage-2 run (--init-from DIR) with data of your own.
# Without CONFIG configs/finetune_task.yaml, for 8 GPUs. See _launch.sh for the topology.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
config=configs/finetune_task.yaml
if [ $# -gt 0 ] && [[ $1 != --* ]]; then config=$1; shift; fi
exec bash "$here/_launch.sh" "$config" "$@"
