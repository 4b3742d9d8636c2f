"""A short, cheap identity of a set of weights; it prevents an adapter from being used on the wrong base model."""

import hashlib
from collections.abc import Iterable

import torch

_SAMPLES = 64


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hex digest over the names, shapes and up to 64 evenly spaced values of every tensor.

    Args:
        tensors: `(name, tensor)` pairs in any order, in the dtype they are stored in. Values are read as float32,
            so a file in half precision and its float32 copy have the same fingerprint. Quantised weights do not:
            call this before quantising.
    """
    return fingerprint_in_order(sorted(tensors, key=lambda pair: pair[0]))


def fingerprint_in_order(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`fingerprint` of pairs already sorted by name, which may be generated one at a time."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name}:{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        stride = max(1, flat.numel() // _SAMPLES)
        digest.update(flat[::stride][:_SAMPLES].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]
