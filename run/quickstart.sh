#!/usr/bin/env bash
# Trains and evaluates four small models on real images, plain and with HTM, VTM and both, then
# prints a table and draws what was mixed. Needs neither a GPU nor, after set-up, a network.
#
#   bash run/quickstart.sh                          goes on where an earlier call stopped; what is
#                                                   finished is kept and only shown again
#   bash run/quickstart.sh --fresh                  forgets earlier calls
#   bash run/quickstart.sh --fresh --schedule.epochs 1
#                                                   other arguments go to every training

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

names=(digits_baseline digits_HTM digits_VTM digits_HVTM)
folder=output/quickstart

fresh=false
arguments=()
for argument in "$@"; do
  if [ "$argument" = --fresh ]; then
    fresh=true
  else
    arguments+=("$argument")
  fi
done

bash run/setup.sh
unset PYTHONPATH PYTHONHOME
# Threads that wait for each other sleep instead of spinning: little is lost on an idle machine, and a
# lot is won where something else runs beside (docs/log.md).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
started=$SECONDS

# Shows a command of the project, then runs it.
python_m() {
  printf '\n$ python -m %s\n' "$*"
  .venv/bin/python -m "$@"
}

tell_how_to_go_on() {
  local status=$?
  [ "$status" -eq 0 ] || printf 'quickstart: stopped. %s %s\n' \
    "The same command again goes on from here;" "with --fresh it starts anew." >&2
}
trap tell_how_to_go_on EXIT

runs=()
for name in "${names[@]}"; do
  run=$folder/$name
  runs+=("$run")
  if $fresh; then rm -rf "$run"; fi
  # The odd expansions: an empty array is an unset variable to bash before 4.4.
  python_m experiments.train --config "configs/$name.yaml" --output "$run" \
    ${arguments[@]+"${arguments[@]}"}
  python_m experiments.evaluate --config "configs/$name.yaml" \
    --checkpoint "$run/final.safetensors" ${arguments[@]+"${arguments[@]}"}
done
python_m experiments.visualize --compare "${runs[@]}" --out "$folder"

seconds=$((SECONDS - started))
printf '\nquickstart: done in %d min %d s after set-up\n' $((seconds / 60)) $((seconds % 60))
