#!/usr/bin/env bash
# quickstart.sh: installs the package, then runs both training stages, evaluation and chat on the tiny world:
# real images, small models, two ranks with DeepSpeed ZeRO-2 on the CPU; about eleven minutes on two cores.
# What exists already is used again; delete runs/tiny to train anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_setup.sh demo
export GPUS_PER_NODE=2 CUDA_VISIBLE_DEVICES=
data=playground/data/tiny
stage1=runs/tiny/pretrain doc=runs/tiny/quickstart/llava_doc
mix=runs/tiny/quickstart/llava_mix mole=runs/tiny/quickstart/llava_mole
started=$SECONDS

step() { echo; echo "== [$((SECONDS - started)) s] $*"; }

train() { # train RUN_DIR SCRIPT CONFIG [OPTION...]: unless the run is finished
  local run=$1 script=$2 config=$3
  shift 3
  if [ -f "$run/summary.json" ]; then echo "using $run (delete it to train anew)"; return; fi
  bash "scripts/$script.sh" "configs/tiny/$config.yaml" --train.output_dir "$run" --train.resume auto "$@"
}

evaluate() { # evaluate RUN_DIR: answers and scores on the test split, unless they are there
  if [ -f "$1/eval/tiny.score.json" ]; then echo "using $1/eval"; return; fi
  OMP_NUM_THREADS=1 llava-mole eval "$1" --benchmarks tiny --conv-mode vicuna_v1 --batch-size 128 --overwrite
}

evaluate_two() { # evaluate_two RUN_DIR RUN_DIR: at once, on a core each; the second one's output goes to its folder
  step "evaluating $1 and $2 on the disjoint test split"
  evaluate "$2" > "$2/evaluation.log" 2>&1 &
  local second=$!
  evaluate "$1"
  wait "$second" || { cat "$2/evaluation.log"; exit 1; }
}

step "the tiny world's data: three domains with train and test split, captions for stage 1"
llava-mole prepare tiny --out "$data"
step "stage 1: the projector on captions"
train "$stage1" pretrain pretrain
# As many steps as give this domain the samples that it has in the mixture.
step "stage 2, baseline: plain LoRA on documents alone (LLaVA-Doc)"
train "$doc" finetune_lora finetune_lora --data.mixture.general 0 --data.mixture.biomedicine 0 --train.max_steps 100
step "stage 2, baseline: plain LoRA on the mixture (LLaVA-Mix)"
train "$mix" finetune_lora finetune_lora
step "stage 2: the mixture of LoRA experts on the same samples (LLaVA-MoLE)"
train "$mole" finetune_mole finetune_mole
evaluate_two "$stage1" "$doc"
evaluate_two "$mix" "$mole"
step "result: accuracy on the test questions in percent"
scores=eval/tiny.score.json report=runs/tiny/quickstart/report
llava-mole report --out "$report" --overwrite \
  --runs "stage1=$stage1/$scores" "LLaVA-Doc=$doc/$scores" "LLaVA-Mix=$mix/$scores" "LLaVA-MoLE=$mole/$scores" >/dev/null
echo
python scripts/quickstart_summary.py "$report"
echo
echo "done in $((SECONDS - started)) s. Next:"
echo "  llava-mole chat --model-path $mole --image-file $data/photos/chelsea.png"
echo "  pip install -e '.[serve]' && llava-mole serve $mole $mix"
echo "  llava-mole plot $mole"
