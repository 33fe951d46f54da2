#!/bin/sh
exec sh "$(dirname -- "$0")/eval.sh" cct_7-3x1_cifar100_HTM cct_cifar100_htm.pth.tar "$@"
