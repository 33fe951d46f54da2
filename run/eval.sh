#!/bin/sh
# Evaluates one checkpoint: sh run/eval.sh NAME FILE [--section.key VALUE ...]
#
# NAME is a file of configs/ without its suffix. FILE is a checkpoint: a path, or a name in the folder
# WEIGHTS (default: weights). DATA replaces the folder of the data set that the config names, unless
# --data.root is given. For several processes and machines see run/launch.sh.
set -eu
cd "$(dirname -- "$0")/.."
. ./run/launch.sh
if [ $# -lt 2 ]; then
  echo "usage: sh run/eval.sh NAME FILE [--section.key VALUE ...], NAME as in configs/NAME.yaml" >&2
  exit 2
fi
name=$1
file=$2
shift 2
case $file in
  */*) ;;
  *) file=${WEIGHTS:-weights}/$file ;;
esac
if [ -n "${DATA:-}" ] && ! given --data.root "$@"; then set -- --data.root "$DATA" "$@"; fi
launch experiments.evaluate --config "configs/$name.yaml" --checkpoint "$file" "$@"
