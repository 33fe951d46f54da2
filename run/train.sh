#!/bin/sh
# Trains one experiment: sh run/train.sh NAME [--section.key VALUE ...]
#
# NAME is a file of configs/ without its suffix. DATA replaces the folder of the data set, and WEIGHTS the
# folder of pretrained weights, that the config names, unless --data.root or --model.weights is given. For
# several processes and machines see run/launch.sh.
set -eu
cd "$(dirname -- "$0")/.."
. ./run/launch.sh
if [ $# -eq 0 ]; then
  echo "usage: sh run/train.sh NAME [--section.key VALUE ...], NAME as in configs/NAME.yaml" >&2
  exit 2
fi
name=$1
shift
case ${WEIGHTS:+$name} in
  vit_imagenet_*) given --model.weights "$@" || set -- --model.weights "$WEIGHTS/ViT-B_16-224.npz" "$@" ;;
esac
if [ -n "${DATA:-}" ] && ! given --data.root "$@"; then set -- --data.root "$DATA" "$@"; fi
launch experiments.train --config "configs/$name.yaml" "$@"
