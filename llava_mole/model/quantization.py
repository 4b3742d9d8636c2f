"""The language model's linears in 4 or 8 bits, through bitsandbytes (extra `quant`).

4 bits are QLoRA's (https://arxiv.org/abs/2305.14314): NF4 in blocks of 64 weights, whose scales are quantised again.
8 bits are LLM.int8() (https://arxiv.org/abs/2208.07339). Weights are loaded as stored, fingerprinted and only then
quantised, so a base model has the same fingerprint with every quantisation. torch and bitsandbytes are imported only
when needed, because the checks before a run must work without them.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from llava_mole.common.errors import ConfigError
from llava_mole.common.log import get_logger
from llava_mole.config import Quantization

if TYPE_CHECKING:
    import torch
    from torch import nn


OUTLIER_THRESHOLD = 6.0
"""8 bits: columns of the input with a larger value are multiplied in 16 bits (LLM.int8(), section 3.2)."""
BYTES_PER_WEIGHT = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Bytes of a quantised weight including its share of the scales. NF4 has a one-byte scale for 64 weights and four bytes
for 256 scales; the four bytes per row of 8 bits are negligible."""

BLOCK = 64
"""Weights that share a scale in 4 bits."""

logger = get_logger(__name__)


def require_bitsandbytes(quantization: Quantization) -> None:
    """Raise ConfigError where `quantization` needs bitsandbytes and it is not installed. Imports nothing."""
    if quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"a language model in {quantization} (model.quantization, --load-{quantization}) needs the package "
            "bitsandbytes, which is not installed: pip install 'llava_mole[quant]'; or leave it unquantised "
            "(--model.quantization none, --load-full)"
        )


def quantize_linears(
    causal_lm: Any, quantization: Quantization, device: "torch.device", compute_dtype: "torch.dtype"
) -> None:
    """Replace every linear of a causal LM except its head by a quantised one on `device`, in place.

    Args:
        causal_lm: On the CPU, in the dtype it is stored in, without adapters.
        quantization: `none` changes nothing.
        device: Where the weights are quantised and stay; the rest of the model is not moved.
        compute_dtype: The dtype to which 4-bit weights are expanded for a product.

    Raises:
        ConfigError: bitsandbytes is not installed or does not work on `device`, the model has no torch linears, or
            bitsandbytes would compute a linear wrongly.
    """
    if quantization == "none":
        return
    require_bitsandbytes(quantization)
    head = causal_lm.get_output_embeddings()
    names = [name for name, module in causal_lm.named_modules() if module is not head and _is_linear(module)]
    if not names:
        raise ConfigError(
            f"model.quantization {quantization!r}: {type(causal_lm).__name__} has no torch linears to quantise (GPT-2 "
            "uses another kind); set 'none' (for inference --load-full)"
        )
    odd = [(name, causal_lm.get_submodule(name).in_features) for name in names]
    odd = [(name, width) for name, width in odd if width % BLOCK]
    if quantization == "4bit" and device.type == "cpu" and odd:
        # Its CPU kernel starts a new block in every row when it expands weights, though not when it packs them.
        raise ConfigError(
            f"model.quantization '4bit': on a CPU bitsandbytes gets linears wrong whose input width is no multiple of "
            f"{BLOCK} ({odd[0][0]}: {odd[0][1]}); use '8bit' or a GPU (for inference --load-8bit)"
        )
    try:
        for name in names:
            linear = causal_lm.get_submodule(name)
            causal_lm.set_submodule(name, _quantized(linear, quantization, device, compute_dtype))
    except (ImportError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(
            f"model.quantization {quantization!r}: bitsandbytes does not work on {device}: "
            f"{' '.join(str(error).split())}; `python -m bitsandbytes` says more"
        ) from None
    # PEFT chooses its LoRA layer by this attribute.
    setattr(causal_lm, f"is_loaded_in_{quantization}", True)
    logger.info("%d linears of the language model are in %s now", len(names), quantization)


def _is_linear(module: "nn.Module") -> bool:
    from torch import nn

    return type(module) is nn.Linear


def _quantized(
    linear: "nn.Linear", quantization: Quantization, device: "torch.device", compute_dtype: "torch.dtype"
) -> "nn.Module":
    import bitsandbytes as bnb
    from torch import nn

    widths = (linear.in_features, linear.out_features, linear.bias is not None)
    weight: Any = linear.weight.data
    quantized: Any
    # On the meta device: the weights that the constructors would allocate are replaced at once.
    if quantization == "4bit":
        quantized = bnb.nn.Linear4bit(*widths, compute_dtype=compute_dtype, quant_type="nf4", device="meta")
        weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantized)
        # On CPUs with AVX512-BF16 an evaluation would repack the weights for a bfloat16 kernel that has no gradient:
        # training would go on from a validation with the gradients of the layers above cut off.
        quantized.support_avx512bf16_for_cpu = False
    else:
        quantized = bnb.nn.Linear8bitLt(*widths, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta")
        weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    quantized.weight = weight.to(device)  # this is where bitsandbytes quantises
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    return quantized.train(linear.training)
