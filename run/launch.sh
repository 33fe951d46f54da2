# Starts one process, or several with torchrun, as the environment says. run/train.sh and run/eval.sh source
# this file; called directly it runs a module in the current folder: sh run/launch.sh MODULE [ARGUMENT ...]
#
#   NPROC       processes on this machine, one per GPU (default: 1)
#   NNODES      machines (default: 1)
#   NODE_RANK   rank of this machine, 0 to NNODES - 1 (needed if NNODES > 1 and RDZV_ENDPOINT is not set)
#   MASTER_ADDR, MASTER_PORT   address of machine 0 (default port: 29500)
#   RDZV_ENDPOINT, RDZV_ID, RDZV_BACKEND   torchrun's elastic rendezvous instead of the two lines above
#   MAX_RESTARTS   restarts of all processes after one has died (default: 3)
#
# The interpreter is TOKENMIXUP_PYTHON, else that of the checkout's .venv, else python3 (conda).

# Whether an option is among arguments, where it goes before the environment: given --OPTION [ARGUMENT ...]
given() {
  option=$1
  shift
  for argument in "$@"; do
    case $argument in "$option" | "$option"=*) return 0 ;; esac
  done
  return 1
}

# Runs a module of the project: launch MODULE [ARGUMENT ...]
launch() {
  python=${TOKENMIXUP_PYTHON:-}
  if [ -z "$python" ]; then
    python=python3
    if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
  fi
  nproc=${NPROC:-1}
  nnodes=${NNODES:-1}
  if [ "$nproc" = 1 ] && [ "$nnodes" = 1 ]; then
    exec "$python" -m "$@"
  fi
  # torchrun would retry a mistake MAX_RESTARTS times. How many processes NPROC=gpu means, it alone knows.
  case $nproc$nnodes in
    *[!0-9]*) "$python" -m "$@" --check || exit $? ;;
    *) WORLD_SIZE=$((nproc * nnodes)) LOCAL_WORLD_SIZE=$nproc "$python" -m "$@" --check || exit $? ;;
  esac
  # torchrun (since torch 2.9) forwards these signals to its processes, which save and stop; all but Slurm's
  # SIGUSR1 are its defaults.
  export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
  if [ -n "${RDZV_ENDPOINT:-}" ]; then
    exec "$python" -m torch.distributed.run --nproc-per-node "$nproc" --nnodes "$nnodes" \
      --max-restarts "${MAX_RESTARTS:-3}" --rdzv-backend "${RDZV_BACKEND:-c10d}" \
      --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-tokenmixup}" -m "$@"
  fi
  if [ "$nnodes" = 1 ]; then
    exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$nproc" \
      --max-restarts "${MAX_RESTARTS:-3}" -m "$@"
  fi
  if [ -z "${NODE_RANK:-}" ] || [ -z "${MASTER_ADDR:-}" ]; then
    echo "$0: NNODES=$nnodes needs NODE_RANK and MASTER_ADDR, or RDZV_ENDPOINT=host:port" >&2
    exit 2
  fi
  exec "$python" -m torch.distributed.run --nproc-per-node "$nproc" --nnodes "$nnodes" \
    --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
    --max-restarts "${MAX_RESTARTS:-3}" -m "$@"
}

case $0 in
  launch.sh | */launch.sh) launch "$@" ;;
esac
