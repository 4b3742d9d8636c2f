# A container for training, evaluation and chat. Needs BuildKit (docker 23 or later), which builds the chosen base only.
#   docker build -t llava_mole .                             CPU
#   docker build --build-arg BASE=cuda -t llava_mole .       CUDA 13, with the compiler that DeepSpeed's kernels need
#   docker run --rm -it --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" llava_mole train configs/finetune_mole.yaml
#   docker run --rm -it -p 127.0.0.1:8000:8000 -v "$PWD:/work" llava_mole serve RUN --host 0.0.0.0   (keys: docs/serving.md)
# Data, weights and runs stay outside: /work is the caller's folder. Nothing runs as root.
ARG BASE=cpu

FROM python:3.12-slim-bookworm AS base-cpu
RUN apt-get update && apt-get install --yes --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*

FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS base-cuda
RUN apt-get update && apt-get install --yes --no-install-recommends g++ ninja-build python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM base-${BASE}
ARG EXTRAS=demo,eval,quant,serve,tensorboard
ENV PATH=/opt/venv/bin:$PATH VIRTUAL_ENV=/opt/venv \
    PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false \
    HOME=/home/user TORCH_EXTENSIONS_DIR=/home/user/torch_extensions
RUN python3 -m venv /opt/venv && useradd --create-home --uid 10001 user && chmod 1777 /home/user
# The packages come before the code, so that a change of the code does not install them again.
WORKDIR /opt/llava_mole
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY llava_mole/__init__.py llava_mole/__init__.py
RUN pip install --constraint constraints.txt --editable ".[${EXTRAS}]"
COPY configs configs
COPY scripts scripts
COPY playground/models/tiny playground/models/tiny
COPY llava_mole llava_mole
USER user
WORKDIR /work
ENTRYPOINT ["llava-mole"]
CMD ["--help"]
