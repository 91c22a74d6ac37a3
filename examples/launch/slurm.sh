#!/usr/bin/env bash
# sbatch examples/launch/slurm.sh train --config recipe.yaml --training.resume true
# One task a GPU, started by srun itself, so that each task gets the scheduler's SIGTERM and its exit code comes back.
#SBATCH --job-name=difftune
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@180
set -uo pipefail
STOPPED=143   # the exit code after SIGTERM, when a checkpoint is saved

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

srun --kill-on-bad-exit=1 --wait=60 bash -c \
  'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec python -m difftuning_control.cli "$@"' difftune "$@"
code=$?
if [ "$code" -eq "$STOPPED" ]; then   # go on when there is room again
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
