#!/usr/bin/env bash
# Runs PEFT's own tests with MoLE: bash scripts/test_peft_suite.sh PEFT_CHECKOUT [BLOCK...] [options of pytest].
# PEFT_CHECKOUT is a clone of https://github.com/huggingface/peft at the installed version; it is only read. The blocks
# are decoder, encoder-decoder and custom (all, if none is named). Options: --variant NAME (may be repeated),
# --report FILE, -n 2, -k EXPRESSION. Models are made on the spot, so no network is needed. The exit code is not 0 if a
# test does not pass that scripts/peft_suite/exceptions.yaml does not list, or if it lists one that passes. Not part of
# the test suite.
set -euo pipefail
checkout=${1:?usage: bash scripts/test_peft_suite.sh PEFT_CHECKOUT [BLOCK...] [options of pytest]}
shift
checkout=$(cd "$checkout" && pwd)
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$scripts/../.venv/bin/python
[ -x "$python" ] || python=$(command -v python)
files=()
while [ $# -gt 0 ]; do
  case $1 in
    decoder) files+=("$checkout/tests/test_decoder_models.py") ;;
    encoder-decoder) files+=("$checkout/tests/test_encoder_decoder_models.py") ;;
    custom) files+=("$checkout/tests/test_custom_models.py") ;;
    *) break ;;
  esac
  shift
done
[ ${#files[@]} -gt 0 ] || files=("$checkout"/tests/test_{decoder,encoder_decoder,custom}_models.py)
options=("$@")
for i in "${!options[@]}"; do # a relative path of the report is one from here
  if [ "${options[i]}" = --report ]; then options[i + 1]=$(realpath -m "${options[i + 1]}"); fi
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONPATH=$scripts:$scripts/.. PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -m peft_suite.models . >"$work/models.log" 2>&1 || { cat "$work/models.log"; exit 1; }
"$python" -m pytest -p peft_suite.plugin -p no:cacheprovider --rootdir "$checkout" -c "$checkout/pyproject.toml" \
  -o addopts= -o filterwarnings= -q --tb=line --disable-warnings "${options[@]}" "${files[@]}"
