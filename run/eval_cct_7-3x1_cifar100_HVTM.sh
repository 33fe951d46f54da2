#!/bin/sh
exec sh "$(dirname -- "$0")/eval.sh" cct_7-3x1_cifar100_HVTM cct_cifar100_hvtm.pth.tar "$@"
