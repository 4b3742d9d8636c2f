#!/usr/bin/env bash
# quickstart.sh: installs the package, then runs both training stages, evaluation and chat on the tiny world:
# real images, small models, two ranks with DeepSpeed ZeRO-2 on the CPU; about ten minutes on two cores.
# What exists already is used again; delete runs/tiny to train anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_setup.sh demo
export GPUS_PER_NODE=2 CUDA_VISIBLE_DEVICES=
data=playground/data/tiny runs=runs/tiny
started=$SECONDS

step() { echo; echo "== [$((SECONDS - started)) s] $*"; }

step "the tiny world's data: three domains with train and test split, captions for stage 1"
llava-mole prepare tiny --out "$data"

train() { # train SCRIPT RUN: unless the run is finished
  if [ -f "$runs/$2/summary.json" ]; then echo "using $runs/$2 (delete it to train anew)"; return; fi
  bash "scripts/$1.sh" "configs/tiny/$2.yaml" --train.resume auto
}
step "stage 1: the projector on captions"
train pretrain pretrain
step "stage 2, baseline: plain LoRA on the mixture (LLaVA-Mix)"
train finetune_lora finetune_lora
step "stage 2: the mixture of LoRA experts on the same samples (LLaVA-MoLE)"
train finetune_mole finetune_mole

questions=() train_files=()
for domain in general document biomedicine; do
  questions+=("$domain=$data/$domain/test_questions.jsonl") train_files+=("$domain=$data/$domain/train.json")
done
evaluate() { # evaluate RUN: answers and scores on the test split, unless they are there
  local out="$runs/$1/eval/answers.jsonl"
  if [ -f "${out%.jsonl}.score.json" ]; then echo "using $out"; return; fi
  llava-mole eval "$runs/$1" --questions "${questions[@]}" --train-file "${train_files[@]}" --image-folder "$data" \
    --answers-file "$out" --conv-mode vicuna_v1 --max-new-tokens 16 --batch-size 128 --device cpu --overwrite
}
for run in pretrain finetune_lora finetune_mole; do
  step "evaluating $run on the disjoint test split"
  evaluate "$run"
done

step "result"
llava-mole report --out "$runs/report" --runs "stage1=$runs/pretrain/eval" "LLaVA-Mix=$runs/finetune_lora/eval" \
  "LLaVA-MoLE=$runs/finetune_mole/eval"
echo
echo "done in $((SECONDS - started)) s. Chat with it:"
echo "  python -m llava_mole.serve.cli --model-path $runs/finetune_mole --image-file $data/photos/chelsea.png"
