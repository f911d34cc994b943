#!/bin/bash
# Trains on nodes of GPUs under Slurm; arguments are those of launch/train.py:
#
#   sbatch --nodes=4 launch/slurm.sh --flagfile=experiments/sd2_preference.flags ...
#
# A node has one process with all of its GPUs. Five minutes before the time is over, and when the job
# is to make way for another, the run saves a checkpoint; the job is then put back into the queue
# and goes on from it. Workdir, model and prompts have to be where all nodes see them. Options of
# sbatch stand above those here: --gpus-per-node=4, --time=04:00:00, --account=...
#SBATCH --job-name=rlft
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=rlft-%j.log
set -euo pipefail

# Programs survive the job, so that the next start compiles nothing.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/rlft/xla}"
step='' stopped='' status=0
trap 'stopped=1; [[ -z $step ]] || kill -TERM "$step"' USR1 TERM # srun hands it on to every process.
srun --kill-on-bad-exit=1 "${PYTHON:-python}" launch/train.py "$@" &
step=$!

# A signal ends the first wait, not the step.
wait "$step" || status=$?
if [[ $stopped ]]; then
  status=0
  wait "$step" || status=$?
  if ((status == 0)); then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
