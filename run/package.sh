#!/usr/bin/env bash
# Builds the wheel and the source distribution into dist/, then proves them as users meet them: the wheel alone in
# a fresh environment, outside the checkout, without a compiler, runs the examples; the source distribution,
# unpacked elsewhere, runs tests of its own.
#
#   bash run/package.sh

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"

bash run/setup.sh
unset PYTHONPATH PYTHONHOME
root=$PWD
uv=$root/.venv/bin/uv
python=$root/.venv/bin/python
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

rm -rf dist
"$uv" build --quiet --build-constraints constraints.txt --python "$python" --out-dir dist .
wheel=$(ls dist/tokenmixup-*-py3-none-*.whl)
sdist=$(ls dist/tokenmixup-*.tar.gz)

# The wheel: PATH has no compiler, and nothing of the checkout is in reach.
mkdir "$folder/elsewhere"
cp -r examples "$folder/elsewhere"
cd "$folder/elsewhere"
"$uv" venv --quiet --python "$python" .venv
CC=/nowhere/cc "$uv" pip install --quiet --python .venv/bin/python --constraints "$root/constraints.txt" --only-binary :all: \
  "tokenmixup[timm,transformers] @ file://$root/$wheel" scikit-learn torchvision
(
  export PATH=$folder/elsewhere/.venv/bin HF_HUB_OFFLINE=1
  tokenmixup
  python -c 'import tokenmixup.models, timm; timm.create_model("cct_7_3x1_32")'
  for example in examples/*.py; do
    [ "$example" = examples/digits.py ] || python "$example"
  done
)

# The source distribution, by the environment of the checkout: the folder's own code comes first.
mkdir "$folder/source"
tar -xzf "$root/$sdist" --strip-components 1 -C "$folder/source"
cd "$folder/source"
"$python" -m pytest -q -n 0 -p no:cacheprovider tests/tokenmixup/test_functional.py tests/tokenmixup/test_golden_functional.py \
  tests/experiments/test_golden_evaluate.py
"$python" -m pytest -q -n 0 -p no:cacheprovider --collect-only tests >/dev/null
echo "package: $wheel and $sdist are in dist/"
