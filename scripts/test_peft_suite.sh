#!/usr/bin/env bash
# Runs PEFT's own tests with MoLE: bash scripts/test_peft_suite.sh PEFT_CHECKOUT [BLOCK...] [options of pytest].
# PEFT_CHECKOUT is a clone of https://github.com/huggingface/peft, ideally at the installed version; it is only read.
# Blocks: decoder, encoder-decoder, custom (default: all). Options: --variant NAME (may be repeated), --report FILE,
# --exceptions FILE, -n 2, -k EXPRESSION. The models are made on the spot, so no network is needed. The exit code is not
# 0 if a test that scripts/peft_suite/exceptions.yaml does not list does not pass, or if an entry there is no longer
# needed. Not part of the test suite.
set -euo pipefail
scripts=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=python
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$scripts/../.venv/bin/python" ]; then
  python=$scripts/../.venv/bin/python
fi
checkout=$(realpath "${1:-}" 2>/dev/null) || checkout=
if [ ! -f "$checkout/tests/testing_common.py" ]; then
  echo "usage: bash scripts/test_peft_suite.sh PEFT_CHECKOUT [BLOCK...] [options of pytest]; '${1:-}' is no checkout of PEFT" >&2
  exit 2
fi
shift
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
for i in "${!options[@]}"; do # files are named from here, but the tests run in a directory of their own
  case ${options[i]} in --report | --exceptions) options[i + 1]=$(realpath -m "${options[i + 1]}") ;; esac
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONPATH=$scripts:$(dirname "$scripts") PYTHONDONTWRITEBYTECODE=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -m peft_suite.models . >models.log 2>&1 || { cat models.log >&2; exit 1; }
"$python" -m pytest -p peft_suite.plugin -p no:cacheprovider --rootdir "$checkout" -c "$checkout/pyproject.toml" \
  -o addopts= -o filterwarnings= -q --tb=line --disable-warnings "${options[@]}" "${files[@]}"
