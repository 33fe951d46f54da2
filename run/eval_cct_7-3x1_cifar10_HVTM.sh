#!/bin/sh
exec sh "$(dirname -- "$0")/eval.sh" cct_7-3x1_cifar10_HVTM cct_cifar10_hvtm.pth.tar "$@"
