#!/usr/bin/env bash
# Redraws the pictures of README.md and docs/pictures.md: trains six small models on a CPU (a quarter of an
# hour on two busy cores; finished trainings are kept), draws them, and copies the figures to docs/figures.
# `python -m benchmarks.report` makes the pictures of docs/performance.md, and
# `python -m experiments.study --study FILE --report` those of docs/results.md, each from its records.
#
#   bash run/figures.sh

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

folder=output/figures
variants=(HVTM baseline)
seeds=(42 1 2)

bash run/setup.sh
unset PYTHONPATH PYTHONHOME
# A floating-point sum depends on its order: on the CPU with one thread the order is fixed, so that every
# machine of one kind draws the same figures.
export CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1

# Shows a command of the project, then runs it.
python_m() {
  printf '\n$ python -m %s\n' "$*"
  .venv/bin/python -m "$@"
}

runs=()
for variant in "${variants[@]}"; do
  for seed in "${seeds[@]}"; do
    run=$folder/digits_${variant}_seed$seed
    runs+=("$run")
    python_m experiments.train --config "configs/digits_$variant.yaml" --seed "$seed" \
      --output "$run"
  done
done

# The images last: both commands write tokenmixup.png, and the documents show the one of eight images.
python_m experiments.visualize --compare "${runs[@]}" --out "$folder"
python_m experiments.visualize --config configs/digits_HVTM.yaml \
  --checkpoint "$folder/digits_HVTM_seed${seeds[0]}/final.safetensors" --out "$folder" --animate

mkdir -p docs/figures
cp "$folder"/*.png "$folder"/*.gif docs/figures/
printf '\nfigures: in docs/figures; look at each of them before you commit it\n'
