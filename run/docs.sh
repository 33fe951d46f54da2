#!/usr/bin/env bash
# Sets up, then builds the documentation into output/docs/index.html. Broken links, unknown names and
# public names without a docstring are errors. Further arguments go to sphinx-build.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

bash run/setup.sh
unset PYTHONPATH PYTHONHOME

# All pages each time (--fresh-env): a page that is not read again repeats no warnings.
.venv/bin/python -m sphinx --builder html --fresh-env --write-all --quiet --fail-on-warning "$@" docs output/docs
echo "docs: output/docs/index.html"
