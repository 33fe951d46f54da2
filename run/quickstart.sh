#!/usr/bin/env bash
# Trains four small models on real images, plain and with HTM, VTM and both, two at a time, then prints a table
# and draws what was mixed. Needs no GPU and, after set-up, no network.
#
#   bash run/quickstart.sh                          resumes an interrupted call; finished trainings are kept
#   bash run/quickstart.sh --fresh                  deletes the trainings of earlier calls
#   bash run/quickstart.sh --fresh --schedule.epochs 1
#                                                   other arguments go to every training

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

folder=output/quickstart
seed=1

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
started=$SECONDS

# Shows a command of the project, then runs it.
python_m() {
  printf '\n$ python -m %s\n' "$*"
  .venv/bin/python -m "$@"
}

# Two trainings at a time, each on one thread: this takes less time than one after the other on two.
study() {
  # Before bash 4.4 an empty array is an unset variable, hence ${…+…}.
  python_m experiments.study --study configs/studies/digits.yaml --seed "$seed" --jobs 2 \
    --output "$folder" --results "$folder/results" "$@" ${arguments[@]+"${arguments[@]}"}
}

tell_how_to_resume() {
  local status=$?
  [ "$status" -eq 0 ] || printf 'quickstart: stopped. %s %s\n' \
    "The same command resumes it;" "with --fresh it starts over." >&2
}
trap tell_how_to_resume EXIT

if $fresh; then rm -rf "$folder"; fi
weights=$folder/digits/HTM-VTM/seed$seed/final.safetensors
study --only 'plain, HTM + VTM'
python_m experiments.visualize --config configs/digits_HVTM.yaml --checkpoint "$weights" \
  --out "$folder/pictures"
study
runs=()
for variant in plain HTM VTM HTM-VTM; do runs+=("$folder/digits/$variant/seed$seed"); done
python_m experiments.visualize --compare "${runs[@]}" --out "$folder/comparison"

seconds=$((SECONDS - started))
cat <<END

quickstart: done in $((seconds / 60)) min $((seconds % 60)) s after set-up
look at $folder/pictures/tokenmixup.png, then try one of

  . .venv/bin/activate
  python examples/timm_ten_lines.py                      # TokenMixup on a model of timm
  python -m experiments.train --config configs/digits_HTM.yaml --horizontal.tau 0.1
  python -m experiments.visualize --config configs/digits_HVTM.yaml --checkpoint $weights \\
    --images FOLDER --animate                            # what it does to your own images
END
