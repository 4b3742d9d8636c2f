#!/usr/bin/env bash
# finetune_mole.sh [CONFIG] [--key.sub value ...]: stage 2 with the mixture of LoRA experts (LLaVA-MoLE).
# Without CONFIG the paper's, configs/finetune_mole.yaml, for 8 machines of 8 GPUs. See _launch.sh for the topology.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
config=configs/finetune_mole.yaml
if [ $# -gt 0 ] && [[ $1 != --* ]]; then config=$1; shift; fi
exec bash "$here/_launch.sh" "$config" "$@"
