#!/bin/sh
exec sh "$(dirname -- "$0")/train.sh" cct_7-3x1_cifar100_VTM "$@"
