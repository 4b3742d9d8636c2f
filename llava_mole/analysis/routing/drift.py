"""How the routers of one checkpoint differ from those of another on the same tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llava_mole.analysis.routing.tokens import RoutedTokens
from llava_mole.common.errors import CheckpointError
from llava_mole.config import load_config
from llava_mole.model.builder import CONFIG_FILE, PROJECTOR_FILE, load_adapter_state, load_projector
from llava_mole.model.checkpoint import read_manifest
from llava_mole.model.llava_arch import LlavaMole


@contextmanager
def weights_of(model: LlavaMole, checkpoint: Path, own: Path) -> Iterator[None]:
    """Let the model of checkpoint `own` have adapter and projector of another checkpoint inside the block.

    Afterwards it has its own, bit for bit.

    Raises:
        CheckpointError: the other one was trained on another base, or has another adapter.
    """
    there, here = read_manifest(checkpoint), read_manifest(own)
    if there["fingerprints"] != here["fingerprints"]:
        raise CheckpointError(f"{checkpoint} was trained on another base than {own}; their routers cannot be compared")
    then, now = (vars(load_config(path / CONFIG_FILE).adapter) for path in (checkpoint, own))
    if different := [f"{key} {then[key]!r} there, {now[key]!r} here" for key in now if then[key] != now[key]]:
        raise CheckpointError(f"{checkpoint} has another adapter than {own}: {'; '.join(different)}")
    parts = (".mole_", ".modules_to_save.", ".trainable_tokens")
    kept = {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name.startswith("projector.") or any(part in name for part in parts)
    }
    try:
        load_adapter_state(model, checkpoint)
        load_projector(model.projector, checkpoint / PROJECTOR_FILE)
        yield
    finally:
        model.load_state_dict(kept, strict=False)


def describe_drift(before: RoutedTokens, now: RoutedTokens) -> dict[str, Any]:
    """Plain values by router: `changed`, the share of tokens with another expert, and `kl`, in nats.

    `kl` is the mean over tokens of `KL(p before || p now)`; 0 where the router computes no probabilities.
    """
    kl = [
        float((old.exp() * (old - new)).nan_to_num().sum(dim=-1).double().mean())
        for old, new in zip(before.logprobs, now.logprobs, strict=True)
    ]
    changed = (before.expert != now.expert).double().mean(dim=1)
    return {"changed": changed.tolist(), "kl": kl, "changed_in_all": float(changed.mean())}


def same_tokens(one: RoutedTokens, other: RoutedTokens) -> bool:
    """Whether both describe the same tokens in the same order."""
    return one.names == other.names and torch.equal(one.sample, other.sample)
