"""One rank of `test_ranks.py`: trains, and writes what the rank really was to `<run>/rank-<n>.json`."""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from llava_mole.config import parse_run_config
from llava_mole.train.train import leave_process_group, train
from llava_mole.train.trainer import Trainer


def main() -> None:
    seen: dict[str, object] = {"ids": []}
    original_run, original_loss = Trainer.run, Trainer._loss

    def run(self: Trainer) -> None:
        engine = self.strategy.engine
        partitions = getattr(self.strategy.optimizer, "single_partition_of_fp32_groups", [])
        seen.update(
            engine=type(engine).__name__,
            zero_stage=engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
            world_size=dist.get_world_size(),
            accelerate_world_size=self.strategy.world_size,
            partition_elements=sum(flat.numel() for flat in partitions),
            trainable_elements=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        )
        original_run(self)

    def loss(self: Trainer, batch, global_tokens, stats):
        seen["ids"].append([self.progress.step, *batch["ids"]])
        return original_loss(self, batch, global_tokens, stats)

    Trainer.run, Trainer._loss = run, loss
    run_dir = train(parse_run_config(sys.argv[1:]))
    (Path(run_dir) / f"rank-{dist.get_rank()}.json").write_text(json.dumps(seen))
    leave_process_group()


if __name__ == "__main__":
    main()
