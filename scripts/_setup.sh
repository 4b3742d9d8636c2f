#!/usr/bin/env bash
# Sourced by quickstart.sh and test.sh: an environment with the package and the extras named in $1 (such as demo).
# Uses the environment that is active, else .venv, made on first use. Versions are those of constraints.txt.
# Does nothing where they are installed already. Needs python3 (3.10-3.13), pip and a C++ compiler.
extras=$1
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    echo "== making the environment .venv with $(python3 --version)"
    python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' ||
      { echo "python3 is $(python3 --version); Python 3.10 to 3.13 is needed" >&2; exit 2; }
    python3 -m venv .venv
  fi
  source .venv/bin/activate
fi
command -v c++ >/dev/null || command -v g++ >/dev/null ||
  { echo "no C++ compiler (c++ or g++) is on PATH; DeepSpeed needs one (Debian: apt-get install g++)" >&2; exit 2; }

stamp=$(python -c 'import sys; print(sys.prefix)')/.llava_mole-$extras
wanted=$(cat pyproject.toml constraints.txt <(pwd) | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "== installing llava_mole[$extras] and what it needs into $(python -c 'import sys; print(sys.prefix)') (about 6 GB with PyTorch, some minutes)"
  python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
  echo "$wanted" > "$stamp"
fi

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$PWD/.cache/torch_extensions}
if ! compgen -G "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/*.so" > /dev/null; then
  echo "== compiling DeepSpeed's communication for CPU ranks (a minute or two, once)"
  DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= python -W ignore -c \
    "from deepspeed.accelerator import get_accelerator as a; a().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
fi
