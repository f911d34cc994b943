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

# What the run says is copied, since only that tells a run that was stopped from one that has ended.
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/says"
(trap '' INT TERM USR1 && exec tee "$folder/said" <"$folder/says") &
copying=$!

step=''
# At TERM, srun kills its processes; USR1 it hands on to each of them.
trap '[[ -z $step ]] || kill -USR1 "$step"' USR1 TERM
srun --kill-on-bad-exit=1 "${PYTHON:-python}" launch/train.py "$@" >"$folder/says" 2>&1 &
step=$!

# A signal ends a wait, not the step.
while
  status=0
  wait "$step" || status=$?
  kill -0 "$step" 2>/dev/null
do :; done
wait "$copying" || true
# When the job is to make way for another, Slurm tells the step, and not this script.
if ((status == 0)) && grep -q 'the same command goes on' "$folder/said"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
