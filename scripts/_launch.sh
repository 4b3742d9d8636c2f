#!/usr/bin/env bash
# Starts a training run: _launch.sh CONFIG [--key.sub value ...]. Topology comes from the environment only:
#   GPUS_PER_NODE  processes on this machine (default: its GPUs, or 1 without one)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines, one call on each
#   LAUNCHER       torchrun (default) | deepspeed (one call, machines from HOSTFILE) | python (one process, no ZeRO)
#   DRY_RUN=1      print the command instead of running it
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

count_gpus() { { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true; }
gpus=${GPUS_PER_NODE:-$(count_gpus)}
[ "$gpus" -gt 0 ] || gpus=1
nodes=${NNODES:-1}
launcher=${LAUNCHER:-torchrun}
world=$((gpus * nodes))
if [ "$world" -eq 1 ] && [ -z "${LAUNCHER:-}" ]; then launcher=python; fi

case "$launcher" in
  python) command=(python) world=1 ;;
  torchrun)
    command=(torchrun --nproc_per_node "$gpus" --nnodes "$nodes")
    if [ "$nodes" -gt 1 ]; then
      command+=(--node_rank "${NODE_RANK:?NODE_RANK is needed with NNODES > 1: 0 on the first machine}"
                --master_addr "${MASTER_ADDR:?MASTER_ADDR is needed with NNODES > 1: name of the first machine}"
                --master_port "${MASTER_PORT:-29500}")
    else
      command+=(--standalone)
    fi ;;
  deepspeed)
    command=(deepspeed --num_gpus "$gpus" --num_nodes "$nodes" --master_port "${MASTER_PORT:-29500}")
    [ -z "${HOSTFILE:-}" ] || command+=(--hostfile "$HOSTFILE")
    [ -z "${MASTER_ADDR:-}" ] || command+=(--master_addr "$MASTER_ADDR")
    command+=(--module) ;;
  *) echo "LAUNCHER is '$launcher'; allowed are torchrun, deepspeed and python" >&2; exit 2 ;;
esac
[ "$launcher" = deepspeed ] || command+=(-m)
command+=(llava_mole.train.train "$@")

if [ "${DRY_RUN:-0}" = 1 ]; then printf '%q ' "${command[@]}"; echo; exit 0; fi
python -m llava_mole.train.preflight "$world" "$@"
# One thread a process unless told otherwise: more of them than cores slow each other down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( $(nproc) / gpus > 0 ? $(nproc) / gpus : 1 ))}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}
exec "${command[@]}"
