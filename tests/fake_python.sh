#!/bin/sh
# Stands for a Python in the tests of run/setup.sh: answers what the script asks, installs nothing,
# and writes what it was asked to $FAKE_LOG. FAKE_VERSION is its version; FAKE_NO_VENV: it cannot
# make environments; FAKE_FAILS: the step that fails (venv, pip, uv,
# import or a module of the experiments).
here=$(dirname "$0")
packages=$here/../lib/python3.11/site-packages

log() { printf '%s\n' "$*" >>"$FAKE_LOG"; }
stop_if() { [ "${FAKE_FAILS:-}" != "$1" ] || { echo "$1 failed" >&2; exit 1; }; }
install() { mkdir -p "$packages/$1.dist-info" && touch "$packages/$1.dist-info/METADATA"; }

case "$*" in
  *ensurepip*)
    [ -z "${FAKE_NO_VENV:-}" ] || exit 4
    case ${FAKE_VERSION:-3.13} in 3.[0-9] | 3.10) exit 3 ;; esac
    printf '%s\n' "$0"
    ;;
  *'sys.version_info[:2]'*) printf '%s\n' "${FAKE_VERSION:-3.13}" ;;
  --version) printf 'Python %s.1\n' "${FAKE_VERSION:-3.13}" ;;
  '-m venv --clear '*)
    log venv
    rm -rf "$4"
    mkdir -p "$4/bin" "$4/lib/python3.11/site-packages"
    cp "$0" "$4/bin/python"
    stop_if venv
    ;;
  '-m pip config '*) exit 1 ;;
  '-m pip install '*)
    log pip
    stop_if pip
    install uv-1.0
    ;;
  '-m uv pip install '*)
    log "uv $(env | grep -cE '^(VIRTUAL_ENV|PYTHONPATH|UV_FIND_LINKS|UV_PYTHON|PIP_USER)=')"
    sleep "${FAKE_SECONDS:-0}"
    stop_if uv
    install torch-1.0
    install timm-1.0
    ;;
  '-m experiments.'*)
    log "$*"
    stop_if "$2"
    ;;
  -)
    log import
    cat >/dev/null
    stop_if import
    ;;
  *)
    log "unexpected: $*"
    exit 64
    ;;
esac
