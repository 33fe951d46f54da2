#!/usr/bin/env bash
# Sets up, then runs the tests that are not marked slow, or all of them with --all.
# Further arguments go to pytest:
#
#   bash run/test.sh
#   bash run/test.sh --all
#   bash run/test.sh -k wrapper tests/tokenmixup/test_horizontal.py      (paths are relative to the checkout)
#   bash run/test.sh -n 0 --pdb        in one process, as a debugger needs
#
# They run in as many processes as there are cores, but in at most four: each loads torch and, in some
# tests, a model of the paper's size.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

bash run/setup.sh
# Tests start many processes, and each would compile this project again without bytecode.
unset PYTHONPATH PYTHONHOME PYTHONDONTWRITEBYTECODE

selected=(-m 'not slow')
arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then
    selected=()
  else
    arguments+=("$argument")
  fi
done

# Before bash 4.4 an empty array is an unset variable, hence ${…+…}.
exec .venv/bin/python -m pytest \
  --numprocesses auto --maxprocesses 4 --dist worksteal --durations=10 --durations-min=5 \
  ${selected[@]+"${selected[@]}"} ${arguments[@]+"${arguments[@]}"}
