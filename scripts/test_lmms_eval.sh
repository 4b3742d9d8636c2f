#!/usr/bin/env bash
# Runs lmms-eval's own command line on a checkpoint of this project and the tiny world's task, and compares its answers
# with ours: bash scripts/test_lmms_eval.sh [RUN]. LIMIT=24 questions of it (-1: all 6,289). lmms-eval pins and drags in a lot, so it has
# an environment of its own, .venv-lmms-eval (or the one LMMS_EVAL_PYTHON names). Not part of the test suite.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
run=${1:-runs/tiny/quickstart/llava_mole} limit=${LIMIT:-24} out=runs/lmms_eval
python=${LMMS_EVAL_PYTHON:-.venv-lmms-eval/bin/python}
# lmms-eval 0.7 imports filelock._api, which filelock 4 no longer has.
if [ -z "${LMMS_EVAL_PYTHON:-}" ] && ! "$python" -c 'import lmms_eval, filelock._api' 2>/dev/null; then
  echo "== making the environment .venv-lmms-eval with lmms-eval (about 7 GB, some minutes)"
  python3 -m venv .venv-lmms-eval
  "$python" -m pip install --quiet --disable-pip-version-check --editable ".[demo]" "lmms-eval>=0.7.3,<0.8" "filelock<4"
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled
[ -d playground/data/tiny ] || "$python" -m llava_mole.cli prepare tiny --out playground/data/tiny
if [ ! -d "$run" ]; then
  echo "== $run is not there: training a few steps instead"
  run=$out/finetune
  [ -d "$run" ] || "$python" -m llava_mole.train.train configs/tiny/finetune_mole.yaml --train.output_dir "$run" \
    --train.max_steps 10 --projector_weights null --device cpu
fi
rm -rf "$out/results"
echo "== lmms-eval $("$python" -c 'from importlib.metadata import version; print(version("lmms-eval"))')"
"$python" -m lmms_eval --model llava_mole --model_args "pretrained=$run,device=cpu" --tasks llava_mole_tiny \
  --include_path llava_mole/eval/lmms_eval --limit "$limit" --batch_size 8 --log_samples --output_path "$out/results"
"$python" - "$run" "$out/results" <<'PY'
import json
import sys
from pathlib import Path

from llava_mole.eval.benchmarks.benchmark import load_questions
from llava_mole.eval.benchmarks.registry import get_benchmark
from llava_mole.inference.predictor import Predictor

run, results = sys.argv[1:]
(samples,) = Path(results).rglob("*samples_llava_mole_tiny.jsonl")
theirs = [json.loads(line) for line in samples.read_text().splitlines()]
loaded = load_questions(get_benchmark("tiny"))
asked = [loaded.questions[sample["doc_id"]] for sample in theirs]
images = [[loaded.image_folder / image for image in question.images] for question in asked]
ours = Predictor.from_pretrained(run, device="cpu").generate(images, [q.text for q in asked], max_new_tokens=16)
given = [r if isinstance(r := sample["filtered_resps"], str) else r[0] for sample in theirs]
if given != ours:
    sys.exit(f"lmms-eval's answers differ from ours: {given} {ours}")
print(f"the {len(ours)} answers equal those of llava_mole's own runner, such as {ours[:6]}")
PY
