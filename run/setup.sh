#!/usr/bin/env bash
# Makes the environment .venv in the checkout's root: the project, installed editable with all its
# extras at the versions of constraints.txt. Does nothing when .venv is already right. When it is
# not (half made, moved, from other versions), .venv is emptied and made anew.
#
#   bash run/setup.sh        takes the first of python3.13, python3.12, python3.11, python3 that will do
#   PYTHON=/path/to/python3 bash run/setup.sh
#   bash run/setup.sh --check          only tells, by its exit status, whether .venv is right
#
# It may be called from any folder, twice at once, and with another environment active.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"

# The body is a subshell: a shell that sources this file keeps its folder, options and variables.
setup() (
  set -euo pipefail

  root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
  venv=$root/.venv
  stamp=$venv/tokenmixup-setup.txt

  say() { printf 'setup: %s\n' "$*" >&2; }
  fail() {
    say "$@"
    exit 1
  }

  clean_surroundings() {
    # What belongs to another environment, or moves or filters what gets installed.
    unset PYTHONPATH PYTHONHOME PYTHONSTARTUP VIRTUAL_ENV
    unset PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT PIP_PYTHON PIP_CONSTRAINT PIP_REQUIRE_HASHES
    unset PIP_NO_BINARY
    local name
    for name in "${!UV_@}"; do
      case $name in
        UV_CACHE_DIR | UV_NO_CACHE | UV_LINK_MODE | UV_OFFLINE | UV_NO_INDEX) ;;
        UV_INDEX* | UV_DEFAULT_INDEX | UV_EXTRA_INDEX_URL | UV_KEYRING_PROVIDER) ;;
        UV_HTTP_* | UV_CONCURRENT_* | UV_SYSTEM_CERTS | UV_NATIVE_TLS | UV_INSECURE_HOST) ;;
        UV_CONFIG_FILE | UV_NO_CONFIG | UV_NO_PROGRESS | UV_TORCH_BACKEND) ;;
        # A local wheel wins over the index's: a CPU-only torch there would meet torchvision's
        # CUDA build. Without an index, local wheels are all there is.
        UV_FIND_LINKS) [ -n "${UV_NO_INDEX:-}" ] || unset UV_FIND_LINKS ;;
        *) unset "$name" ;;
      esac
    done
  }

  python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

  # What the environment must have been made from: these files, this checkout's path, this Python.
  describe() {
    local version
    version=$(python_version "$venv/bin/python") || return 1
    printf 'project %s\n' "$(cd "$root" && cat pyproject.toml constraints.txt run/setup.sh tokenmixup/*.c | sha256sum)"
    printf 'checkout %s\n' "$root"
    printf 'python %s\n' "$version"
  }

  packages() { (cd "$venv"/lib/python3.*/site-packages && printf '%s\n' *.dist-info); }

  is_right() {
    [ -f "$stamp" ] || return 1
    local now package site
    now=$(describe) || return 1
    [ "$now" = "$(head -n 3 "$stamp")" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "${now##* }" = "$(python_version "$PYTHON")" ] || return 1
    # Packages added by hand may stay; one removed, or replaced by another version, is missed.
    site=("$venv"/lib/python3.*/site-packages)
    while IFS= read -r package; do
      [ -f "${site[0]}/$package/METADATA" ] || return 1
    done < <(tail -n +4 "$stamp")
  }

  # Prints the interpreter behind the command $1; for the Python of an environment that is the one
  # which the environment was made from (.venv itself may be active). Status 3: not CPython 3.11 or
  # newer; 4: cannot make environments.
  interpreter() {
    local path
    command -v "$1" >/dev/null 2>&1 || return 3
    path=$("$1" -c '
import sys
if sys.version_info < (3, 11) or sys.implementation.name != "cpython":
    sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(4)
print(getattr(sys, "_base_executable", None) or sys.executable)
' 2>/dev/null) || return
    [ -n "$path" ] || return 3
    printf '%s\n' "$path"
  }

  says() {
    if command -v "$1" >/dev/null 2>&1; then
      printf 'it says: %s' "$("$1" --version 2>&1 | head -n 1 || true)"
    else
      printf 'no such command'
    fi
  }

  find_python() {
    local candidate status no_venv=''
    local candidates=(python3.13 python3.12 python3.11 python3)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
      status=0
      interpreter "$candidate" || status=$?
      [ "$status" -ne 0 ] || return 0
      [ "$status" -ne 4 ] || no_venv=${no_venv:-$candidate}
    done
    if [ -n "$no_venv" ]; then
      fail "$no_venv cannot make an environment: its modules venv and ensurepip are missing." \
        "On Debian and Ubuntu: apt install python$(python_version "$no_venv")-venv." \
        "Or name another Python: PYTHON=/path/to/python3 bash run/setup.sh"
    elif [ -n "${PYTHON:-}" ]; then
      fail "PYTHON=$PYTHON is not a Python 3.11 or newer that runs" \
        "($(says "$PYTHON"))."
    fi
    fail "no Python 3.11 or newer found: looked for ${candidates[*]} on PATH" \
      "(python3 there: $(says python3))." \
      "Install one (on Debian and Ubuntu: apt install python3 python3-venv)," \
      "or name one: PYTHON=/path/to/python3 bash run/setup.sh"
  }

  # uv does not read pip's settings. The mirror, the certificate and the patience that pip was given
  # hold for both; pip's find-links and extra indexes do not (see UV_FIND_LINKS above).
  follow_pip() {
    local mirror
    mirror=${PIP_INDEX_URL:-$("$venv/bin/python" -m pip config get global.index-url 2>/dev/null || true)}
    if [ -n "$mirror" ] && [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-}" ]; then
      export UV_DEFAULT_INDEX=$mirror
    fi
    if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE=$PIP_CERT; fi
    export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-${PIP_DEFAULT_TIMEOUT:-180}}
  }

  check_imports() {
    "$venv/bin/python" - <<'PYTHON_CODE'
import importlib
import sys
from importlib.metadata import version

for name in ("torch", "torchvision", "timm"):
    try:
        importlib.import_module(name)
    except Exception as error:
        print(
            f"setup: {name} {version(name)} does not load: {type(error).__name__}: {error}\n"
            f"setup: installed are torch {version('torch')} and torchvision {version('torchvision')}."
            " They must be a matching pair\n"
            "setup: of the same build: 'operator torchvision::nms does not exist', an undefined symbol"
            " or a missing CUDA library\n"
            "setup: mean that one of them came from elsewhere, such as a folder of local wheels or an"
            " extra index in uv's\n"
            "setup: settings (uv.toml, UV_INDEX, UV_EXTRA_INDEX_URL). Take that away and run again:"
            " UV_NO_CONFIG=1 bash run/setup.sh",
            file=sys.stderr,
        )
        sys.exit(1)
PYTHON_CODE
  }

  install() {
    local python
    python=$(find_python) || exit 1
    [ ! -e "$venv" ] || [ -d "$venv" ] || fail "$venv is in the way: not a folder. Move it elsewhere."
    say "making $venv with $python ($(python_version "$python")); the first time this downloads 3 GB"
    cd "$root" || exit 1
    rm -f "$stamp"
    "$python" -m venv --clear "$venv" || fail "could not make $venv with $python (see above)."
    "$venv/bin/python" -m pip install --quiet --no-input --no-user --constraint constraints.txt uv ||
      fail "pip could not install uv (see above): is there a network, or a mirror in pip's settings?"
    follow_pip
    # Bytecode now rather than at each first import, and also where PYTHONDONTWRITEBYTECODE is set.
    "$venv/bin/python" -m uv pip install --python "$venv/bin/python" --compile-bytecode \
      --constraints constraints.txt --build-constraints constraints.txt --editable '.[experiments,test,docs]' ||
      fail "the installation stopped (see above). Run again when the cause is gone; it starts anew."
    check_imports || exit 1
    # Last, and moved into place: an interrupted set-up leaves no stamp.
    { describe && packages; } >"$stamp.new"
    mv "$stamp.new" "$stamp"
  }

  case "${1:-}" in
    '') ;;
    --check) clean_surroundings && is_right && exit 0 || exit 1 ;;
    *) fail "unknown argument $1: the only one is --check" ;;
  esac

  clean_surroundings
  if ! is_right; then
    # One set-up at a time in a checkout; who waited looks again.
    exec 9>"$root/.venv.lock"
    if command -v flock >/dev/null 2>&1; then
      flock --nonblock 9 || {
        say "waiting for another set-up of this checkout to end"
        flock 9
      }
    fi
    is_right || install
  fi
  say "$venv is ready"
)

setup "$@"
