#!/usr/bin/env bash
# gpu_check.sh [--quick] [--parts NAME ...] [--out FILE]: everything that only a GPU can show, in at most nine minutes on
# one H100 or A100. Each part runs in its own process with a time limit; the others go on after a failure. Ends in a
# table and in gpu_check.json, from which `python scripts/docs/gpu_page.py` writes the GPU part of docs/benchmarks.md.
# --device cpu --quick tries the script without a GPU. Exit code: 0 nothing failed, 1 a part failed, 2 a wrong option.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
[ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ] && export PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
exec python "$root/scripts/bench/gpu_check.py" "$@"
