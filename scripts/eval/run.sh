#!/usr/bin/env bash
# run.sh BENCHMARK[,BENCHMARK...] MODEL_DIR [OPTION ...]: answers, scores and reports benchmarks with one model.
# Options are those of `llava-mole eval`, for example --out DIR, --prompt-variant NAME, --batch-size N, --dtype bfloat16.
# GPUS_PER_NODE=8 lets so many processes share the questions.
# configs/benchmarks/ has the names, docs/evaluation.md where each one's data lies.
set -euo pipefail
if [ $# -lt 2 ]; then echo "usage: bash scripts/eval/run.sh BENCHMARK[,BENCHMARK...] MODEL_DIR [OPTION ...]" >&2; exit 2; fi
benchmarks=$1 model=$2
shift 2
# Not cd: the options' paths, like the model's, are relative to where the caller is.
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ] && export PATH="$root/.venv/bin:$PATH"
command=(python)
if [ "${GPUS_PER_NODE:-1}" -gt 1 ]; then command=(torchrun --standalone --nproc_per_node "$GPUS_PER_NODE"); fi
exec "${command[@]}" -m llava_mole.cli eval "$model" --benchmarks "$benchmarks" "$@"
