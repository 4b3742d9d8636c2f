"""What can be switched on for the language model's layers: recomputation of activations, and compilation."""

from typing import Any, Literal

from llava_mole.common.errors import ConfigError

Recompute = Literal["none", "every_n", "all"]


def decoder_layers(causal_lm: Any) -> list[Any]:
    """The decoder layers of a transformers causal LM, in order.

    Raises:
        ConfigError: the architecture keeps them in no known place.
    """
    decoder = causal_lm.get_decoder()
    for name in ("layers", "h"):
        if hasattr(decoder, name):
            return list(getattr(decoder, name))
    raise ConfigError(f"{type(causal_lm).__name__} keeps its layers in no known place")


def set_recompute(causal_lm: Any, policy: Recompute, every: int) -> None:
    """Recompute activations in the backward pass: in no layer, in layers 0, n, 2n, ..., or in all.

    Always non-re-entrant: the re-entrant kind would silently give the router no gradient from the balance loss.
    """
    if policy == "none":
        return
    causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = decoder_layers(causal_lm)
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = policy == "all" or index % every == 0


def compile_layers(causal_lm: Any, backend: str = "inductor") -> None:
    """Compile every decoder layer by itself, for lengths that vary: one compilation serves all layers and steps."""
    for layer in decoder_layers(causal_lm):
        layer.compile(dynamic=True, backend=backend)
