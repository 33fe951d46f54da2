#!/usr/bin/env bash
# Trains and evaluates four small models on real images, plain and with HTM, VTM and both, then
# prints a table and draws the mixed images. Needs no GPU and, after set-up, no network.
#
#   bash run/quickstart.sh                          resumes an interrupted call; finished trainings are kept
#   bash run/quickstart.sh --fresh                  deletes the trainings of earlier calls
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
# Waiting threads sleep instead of spinning: this costs little on an idle machine and saves much on a busy
# one (docs/log.md).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
started=$SECONDS

# Shows a command of the project, then runs it.
python_m() {
  printf '\n$ python -m %s\n' "$*"
  .venv/bin/python -m "$@"
}

tell_how_to_resume() {
  local status=$?
  [ "$status" -eq 0 ] || printf 'quickstart: stopped. %s %s\n' \
    "The same command resumes it;" "with --fresh it starts over." >&2
}
trap tell_how_to_resume EXIT

runs=()
for name in "${names[@]}"; do
  run=$folder/$name
  runs+=("$run")
  if $fresh; then rm -rf "$run"; fi
  # Before bash 4.4 an empty array is an unset variable, hence ${…+…}.
  python_m experiments.train --config "configs/$name.yaml" --output "$run" \
    ${arguments[@]+"${arguments[@]}"}
  python_m experiments.evaluate --config "configs/$name.yaml" \
    --checkpoint "$run/final.safetensors" ${arguments[@]+"${arguments[@]}"}
done
python_m experiments.visualize --compare "${runs[@]}" --out "$folder"

seconds=$((SECONDS - started))
printf '\nquickstart: done in %d min %d s after set-up\n' $((seconds / 60)) $((seconds % 60))
