#!/usr/bin/env bash
# Makes the pictures of README.md and docs/pictures.md anew: trains six small models on a CPU (a quarter of
# an hour on two busy cores; what is trained already is kept), draws them, and copies them to docs/figures.
# Those of docs/performance.md are made by `python -m benchmarks.report`, those of docs/results.md by
# `python -m experiments.study --study FILE --report`, each from its records.
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
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # as in run/quickstart.sh
# A sum of floating-point numbers depends on how it is shared out: on the CPU and with one thread it is
# the same on every machine of one kind, and so are the figures.
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

python_m experiments.visualize --config configs/digits_HVTM.yaml \
  --checkpoint "$folder/digits_HVTM_seed${seeds[0]}/final.safetensors" --out "$folder" --animate
python_m experiments.visualize --compare "${runs[@]}" --out "$folder"

mkdir -p docs/figures
cp "$folder"/*.png "$folder"/*.gif docs/figures/
printf '\nfigures: in docs/figures; look at each of them before you commit it\n'
