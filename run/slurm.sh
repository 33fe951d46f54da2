#!/bin/sh
# A template for Slurm: sbatch --nodes 1 --gpus-per-node 4 run/slurm.sh vit_imagenet_HTM [ARGUMENT ...]
#SBATCH --job-name=tokenmixup
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
set -eu
cd "${SLURM_SUBMIT_DIR:-.}"
# One torchrun a machine; they meet at the first machine of the job.
NNODES=${SLURM_NNODES:-1}
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
RDZV_ID=${SLURM_JOB_ID:-tokenmixup}
RDZV_ENDPOINT=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?run this with sbatch}" | head -n 1):29500
export NNODES NPROC RDZV_ID RDZV_ENDPOINT
exec srun sh run/train.sh "$@"
