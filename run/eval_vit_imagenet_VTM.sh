#!/bin/sh
exec sh "$(dirname -- "$0")/eval.sh" vit_imagenet_VTM VIT_VTM.bin "$@"
