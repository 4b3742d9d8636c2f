#!/usr/bin/env bash
# Starts a training run: _launch.sh CONFIG [--key.sub value ...]. CONFIG and the relative paths in it start where the
# caller is; a CONFIG that is not there is looked for in the repository, and its paths start there. Topology comes from
# the environment only:
#   GPUS_PER_NODE  processes on this machine (default: its GPUs, or 1 without one)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   several machines, one call on each; RUN_ID the same on all of them
#   MAX_RESTARTS   how often torchrun starts all ranks again after one has failed (default 0); they resume by themselves
#   LAUNCHER       torchrun (default) | deepspeed (one call, machines from HOSTFILE) | python (one process, no ZeRO)
#   DRY_RUN=1      print the command instead of running it
# Exit code: 0 done, 2 a mistake in what was given, 75 stopped by SIGTERM or SIGUSR1 after saving (run it again with
# --train.resume auto), anything else a failure. docs/scaling.md is the operator's page.
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
[ -n "${1:-}" ] && [ -f "$1" ] || cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
[ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ] && export PATH="$root/.venv/bin:$PATH"

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
    command=(python -m llava_mole.train.torchrun --nproc_per_node "$gpus" --nnodes "$nodes")
    [ "${MAX_RESTARTS:-0}" = 0 ] || command+=(--max-restarts "$MAX_RESTARTS")
    if [ "$nodes" -gt 1 ]; then
      node=${NODE_RANK:-${SLURM_NODEID:-}}
      : "${node:?NODE_RANK is needed with NNODES > 1: 0 on the first machine}"
      address=${MASTER_ADDR:?MASTER_ADDR is needed with NNODES > 1: name of the first machine}
      # Which machine holds the rendezvous is said, not guessed from host names, which differ from network to network.
      command+=(--rdzv_backend c10d --rdzv_endpoint "$address:${MASTER_PORT:-29500}" --rdzv_id "${RUN_ID:-llava_mole}"
                --rdzv_conf "is_host=$([ "$node" = 0 ] && echo true || echo false)")
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
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$root/.cache/torch_extensions}
[ "$launcher" = torchrun ] || exec "${command[@]}"

# torchrun ends with 1 whatever its ranks ended with, and would kill them 30 s after a signal to stop. So it ignores
# these signals, the ranks are asked to stop by a file, and leave their exit code in another.
export LLAVA_MOLE_CONTROL_DIR
LLAVA_MOLE_CONTROL_DIR=$(mktemp -d)
trap 'rm -rf "$LLAVA_MOLE_CONTROL_DIR"' EXIT
# With one store for all attempts (torch 2.15) restarted ranks find the addresses of the dead ones there, and hang.
[ "${MAX_RESTARTS:-0}" = 0 ] || export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT  # torchrun's --signals-to-handle
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-10}  # for ranks that a lost one keeps waiting
set -m  # a process group of its own: Ctrl-C reaches torchrun once, through the trap
( trap '' TERM USR1; exec "${command[@]}" ) &
child=$!
trap 'touch "$LLAVA_MOLE_CONTROL_DIR/stop"' TERM USR1
trap 'kill -INT "$child" 2>/dev/null || true' INT
code=0
wait "$child" || code=$?
while kill -0 "$child" 2>/dev/null; do  # `wait` returns early when a signal arrives
  code=0; wait "$child" || code=$?
done
left=$(cat "$LLAVA_MOLE_CONTROL_DIR/exit_code" 2>/dev/null || true)
if [ "$left" = 75 ] || { [ "$code" -ne 0 ] && [ -n "$left" ]; }; then code=$left; fi
exit "$code"
