#!/usr/bin/env bash
# finetune_lora.sh [CONFIG] [--key.sub value ...]: stage 2 with plain LoRA on the same mixture (LLaVA-Mix, the baseline).
# Without CONFIG the paper's, configs/finetune_lora.yaml, for 8 machines of 8 GPUs. See _launch.sh for the topology.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
config=configs/finetune_lora.yaml
if [ $# -gt 0 ] && [[ $1 != --* ]]; then config=$1; shift; fi
exec bash "$here/_launch.sh" "$config" "$@"
