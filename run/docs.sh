#!/usr/bin/env bash
# Sets up, then builds the documentation into output/docs/index.html. Broken links, names that do not
# exist and public names without a docstring end it with an error. Further arguments go to sphinx-build.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

bash run/setup.sh
unset PYTHONPATH PYTHONHOME

# Afresh each time (--fresh-env): pages that are not read again would keep their warnings to themselves.
.venv/bin/python -m sphinx --builder html --fresh-env --write-all --quiet --fail-on-warning "$@" docs output/docs
echo "docs: output/docs/index.html"
