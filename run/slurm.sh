#!/bin/sh
# A template for Slurm: sbatch --nodes 1 --gpus-per-node 4 run/slurm.sh vit_imagenet_HTM [--section.key VALUE ...]
#
# The run folder is --output, else RUN_FOLDER, else output/NAME. Two minutes before the time limit the run
# saves and stops, and the job requeues itself until the run is done.
#SBATCH --job-name=tokenmixup
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
set -eu
cd "${SLURM_SUBMIT_DIR:-.}"
: "${SLURM_JOB_ID:?run this with sbatch}"
. ./run/launch.sh
folder=${RUN_FOLDER:-output/${1:?which experiment? a file of configs/ without its suffix}}
if given --output "$@"; then
  before=
  for argument in "$@"; do
    case $argument in --output=*) folder=${argument#--output=} ;; esac
    case $before in --output) folder=$argument ;; esac
    before=$argument
  done
else
  set -- "$@" --output "$folder"
fi
# One torchrun per machine; they meet at the first machine of the job.
NNODES=${SLURM_NNODES:-1}
NPROC=${NPROC:-${SLURM_GPUS_ON_NODE:-1}}
RDZV_ID=$SLURM_JOB_ID
RDZV_ENDPOINT=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500
export NNODES NPROC RDZV_ID RDZV_ENDPOINT

# From Slurm 22.05 on, srun no longer takes over sbatch's --cpus-per-task.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi

begin=$(mktemp)
trap 'rm -f "$begin"' EXIT
code=0
srun sh run/train.sh "$@" || code=$?
# The run's heartbeat says whether it has saved and stopped before its end; the exit code does not, since
# torchrun has codes of its own. An older heartbeat says nothing about this job, which may have failed early.
heartbeat=$folder/heartbeat.json
if [ "$heartbeat" -nt "$begin" ] && grep -q '"state": "stopped"' "$heartbeat"; then
  echo "$0: the run has saved and stopped: requeued" >&2
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
