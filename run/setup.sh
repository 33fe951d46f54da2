#!/usr/bin/env bash
# Makes the environment .venv in the checkout's root: the project, installed editable with all its extras
# at the versions of constraints.txt. Does nothing when .venv is right; otherwise deletes it and starts over.
#
#   bash run/setup.sh            with a Python 3.11 to 3.13 that uv finds, or downloads where there is none
#   PYTHON=/path/to/python3 bash run/setup.sh
#
# It needs uv, or a Python with pip or venv to fetch uv. It may run twice at once and from any folder.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

# Settings of another environment, or of an installation into another place.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX PIP_USER PIP_TARGET PIP_PREFIX PIP_CONSTRAINT
unset UV_PYTHON UV_SYSTEM_PYTHON UV_CONSTRAINT UV_OVERRIDE UV_PROJECT UV_WORKING_DIRECTORY UV_NO_BINARY
# A local wheel wins over the index's: a CPU-only torch would meet the CUDA build of torchvision.
# Without an index, local wheels are all there is.
[ -n "${UV_NO_INDEX:-}" ] || unset UV_FIND_LINKS

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$@" && exit 1; }

# What .venv was made from, and what is in it.
state() {
  pwd
  cat pyproject.toml setup.py constraints.txt run/setup.sh tokenmixup/*.c | sha256sum
  .venv/bin/uv pip freeze --python .venv/bin/python 2>/dev/null
}

# The last step of an installation writes .venv/complete. Packages added by hand may stay; a package
# that was removed or replaced by another version makes .venv wrong.
is_right() {
  [ -f .venv/complete ] && [ -z "$(state | LC_ALL=C sort | LC_ALL=C comm -13 - .venv/complete)" ] &&
    { [ -z "${PYTHON:-}" ] || [ "$("$PYTHON" --version)" = "$(.venv/bin/python --version)" ]; }
}

# Makes uv one that pip installs into the folder $1.
fetch_uv() {
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv "$1/venv" >/dev/null 2>&1 || fail "found neither uv nor a Python with pip or venv (tried" \
      "$python). Debian, Ubuntu: apt install python3-venv. Or name one: PYTHON=/path/to/python3 bash run/setup.sh"
    python=$1/venv/bin/python
  fi
  "$python" -m pip install --quiet --no-input --constraint constraints.txt --target "$1/uv" uv ||
    fail "pip could not install uv (see above): is there a network, or a mirror in pip's settings?"
  uv=$1/uv/bin/uv
}

install() {
  local folder uv=uv python=${PYTHON:-python3} mirror cert
  [ -z "${PYTHON:-}" ] || "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "PYTHON=$PYTHON is not a Python 3.11 or newer that runs"
  folder=$(mktemp -d) && trap "rm -rf '$folder'" EXIT
  uv --version >/dev/null 2>&1 || fetch_uv "$folder"
  # uv ignores pip's settings: follow them here, except find-links and extra indexes (local wheels, see above).
  mirror=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
  cert=${PIP_CERT:-$("$python" -m pip config get global.cert 2>/dev/null || true)}
  [ -z "$mirror" ] || export UV_DEFAULT_INDEX=${UV_DEFAULT_INDEX:-${UV_INDEX_URL:-$mirror}}
  [ -z "$cert" ] || export SSL_CERT_FILE=${SSL_CERT_FILE:-$cert}
  export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-${PIP_DEFAULT_TIMEOUT:-180}}
  say "making $PWD/.venv; the first time this downloads 3 GB"
  rm -rf .venv
  # Compiled now: where PYTHONDONTWRITEBYTECODE is set, every import would compile again.
  "$uv" venv --quiet --python "${PYTHON:-cpython>=3.11,<3.14}" .venv &&
    "$uv" pip install --python .venv/bin/python --compile-bytecode --constraints constraints.txt \
      --build-constraints constraints.txt --editable '.[experiments,test,docs]' ||
    fail "the installation stopped (see above). The next call starts over."
  .venv/bin/python -c 'import torch, torchvision, timm' || fail "torch, torchvision and timm do not load" \
    "together (see above). torch and torchvision must be of one build: wheels or an extra index in uv's" \
    "settings may bring another. Without these settings: UV_NO_CONFIG=1 bash run/setup.sh"
  state | LC_ALL=C sort >.venv/incomplete && mv .venv/incomplete .venv/complete
}

is_right || {
  exec 9>.venv.lock # one set-up at a time; whoever waited looks again
  flock --nonblock 9 || { say "waiting for another set-up of this checkout" && flock 9; }
  is_right || install
}
say "$PWD/.venv is ready"
