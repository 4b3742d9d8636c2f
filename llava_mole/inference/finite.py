"""Finds models that compute NaN or infinity: what they generate looks like an answer.

Logits are checked at every step, on their own device. On a GPU the result is read once per batch, so the check adds no
synchronisation per token. A second forward pass finds the module where the fault begins.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from llava_mole.common.errors import PromptError
from llava_mole.data.anyres import join_tiles
from llava_mole.inference.batching import Batch, encode_tiles, read_tiles
from llava_mole.inference.decoding import RowStop
from llava_mole.inference.inputs import as_images
from llava_mole.model.builder import LoadedModel
from llava_mole.mole import collect_routing


class FiniteCheck:
    """A logits processor for transformers that changes nothing and remembers rows whose logits are not finite.

    It must be the first processor: later ones set logits to minus infinity. With `at_once` it raises
    FloatingPointError at the first such row; without, `bad_R` is to be read in the end.
    """

    def __init__(self, at_once: bool) -> None:
        self._at_once = at_once
        self.bad_R: torch.Tensor | None = None
        """bool [R], the rows seen to be not finite; with beams, a prompt has several rows."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` [R, V] as they are."""
        self.note(~scores.isfinite().all(dim=-1))
        return scores

    def note(self, bad_R: torch.Tensor) -> None:
        """Add what else is known about the rows, bool [R]. Raises FloatingPointError if a row is bad and `at_once`."""
        self.bad_R = bad_R if self.bad_R is None else self.bad_R | bad_R
        if self._at_once and bool(bad_R.any()):
            raise FloatingPointError("the logits are not finite")


@contextmanager
def finite_outputs(
    loaded: LoadedModel, batch: Batch, stop: RowStop | None = None, *, at_once: bool = False
) -> Iterator[FiniteCheck]:
    """Check what the model computes for a batch inside the block, which gives its logits to the object yielded.

    Args:
        stop: The generation's stopping criterion, which knows the ids generated so far.
        at_once: Raise at the first faulty step on a GPU too, which then waits at every step.

    Raises:
        PromptError: the model computed NaN or infinity for a prompt. It names the first module where that appears.
    """
    check = FiniteCheck(at_once or _reads_every_step(loaded.model.device))
    try:
        yield check
        _note_routers(loaded, check)
    except FloatingPointError:  # of the check, or of MoLE's routers, which do not know the row
        raise _explain(loaded, batch, check, stop) from None
    if check.bad_R is not None and bool(check.bad_R.any()):
        raise _explain(loaded, batch, check, stop)


def _reads_every_step(device: torch.device) -> bool:
    return device.type == "cpu"


def _note_routers(loaded: LoadedModel, check: FiniteCheck) -> None:
    """Look at the routers' logits of the last step: the experts chosen from NaN compute finite values."""
    if loaded.adapter == "mole" and (logits := collect_routing(loaded.model.language_model).logits):
        check.note(torch.stack([~logits_RSK.isfinite().flatten(1).all(dim=1) for logits_RSK in logits]).any(dim=0))


def _explain(loaded: LoadedModel, batch: Batch, check: FiniteCheck, stop: RowStop | None) -> PromptError:
    """The error about the first faulty prompt of a batch."""
    new_ids_RN = batch.input_ids[:, :0] if stop is None or stop.new_ids_RN is None else stop.new_ids_RN
    beams = new_ids_RN.shape[0] // len(batch.members)
    bad: list[int] = []
    if check.bad_R is not None:
        bad = check.bad_R.view(len(batch.members), -1).any(dim=1).nonzero().flatten().tolist()
    for row in bad or range(len(batch.members)):
        ids_L = torch.cat([batch.input_ids[row][batch.attention_mask[row]], new_ids_RN[row * beams]])
        if found := _first_module(loaded, ids_L, batch, row):
            return PromptError(batch.members[row], f"the model computes NaN or infinity for it, first in {found}")
    row = (bad or [0])[0]
    return PromptError(
        batch.members[row],
        "the model computed NaN or infinity for it, but not again when it was asked alone; use float32, or look "
        "for a faulty device",
    )


def _first_module(loaded: LoadedModel, ids_L: torch.Tensor, batch: Batch, row: int) -> str | None:
    """The first module that computes what is not finite for one row, and what that means; None if there is none."""
    model = loaded.model
    running: list[nn.Module] = []
    found: list[nn.Module] = []

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()
        if not found and not _is_finite(output):
            # If its input is not finite either, the code around it is at fault: a product or sum of the module outside.
            found.append(running[-1] if running and not _is_finite(args) else module)

    images = as_images(batch.images[row])
    with ExitStack() as hooks, torch.inference_mode():
        for module in model.modules():
            for handle in (module.register_forward_pre_hook(enter), module.register_forward_hook(leave)):
                hooks.callback(handle.remove)
        try:
            features = index = None
            if images:
                shown = join_tiles([read_tiles(loaded, image, batch.members[row]) for image in images])
                features, index = encode_tiles(model, shown), shown.shows
            inputs_1LD = model.embed(ids_L[None], features=features, feature_index=index)
            model.causal_lm(inputs_embeds=inputs_1LD, use_cache=False, logits_to_keep=1)
        except FloatingPointError:
            found = found or running[-1:]
    return _describe(model, found[0]) if found else None


def _is_finite(output: Any) -> bool:
    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(output.isfinite().all())
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return all(map(_is_finite, parts))


def _describe(model: nn.Module, module: nn.Module) -> str:
    name = next(name for name, other in model.named_modules() if other is module)
    bad = [key for key, value in module.named_parameters() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        return (
            f"{name}, whose {bad[0]} holds NaN or infinity; the checkpoint or its base model is damaged or from a "
            "diverged training, so use another one"
        )
    return (
        f"{name}, whose parameters are finite; with another dtype than float32, try float32, otherwise use another "
        "checkpoint"
    )
