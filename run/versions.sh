#!/usr/bin/env bash
# Runs the library's tests (tests/tokenmixup, without the slow ones) with old and new versions of Python, torch,
# timm and transformers, and writes what came out into results/versions and docs/hosts.md.
#
#   bash run/versions.sh [oldest|between|newest ...] [-- PYTEST'S ARGUMENTS, in place of tests/tokenmixup]
#
# Each has an environment in $VERSIONS (default .versions), made where it is missing; delete it to make it anew.
# It needs .venv (run/setup.sh), whose uv finds or downloads the Pythons. An environment takes 6 GB.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
unset PYTHONPATH VIRTUAL_ENV UV_FIND_LINKS # a local wheel would win over the index's, see run/setup.sh
folder=${VERSIONS:-.versions}

wanted() { # the Python and packages of an environment; `oldest` are pyproject.toml's lower bounds
  case $1 in
    oldest) echo 3.11 torch==2.8.0 torchvision==0.23.0 timm==1.0.31 transformers==5.0.0 accelerate==1.4.0 peft==0.18.0 pytorch-lightning==2.6.0 ;;
    between) echo 3.12 torch==2.11.0 torchvision==0.26.0 timm==1.0.31 transformers==5.17.0 ;;
    newest) echo 3.13 torch torchvision timm transformers ;;
    *) echo "versions: got $1; allowed: oldest, between, newest" >&2 && return 1 ;;
  esac
}

names=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do names+=("$1") && shift; done
[ $# -eq 0 ] || shift
[ ${#names[@]} -gt 0 ] || names=(oldest between newest)
[ $# -gt 0 ] || set -- tests/tokenmixup -m "not slow"

for name in "${names[@]}"; do
  wanted=$(wanted "$name")
  read -r version packages <<<"$wanted"
  python=$folder/$name/bin/python
  if [ ! -e "$folder/$name/complete" ]; then
    .venv/bin/uv venv --quiet --clear --python "$version" "$folder/$name"
    # shellcheck disable=SC2086
    .venv/bin/uv pip install --quiet --python "$python" --editable '.[experiments,test]' $packages
    touch "$folder/$name/complete"
  fi
  "$python" -m pytest -q -n 0 -p no:cacheprovider --junit-xml "$folder/$name/tests.xml" "$@" || true
  "$python" -m tests.helpers.versions_table "$name" "$folder/$name/tests.xml" "$@"
done
.venv/bin/python -m tests.helpers.tables
