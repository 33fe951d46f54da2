#!/bin/sh
exec sh "$(dirname -- "$0")/eval.sh" vit_imagenet_HVTM VIT_HVTM.bin "$@"
