"""Measuring a model in the middle of its training without leaving a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llava_mole.model.language_model import decoder_layers
from llava_mole.model.llava_arch import LlavaMole
from llava_mole.mole.access import kept_routing


@contextmanager
def undisturbed(model: LlavaMole, seed: int = 0) -> Iterator[None]:
    """Put the model into the state in which it is measured; afterwards everything is as it was before, bit for bit.

    In the block there is no dropout and no noise: all modules are in evaluation mode. Layers whose activations are
    recomputed keep doing so, for which transformers asks that the layer itself is in training mode. Compiled layers run
    uncompiled. Random generators start from `seed`, which matters for the control router `random` only.

    Afterwards modes, random generators, routing inputs and the routers' slots are restored. Gradients that have been
    accumulated and counters for the balance loss are safe if the block takes gradients with `torch.autograd.grad`,
    which neither fills `.grad` nor runs the hooks of DDP and DeepSpeed, and if the model leaves the balance loss to its
    caller (`leave_balance_loss_to_caller`).
    """
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.compiler.set_stance("force_eager"),
        kept_routing(model.language_model),
    ):
        torch.manual_seed(seed)
        model.eval()
        for layer in decoder_layers(model.causal_lm):
            layer.training = getattr(layer, "gradient_checkpointing", False)
        try:
            yield
        finally:
            for module, trains in modes:
                module.training = trains
