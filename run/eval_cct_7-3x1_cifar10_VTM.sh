#!/bin/sh
exec sh "$(dirname -- "$0")/eval.sh" cct_7-3x1_cifar10_VTM cct_cifar10_vtm.pth.tar "$@"
