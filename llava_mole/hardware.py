"""GPUs that are known by name: peak arithmetic and memory, from NVIDIA's data sheets.

`bf16_flops` is the dense bfloat16 tensor-core peak with float32 accumulation. Data sheets print it doubled, "with
sparsity", for Ampere and later; the table holds the half. Consumer cards reach float32 accumulation at half the rate
of float16 accumulation; the table holds the former.
"""

import re
from dataclasses import dataclass

from llava_mole.common.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    name: str
    bf16_flops: float
    """Dense bfloat16 peak, FLOP/s."""
    memory_bytes: int
    device: str
    """Regular expression that the name torch gives the device contains."""


def _gpu(name: str, teraflops: float, gibibytes: int, device: str) -> Gpu:
    return Gpu(name, teraflops * 1e12, gibibytes * GIB, device)


# In this order: the first whose `device` is found in torch's name is meant.
_TABLE = (
    _gpu("a100-40g", 312.0, 40, r"A100.*40GB"),  # A100 Tensor Core GPU data sheet (2021)
    _gpu("a100-80g", 312.0, 80, r"A100|A800"),  # as above; A800 differs in its links only
    _gpu("h100-pcie", 756.0, 80, r"H100 PCIe"),  # H100 Tensor Core GPU data sheet (2022)
    _gpu("h100-nvl", 835.5, 94, r"H100 NVL"),  # H100 Tensor Core GPU data sheet (2024)
    _gpu("h200", 989.4, 141, r"H200"),  # H200 Tensor Core GPU data sheet (2024)
    _gpu("h100", 989.4, 80, r"H100|H800"),  # SXM5; H100 architecture white paper, table 2
    _gpu("b200", 2250.0, 180, r"B200"),  # DGX B200 data sheet (2024), an eighth of it
    _gpu("l40s", 362.05, 48, r"L40S"),  # L40S data sheet (2023)
    _gpu("l40", 181.05, 48, r"L40"),  # L40 data sheet (2022)
    _gpu("a10", 125.0, 24, r"A10(?!\w)"),  # A10 data sheet (2021)
    _gpu("rtx-a6000", 154.8, 48, r"RTX A6000"),  # GA102 architecture white paper, appendix
    _gpu("rtx-3090", 71.2, 24, r"RTX 3090(?! Ti)"),  # GA102 architecture white paper
    _gpu("rtx-4090", 165.2, 24, r"RTX 4090(?! D)"),  # Ada architecture white paper, appendix A
    _gpu("rtx-5090", 209.5, 32, r"RTX 5090(?! D)"),  # RTX Blackwell architecture white paper, appendix A
)
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}
"""Known GPUs by the name a user types."""


def find_gpu(name: str) -> Gpu:
    """The GPU a user means. Raises ConfigError, listing the known ones, where there is none of that name."""
    gpu = GPUS.get(name.lower().replace("_", "-"))
    if gpu is None:
        raise ConfigError(f"unknown GPU {name!r}; known are {', '.join(sorted(GPUS))}")
    return gpu


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that torch calls `device_name` (`torch.cuda.get_device_name()`), or None for an unknown one."""
    return next((gpu for gpu in _TABLE if re.search(gpu.device, device_name)), None)
