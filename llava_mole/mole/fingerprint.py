"""Whether an adapter is loaded on the base model it was trained on.

The fingerprint holds a few values of every base parameter, so two copies of a model in different precisions can be
compared within their rounding. A hash could not do that: float16 and bfloat16 round the same float32 value differently.
"""

import hashlib
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn

from llava_mole.mole.discover import base_modules

_VALUES = 4
"""Values taken of each parameter."""
_PARAMETERS = 512
"""Parameters covered at most; of a model with more, every n-th."""
_EXACT, _COARSE = ".", "~"
"""Kind of a record: values that were only rounded, or values that were quantised to 8 bits or fewer."""
_ROUNDING = 2**-7
"""Largest relative difference of two roundings of a value to bfloat16 (2^-9 each), with a margin of two."""
_SMALLEST = 2**-23
"""float16 rounds to multiples of 2^-24."""
_CORRELATION = 0.9
"""Least correlation of quantised values with the originals. 4 bits keep 0.99; another model has about 0."""
_ENOUGH = 8
"""Values needed for a correlation."""

Records = dict[str, tuple[str, list[float]]]
"""Checksum of a parameter's name -> kind and values."""


def base_fingerprint(model: nn.Module) -> str | None:
    """The fingerprint of the base model in `model`, without adapters and the trained copies of `modules_to_save`.

    One word for each parameter: the CRC-32 of its name, `.` (or `~` for quantised values), and its values in bfloat16,
    all hexadecimal. Parameters that cannot be read (meta device, partitioned over ranks, merged with an adapter,
    integers of an unknown meaning) are left out; None if that leaves nothing.
    """
    named = list(_weights(model))
    step = -(-len(named) // _PARAMETERS) or 1
    words = []
    for name, weight, kind in named[::step]:
        bits = "".join(f"{value & 0xFFFF:04x}" for value in _sample(weight).view(torch.int16).tolist())
        words.append(f"{zlib.crc32(name.encode()):08x}{kind}{bits}")
    return " ".join(words) or None


def same_base(recorded: str, model: nn.Module) -> bool:
    """Whether `model` has the base model whose fingerprint was `recorded`; True if its weights cannot be read.

    Fingerprints of 16 digits come from earlier versions and are compared by their rule.
    """
    if len(recorded) == 16:
        found = _earlier_fingerprint(model)
        return found is None or found == recorded
    here = base_fingerprint(model)
    if here is None:
        return True
    then, now = _read(recorded), _read(here)
    common = [key for key in then if key in now]
    if 2 * len(common) < min(len(then), len(now)):
        return False
    coarse: list[tuple[float, float]] = []
    for key in common:
        (kind, a), (other, b) = then[key], now[key]
        if len(a) != len(b):
            return False
        if _COARSE in (kind, other):
            scale = max(map(abs, a)) or 1.0
            coarse += [(x / scale, y / scale) for x, y in zip(a, b, strict=True)]
        elif any(not abs(x - y) <= _ROUNDING * max(abs(x), abs(y)) + _SMALLEST for x, y in zip(a, b, strict=True)):
            return False
    return len(coarse) < _ENOUGH or _correlation(coarse) > _CORRELATION


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Name, values and kind of every base parameter that can be read; those of unknown tensor classes cannot."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    seen = {id(p) for layer in layers if layer.merged for p in layer.get_base_layer().parameters()}
    for path, module in base_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{path}.{name}".replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "").removeprefix(".")
            if parameter.device.type == "meta" or parameter.numel() == 0:
                continue
            kind, is_float = type(parameter), parameter.is_floating_point() and parameter.element_size() > 1
            if is_float and (kind is nn.Parameter or kind.__name__ in ("Params4bit", "Int8Params")):
                yield full, parameter.detach(), _EXACT
            elif kind.__name__ == "Params4bit":
                yield full, dequantize_bnb_weight(parameter).detach(), _COARSE
            elif kind.__name__ == "Int8Params":
                values = _from_int8(parameter, module)
                if values is not None:
                    yield full, values, _COARSE
            elif kind.__module__.startswith("torchao."):
                yield full, parameter.detach().dequantize(), _COARSE


def _from_int8(parameter: Any, module: Any) -> Tensor | None:
    """The values of bitsandbytes' 8-bit weight. PEFT's function for it would change the module's state."""
    scale = parameter.SCB if parameter.SCB is not None else module.state.SCB
    return None if scale is None else parameter.data * (scale.to(parameter.device).unsqueeze(-1) / 127)


def _sample(weight: Tensor) -> Tensor:
    """bfloat16 values spread over a parameter. New rows at its end, as of a resized embedding, change nothing."""
    rows = 1 << (weight.shape[0].bit_length() - 1) if weight.dim() else 1
    size = rows * (weight[0].numel() if weight.dim() else 1)
    index = (torch.arange(_VALUES, device=weight.device) * 2 + 1) * size // (2 * _VALUES)
    return weight.flatten()[index].to("cpu", torch.bfloat16)


def _read(fingerprint: str) -> Records:
    """The records of a fingerprint. Raises ValueError if it is not a fingerprint."""
    records = {}
    for word in fingerprint.split():
        name, kind, bits = word[:8], word[8:9], word[9:]
        try:
            values = [struct.unpack(">f", bytes.fromhex(f"{bits[i : i + 4]}0000"))[0] for i in range(0, len(bits), 4)]
        except (ValueError, struct.error):
            values = []
        if kind not in (_EXACT, _COARSE) or not values:
            raise ValueError(f"base_fingerprint holds {word!r}, which MoLE does not write; remove base_fingerprint")
        records[name] = kind, values
    return records


def _correlation(pairs: list[tuple[float, float]]) -> float:
    """Correlation of two columns about zero, the mean of weights."""
    a, b = torch.tensor(pairs, dtype=torch.float64).T
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30))


def _earlier_fingerprint(model: nn.Module) -> str | None:
    """The fingerprint that earlier versions wrote: 16 digits of a sha256 over the embedding and all vectors."""
    digest = hashlib.sha256()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    named = [] if embedding is None else [("embedding", next(embedding.parameters(), None))]
    own = ("mole_", "modules_to_save.")
    named += [(n, p) for n, p in model.named_parameters() if p.dim() == 1 and not any(mark in n for mark in own)]
    for name, parameter in named:
        if parameter is None or not parameter.is_floating_point():
            continue
        if parameter.device.type == "meta" or parameter.numel() == 0:
            return None
        name = name.replace("base_layer.", "").replace("original_module.", "")
        digest.update(f"{name}:{tuple(parameter.shape)[-1]}".encode())
        sample = parameter.detach().flatten()[:64].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
