#!/bin/sh
exec sh "$(dirname -- "$0")/eval.sh" vit_imagenet_HTM VIT_HTM.bin "$@"
