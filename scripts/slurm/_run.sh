#!/usr/bin/env bash
# The body of the jobs beside it: _run.sh SCRIPT [CONFIG] [--key.sub value ...]. One task a machine starts torchrun there.
# A run that was stopped by the signal before the time limit (exit code 75) goes back into the queue and resumes.
#   GPUS_PER_NODE (default 8), MAX_RESTARTS (default 3)   as for scripts/_launch.sh
#   DRY_RUN=1 bash scripts/slurm/finetune_mole.sbatch     prints what would run, without SLURM
set -uo pipefail
script=$1; shift
export NNODES=${SLURM_NNODES:-8} GPUS_PER_NODE=${GPUS_PER_NODE:-8} MAX_RESTARTS=${MAX_RESTARTS:-3}
if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
fi
export MASTER_ADDR=${MASTER_ADDR:-first-host}
job=${SLURM_JOB_ID:-0}
export MASTER_PORT=${MASTER_PORT:-$((20000 + job % 20000))} RUN_ID=$job.${SLURM_RESTART_COUNT:-0}
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-}
[ -n "$SRUN_CPUS_PER_TASK" ] || unset SRUN_CPUS_PER_TASK
# --wait: machines that end a little later with the same exit code are not killed for it, but none waits for ever.
command=(srun --nodes "$NNODES" --ntasks-per-node 1 --wait 120 bash "$script" "$@" --train.resume auto)

if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"; echo
  NODE_RANK=0 exec bash "$script" "$@" --train.resume auto
fi
code=0
"${command[@]}" || code=$?
if [ "$code" -eq 75 ]; then
  echo "stopped after saving; back into the queue" >&2
  scontrol requeue "$job" || exit "$code"
fi
exit "$code"
