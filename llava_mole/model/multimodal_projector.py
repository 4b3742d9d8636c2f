"""The projector from vision features to the language model's embedding space."""

import re

from torch import nn

from llava_mole.errors import ConfigError


def build_projector(kind: str, vision_size: int, hidden_size: int) -> nn.Sequential:
    """Projector [.., vision_size] -> [.., hidden_size].

    Args:
        kind: `linear`, or `mlp<N>x_gelu`: N linear layers with exact GELU in between. The state keys are LLaVA's
            (`0.weight`, `0.bias`, `2.weight`, ...).

    Raises:
        ConfigError: `kind` is neither.
    """
    if kind == "linear":
        return nn.Sequential(nn.Linear(vision_size, hidden_size))
    match = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    if match is None:
        raise ConfigError(f"model.projector {kind!r}: allowed are 'linear' and 'mlp<N>x_gelu', as in 'mlp2x_gelu'")
    layers: list[nn.Module] = [nn.Linear(vision_size, hidden_size)]
    for _ in range(int(match[1]) - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
