#!/usr/bin/env bash
# A sweep as a Slurm job array: each task of the array makes its part of the runs.
#
#   sbatch --array=1-8 docs/slurm.sh sweep.yaml --out /shared/results --data-dir /shared/data
#
# Whatever comes after the script goes to `ltnorm sweep`. A task that is preempted, whose node fails
# or whose time is over is queued again, and goes on where its runs were.
#SBATCH --job-name=ltnorm-sweep
#SBATCH --array=1-8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@60
set -euo pipefail

# Tasks are counted from 1, however the array is: 1-8, 0-7, 0-35:5. A list with gaps has no parts.
first=${SLURM_ARRAY_TASK_MIN:?is not set: start this with sbatch --array}
step=${SLURM_ARRAY_TASK_STEP:-1}
parts=$SLURM_ARRAY_TASK_COUNT
part=$(((SLURM_ARRAY_TASK_ID - first) / step + 1))
if [ $(((SLURM_ARRAY_TASK_MAX - first) / step + 1)) -ne "$parts" ]; then
  echo "slurm.sh: the array has gaps; give a range such as --array=1-8" >&2
  exit 2
fi

# Slurm sends USR1 to this script alone a minute before the time is over, and only then: a job that
# is cancelled must not be queued again.
over=
job=
trap 'over=1; kill -TERM "$job" 2>/dev/null || true' USR1
srun ltnorm sweep "$@" --part "$part/$parts" &
job=$!
code=0
wait "$job" || code=$?
if [ -n "$over" ]; then
  code=0
  wait "$job" || code=$?
  if [ "$code" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
