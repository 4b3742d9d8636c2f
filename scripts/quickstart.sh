#!/usr/bin/env bash
# quickstart.sh: installs the package, then runs both training stages and evaluation on the tiny world, where three
# domains answer the same questions differently: real images, small models, two ranks with DeepSpeed ZeRO-2 on the CPU;
# about eight minutes on two cores. What exists already is used again; delete runs/tiny to train anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/_setup.sh demo
export GPUS_PER_NODE=2 CUDA_VISIBLE_DEVICES=
data=playground/data/tiny facts=playground/data/tiny-facts benchmark=configs/studies/benchmarks/tiny_facts_test.yaml
stage1=runs/tiny/pretrain doc=runs/tiny/quickstart/llava_doc
mix=runs/tiny/quickstart/llava_mix mole=runs/tiny/quickstart/llava_mole
scores=eval/tiny_facts_test.score.json report=runs/tiny/quickstart/report
started=$SECONDS

step() { echo; echo "== [$((SECONDS - started)) s] $*"; }

train() { # train RUN_DIR SCRIPT CONFIG [OPTION...]: goes on where the run stopped; a finished run stays as it is
  bash "scripts/$2.sh" "configs/tiny/$3.yaml" --train.output_dir "$1" --train.resume auto "${@:4}"
}

evaluate() { # evaluate RUN_DIR: answers and scores on the test split, unless they are there
  if [ -f "$1/$scores" ]; then echo "using $1/eval"; return; fi
  OMP_NUM_THREADS=1 llava-mole eval "$1" --benchmarks "$benchmark" --conv-mode vicuna_v1 --batch-size 128 --overwrite
}

in_background() { # in_background LOG COMMAND...: while the next command runs; `joined` waits for it
  log=$1
  "${@:2}" > "$log" 2>&1 &
  other=$!
}

joined() { wait "$other" || { cat "$log"; exit 1; }; }

step "the tiny world's data: captions for stage 1, and three domains with facts that they answer differently"
mkdir -p runs/tiny
in_background runs/tiny/prepare.log llava-mole prepare tiny --out "$data"
llava-mole prepare tiny --facts 64 --convention 1 --out "$facts"
joined
step "stage 1: the projector on captions"
train "$stage1" pretrain pretrain
# As many steps as the mixture, with the samples that this domain has in it.
step "stage 2, baseline: plain LoRA on documents alone (LLaVA-Doc)"
train "$doc" finetune_lora finetune_lora_facts \
  --data.mixture.general 0 --data.mixture.biomedicine 0 --train.global_batch_size 11
step "stage 2, baseline: plain LoRA on the mixture (LLaVA-Mix)"
train "$mix" finetune_lora finetune_lora_facts
step "stage 2: the mixture of LoRA experts on the same samples (LLaVA-MoLE)"
train "$mole" finetune_mole finetune_mole_facts
step "evaluating the three runs on the facts of the disjoint test images"
in_background "$mix/evaluation.log" evaluate "$mix"
evaluate "$mole"
joined
evaluate "$doc"
step "result: accuracy on the test questions in percent"
llava-mole report --out "$report" --overwrite \
  --runs "LLaVA-Doc=$doc/$scores" "LLaVA-Mix=$mix/$scores" "LLaVA-MoLE=$mole/$scores" >/dev/null
echo
python scripts/quickstart_summary.py "$report"
echo
echo "done in $((SECONDS - started)) s. Next:"
echo "  llava-mole chat --model-path $mole --image-file $data/photos/chelsea.png"
echo "  pip install -e '.[serve]' && llava-mole serve $mole $mix"
echo "  llava-mole plot $mole"
