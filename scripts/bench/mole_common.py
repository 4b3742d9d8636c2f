"""What the MoLE benchmarks share: one decoder layer in several variants, interleaved timing, tables."""

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaModel

from llava_mole.mole import MoleConfig, mole_auxiliary_loss

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[], None]


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small layer, few repetitions: under a minute")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as a list of flat dicts")
    parser.add_argument("--repeats", type=int, help="timed rounds over all variants")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    return parser


def precision(device: str) -> torch.dtype:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def decoder(width: int, ffn_width: int, heads: int, device: str, layers: int = 1) -> LlamaModel:
    """Random decoder layers with Vicuna's structure; `inputs_embeds` in, hidden states out."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=ffn_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
    )
    return random_llama(LlamaModel, config, device).requires_grad_(False)


def random_llama(kind: Any, config: LlamaConfig, device: str) -> Any:
    """A Llama with random weights in the device's precision, made where it stays: seconds for 7B on a GPU.

    It is built on the meta device, so that no weight exists twice or in another precision.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = kind(config)
    model = model.to(precision(device)).to_empty(device=device)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                nn.init.ones_(parameter)  # norms
            else:
                nn.init.normal_(parameter, std=config.initializer_range)
        if hasattr(module, "rotary_emb"):  # its tables are buffers, which to_empty leaves undefined
            with torch.device(device):
                module.rotary_emb = type(module.rotary_emb)(config)
    return model


def share(model: nn.Module) -> nn.Module:
    """A copy of the module tree around the same parameters, so that variants do not multiply the weights."""
    return copy.deepcopy(model, {id(p): p for p in [*model.parameters(), *model.buffers()]})


def plain_lora(base: nn.Module, r: int, dropout: float = 0.0) -> nn.Module:
    """PEFT's LoRA on all seven linears."""
    config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=LORA_TARGETS)
    return randomize(get_peft_model(share(base), config, autocast_adapter_dtype=False))


def mole(base: nn.Module, **options: Any) -> nn.Module:
    """Our adapter."""
    return randomize(
        get_peft_model(share(base), MoleConfig(add_balance_loss=False, **options), autocast_adapter_dtype=False)
    )


def randomize(model: nn.Module) -> nn.Module:
    """Random B, as after some training; with B = 0 a whole branch of gradients would be zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.endswith("_B") or name.endswith(".B"):
            nn.init.normal_(parameter, std=1e-3)
    return model


def training_step(model: nn.Module, x: Tensor) -> Step:
    """Forward and backward with a random output gradient, the auxiliary loss included where there is one."""
    probe = torch.randn_like(x)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)

    def step() -> None:
        out = model(inputs_embeds=x, use_cache=False).last_hidden_state
        loss = (out * probe).sum() + mole_auxiliary_loss(model, token_mask=mask)
        loss.backward()
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return step


def synchronize(device: str) -> None:
    """Wait for the device, where it works asynchronously."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(steps: Mapping[str, Step], baseline: str, repeats: int, device: str) -> dict[str, list[list[float]]]:
    """Seconds of every step, in pairs with the baseline: `[[own, baseline], ...]`, one pair a round.

    A machine drifts from minute to minute, so each variant is divided by a run of the baseline right beside it; which
    of the two comes first alternates.
    """
    pairs: dict[str, list[list[float]]] = {name: [] for name in steps}

    def seconds(name: str) -> float:
        gc.collect()
        synchronize(device)
        start = time.perf_counter()
        steps[name]()
        synchronize(device)
        return time.perf_counter() - start

    bar = tqdm(total=len(steps) * repeats, unit="pair", disable=None)
    for name in steps:
        seconds(name)  # warm-up
    for round_ in range(repeats):
        for name in steps:
            order = [name, baseline] if round_ % 2 else [baseline, name]
            first, second = (seconds(which) for which in order)
            pairs[name].append([first, second] if round_ % 2 else [second, first])
            bar.update()
    bar.close()
    return pairs


def summary(pairs: dict[str, list[list[float]]], baseline: str, **columns: Any) -> list[dict[str, Any]]:
    """One row a variant; the ratio is the median over pairs of own time by the baseline's beside it.

    `low` and `high` are the 95 % interval of that median (order statistics, no assumption on the noise);
    `ratio_of_minima` is the steadier number where other work on the machine only ever adds time.
    """
    base_minimum = min(base for values in pairs.values() for _, base in values)
    rows = []
    for name, values in pairs.items():
        own = [value for value, _ in values]
        ratios = [value / base for value, base in values]
        low, high = median_interval(ratios)
        rows.append(
            {
                **columns,
                "variant": name,
                "median_s": statistics.median(own),
                "min_s": min(own),
                "max_s": max(own),
                f"ratio_to_{baseline}": statistics.median(ratios),
                "low": low,
                "high": high,
                "ratio_of_minima": min(own) / base_minimum,
            }
        )
    return rows


def median_interval(values: list[float]) -> tuple[float, float]:
    """The narrowest symmetric pair of order statistics that covers the median with at least 95 %.

    The number of values below the median is binomial(n, 1/2). With fewer than 6 values it is their whole range.
    """
    ordered, n = sorted(values), len(values)
    tail, skip = 0.0, 0
    while 2 * (tail := tail + math.comb(n, skip) / 2**n) <= 0.05:
        skip += 1
    skip = max(0, skip - 1)
    return ordered[skip], ordered[n - 1 - skip]


def machine() -> dict[str, Any]:
    """Where and with what this ran."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
    }


def report(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table, with the machine."""
    print(f"\n{title}")
    print("  ".join(f"{key} {value}" for key, value in machine().items()))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)), flush=True)


def save(rows: list[dict[str, Any]], path: Path | None) -> None:
    """Write the rows with the machine as JSON, where a path is given."""
    if path is not None:
        path.write_text(json.dumps([{**row, **machine()} for row in rows], indent=1), encoding="utf-8")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
