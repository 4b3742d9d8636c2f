"""A short identifier of a base model: the same after loading it in another float precision or quantized."""

import hashlib

import torch
from torch import nn

_SAMPLE = 64


def base_fingerprint(model: nn.Module) -> str | None:
    """sha256 (16 hex digits) over shapes and a sample of the embedding and of every one-dimensional float parameter.

    Those stay unquantized in 4-bit and 8-bit models, and their values are compared after rounding to bfloat16.
    None where weights cannot be read (meta device, parameters partitioned over ranks).
    """
    digest = hashlib.sha256()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    named = [] if embedding is None else [("embedding", next(embedding.parameters(), None))]
    named += [(name, p) for name, p in model.named_parameters() if "mole_" not in name and p.dim() == 1]
    for name, parameter in named:
        if parameter is None or not parameter.is_floating_point():
            continue
        if parameter.device.type == "meta" or parameter.numel() == 0:
            return None
        digest.update(f"{name.replace('base_layer.', '')}:{tuple(parameter.shape)[-1]}".encode())
        sample = parameter.detach().flatten()[:_SAMPLE].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
