#!/bin/sh
exec sh "$(dirname -- "$0")/train.sh" vit_imagenet_HVTM "$@"
