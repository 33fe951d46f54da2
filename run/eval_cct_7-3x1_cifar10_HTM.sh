#!/bin/sh
exec sh "$(dirname -- "$0")/eval.sh" cct_7-3x1_cifar10_HTM cct_cifar10_htm.pth.tar "$@"
