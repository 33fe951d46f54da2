#!/usr/bin/env bash
# Sets up, then runs the tests: all of them with --all, else those not marked slow.
# Further arguments go to pytest:
#
#   bash run/test.sh
#   bash run/test.sh --all
#   bash run/test.sh -k wrapper tests/test_horizontal.py      (paths count from the checkout's root)

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

bash run/setup.sh
unset PYTHONPATH PYTHONHOME

selected=(-m 'not slow')
arguments=()
for argument in "$@"; do
  if [ "$argument" = --all ]; then
    selected=()
  else
    arguments+=("$argument")
  fi
done

# The odd expansions: an empty array is an unset variable to bash before 4.4.
exec .venv/bin/python -m pytest --durations=10 --durations-min=5 \
  ${selected[@]+"${selected[@]}"} ${arguments[@]+"${arguments[@]}"}
