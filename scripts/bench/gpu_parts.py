"""The parts of scripts/gpu_check.sh, one a process: `python scripts/bench/gpu_parts.py PART --device cuda --json FILE`.

A part writes its rows as JSON. Exit code: 0 passed, 3 cannot run here (the reason is the last line of its output),
anything else failed. `--quick`, and any device but a GPU, takes small shapes.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[2]
NOT_AVAILABLE = 3
Rows = list[dict[str, Any]]


class NotAvailable(Exception):
    """The part cannot run on this machine."""


def step(args: Any) -> Rows:
    """A training step of Vicuna-7B's shape on two rows of the paper's mixture, with every adapter."""
    names = ["frozen", "plain_lora", *(f"mole K={k}" for k in (1, 3, 8, 16)), "dense K=3"]
    return _steps(args, ["--mixture", "1" if args.quick else "2", "--variants", *names])


def step_backends(args: Any) -> Rows:
    """The same on one row with each backend of MoLE; `loop` only for three experts, as it takes minutes for more."""
    names = ["mole K=3 masked", "mole K=3 grouped", "mole K=3 loop"]
    names += [f"mole K={k} {kind}" for k in (8, 16) for kind in ("masked", "grouped")]
    return _steps(args, ["--mixture", "1", "--variants", *(names[:2] if args.quick else names)])


def step_recomputed(args: Any) -> Rows:
    """The same step with every layer computed twice: less memory, HFU above MFU."""
    return _steps(args, ["--mixture", "1", "--variants", "mole K=3", "mole K=3, all recomputed"])


def step_nemo(args: Any) -> Rows:
    """NeMo Automodel's setting: text only, rank 16, one full row, every token supervised."""
    given = ["--samples", "1", "--text-only", "--rank", "16", "--variants", "plain_lora", "mole K=3"]
    return _steps(args, given)


def _steps(args: Any, given: list[str]) -> Rows:
    import train_step

    repeats = ["--repeats", "1" if args.quick else "4"]
    options = train_step.arguments().parse_args(
        ["--device", args.device, *(["--quick"] if args.quick else []), *repeats, *given]
    )
    _, rows = train_step.run(options)
    _check_finite(rows)
    return rows


def decode(args: Any) -> Rows:
    """One token for 1 and for 32 sequences after 512, through all layers, against plain LoRA."""
    import mole_common as common
    import mole_decode

    small = args.quick or not args.device.startswith("cuda")
    width, layers, context = (256, 2, 32) if small else (4096, 32, 512)
    base = common.decoder(width, width * 43 // 16, max(1, width // 128), args.device, layers)
    models = {"frozen": common.share(base), "plain_lora": common.plain_lora(base, 32)}
    models |= {f"mole K={k}": common.mole(base, r=32, num_experts=k) for k in (1, 3, 8, 16)}
    for model in models.values():
        model.eval()
    rows = []
    for sequences in (1, 32):
        found = mole_decode.measure(
            models, sequences, width, args.device, context=context, passes=1, repeats=2 if small else 15
        )
        rows += [{**row, "layers": layers, "context": context} for row in found]
    _check_finite(rows)
    return rows


def packing_sdpa(args: Any) -> Rows:
    """Packed rows with `sdpa` against single samples."""
    return _packing("sdpa", args)


def packing_flash(args: Any) -> Rows:
    """The same with `flash_attention_2`."""
    from transformers.utils import is_flash_attn_2_available

    _needs_gpu(args)
    if not is_flash_attn_2_available():
        raise NotAvailable("flash-attn is not installed")
    return _packing("flash_attention_2", args)


def packing_flex(args: Any) -> Rows:
    """The same with `flex_attention`."""
    _needs_gpu(args)
    return _packing("flex_attention", args)


def _packing(kernel: str, args: Any) -> Rows:
    import mole_common as common
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llava_mole.model.packed_attention import enable_packing, packed_arguments

    small = args.quick or not args.device.startswith("cuda")
    width, lengths = (128, (40, 24)) if small else (2048, (1700, 800, 1000, 596))
    config = LlamaConfig(
        vocab_size=100, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=8192,
        attn_implementation=kernel,
    )  # fmt: skip
    model = common.random_llama(LlamaForCausalLM, config, args.device)
    enable_packing(model)
    kernel_now = model.config._attn_implementation
    x = torch.randn(1, sum(lengths), width, device=args.device, dtype=common.precision(args.device))

    def run(inputs: torch.Tensor, samples: tuple[int, ...]) -> torch.Tensor:
        return model.get_decoder()(
            inputs_embeds=inputs, **packed_arguments(kernel_now, samples, inputs.device)
        ).last_hidden_state

    def train() -> None:
        leaf = x.detach().requires_grad_()
        run(leaf, lengths).sum().backward()

    with torch.no_grad():
        packed, start, worst, rows = run(x, lengths).float(), 0, 0.0, []
        for size in lengths:
            part = slice(start, start + size)
            alone = run(x[:, part], (size,)).float()
            worst = max(worst, float((packed[:, part] - alone).norm() / alone.norm()))
            start += size
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    timed = common.interleave({kernel: train}, kernel, 2 if small else 10, args.device)
    (row,) = common.summary(timed, kernel, tokens=sum(lengths), width=width)
    rows.append({"kernel": kernel, "relative_difference": worst, "tolerance": tolerance, "median_s": row["median_s"]})
    assert worst <= tolerance, f"{kernel}: packed samples differ from single ones by {worst:.1e} (norms)"
    return rows


def compile_layers(args: Any) -> Rows:
    """Compiled decoder layers against eager ones: the same loss, and their times."""
    import mole_common as common
    import torch
    import train_step

    from llava_mole.model.language_model import compile_layers as compiled

    on_gpu = args.device.startswith("cuda")
    backend = "inductor" if on_gpu else "aot_eager"
    options = train_step.arguments().parse_args(["--device", args.device])
    base, tower = train_step.language_model(True, args.device), train_step.vision_tower(True, args.device)
    lengths = train_step.mixture_rows(512, 1, tower.num_patches)
    rows = [train_step.make_row(each, tower, base.config.vocab_size) for each in lengths]
    rows = train_step.on_device(rows, args.device)
    eager = train_step.build("mole K=3", base, tower, options)
    fast = train_step.build("mole K=3", base, tower, options)
    fast.load_state_dict(eager.state_dict())
    compiled(fast.causal_lm, backend)
    losses = [float(train_step.row_loss(model, rows[0], len(rows[0]["ids"])).detach()) for model in (eager, fast)]
    steps = {"eager": train_step.training_step(eager, rows), "compiled": train_step.training_step(fast, rows)}
    found = common.summary(common.interleave(steps, "eager", 1 if args.quick else 5, args.device), "eager")
    difference = abs(losses[1] - losses[0]) / abs(losses[0])
    tolerance = 1e-5 if common.precision(args.device) == torch.float32 else 1e-2
    assert difference <= tolerance, f"losses {losses} differ by {difference:.1e}"
    return [{**row, "backend": backend, "loss_difference": difference} for row in found]


def quantized(args: Any) -> Rows:
    """Bases in 4 and 8 bits: logits against the unquantised one, a training step, bytes of the weights."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotAvailable("bitsandbytes is not installed")
    import mole_common as common
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from llava_mole.model.adapters import add_adapter, trainable_parameters
    from llava_mole.model.quantization import quantize_linears

    small = args.quick or not args.device.startswith("cuda")
    width, device = 256 if small else 2048, torch.device(args.device)
    config = LlamaConfig(
        vocab_size=200, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=width // 64, num_key_value_heads=width // 64,
    )  # fmt: skip
    dtype = common.precision(args.device)
    ids = torch.arange(3, 67, device=device).unsqueeze(0)
    rows: Rows = []
    exact: Any = None
    for kind in ("none", "8bit", "4bit"):
        model = common.random_llama(LlamaForCausalLM, config, "cpu").requires_grad_(False).to(dtype)
        quantize_linears(model, kind, device, dtype)  # type: ignore[arg-type]
        model.to(device)
        with torch.no_grad():
            logits = model(ids).logits.float()
        exact = logits if exact is None else exact
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        adapted = add_adapter(
            model, "mole", rank=8, alpha=None, dropout=None, num_experts=3, preset="paper", options={}
        )
        adapted.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            adapted(ids, labels=ids).loss.backward()
        gradients = [p.grad for p in trainable_parameters(adapted).values() if p.grad is not None]
        assert gradients, f"{kind}: nothing got a gradient"
        assert all(bool(torch.isfinite(g).all()) for g in gradients), f"{kind}: a gradient is not finite"
        difference = float((logits - exact).norm() / exact.norm())
        allowed = {"none": 0.0, "8bit": 0.1, "4bit": 0.5}[kind]
        assert difference <= allowed, f"{kind}: logits differ by {difference:.2f} (norms), allowed {allowed}"
        rows.append({"quantization": kind, "relative_difference": difference, "bytes_of_weights": held})
    return rows


def curves(args: Any) -> Rows:
    """Loss curves of the tiny world in bfloat16 and in float32."""
    _needs_gpu(args)
    import statistics

    found = {}
    with tempfile.TemporaryDirectory(prefix="gpu_check") as name:
        config = _tiny_world(Path(name), args)
        steps = 12 if args.quick else 60
        for precision in ("fp32", "bf16"):
            out = _train(config, Path(name) / precision, steps, args, "--train.precision", precision)
            found[precision] = _losses(out)
    quarter = max(1, len(found["fp32"]) // 4)
    last = {precision: statistics.mean(losses[-quarter:]) for precision, losses in found.items()}
    first = statistics.mean(found["fp32"][:quarter])
    difference = abs(last["bf16"] - last["fp32"]) / last["fp32"]
    rows = [
        {"precision": precision, "steps": len(losses), "first_loss": losses[0], "last_quarter": last[precision]}
        | {"relative_difference": difference}
        for precision, losses in found.items()
    ]
    assert last["fp32"] < first, "the loss does not fall"
    assert difference < 0.05, f"the last quarter's losses differ by {difference:.1%}"
    return rows


def resume(args: Any) -> Rows:
    """A run that stopped half-way and resumed equals the undisturbed one."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory(prefix="gpu_check") as name:
        config = _tiny_world(Path(name), args)
        precision = ("--train.precision", "bf16" if args.device.startswith("cuda") else "fp32")
        steps = 4 if args.quick else 10
        given = (*precision, "--train.save_every", str(steps // 2))
        whole = _train(config, Path(name) / "whole", steps, args, *given)
        half = Path(name) / "half"
        half.mkdir()
        # As after a kill in the second half: the newest checkpoint is that of the middle.
        for file in whole.iterdir():
            if file.name not in (f"checkpoint-{steps}", "summary.json", ".lock"):
                _copy(file, half / file.name)
        resumed = _train(config, half, steps, args, *given, "--train.resume", "auto")
        state = [
            load_file(run / f"checkpoint-{steps}" / "trainer" / "optimizer.safetensors") for run in (whole, resumed)
        ]
        assert state[0].keys() == state[1].keys()
        worst = max(float((state[0][key] - state[1][key]).abs().max()) for key in state[0])
        losses = [_losses(run)[-1] for run in (whole, resumed)]
    row = {"steps": steps, "tensors": len(state[0]), "largest_difference": worst, "last_losses": losses}
    allowed = 0.0 if args.device == "cpu" else 1e-6  # sums of atomics on a GPU have no fixed order
    assert worst <= allowed, f"the optimizer's state differs by {worst:.1e}"
    return [row]


def loader(args: Any) -> Rows:
    """Images/s of two data loader workers at 336 px, and what they make on 16 cores."""
    import data_scale

    count, repeats = (24, 2) if args.quick else (200, 4)
    with tempfile.TemporaryDirectory(prefix="gpu_check") as name:
        rows = data_scale.image_rows(count, Path(name), repeats)
    return [{**row, "projected_on_16_cores": 8 * row["median_images_per_s"]} for row in rows]


def profile(args: Any) -> Rows:
    """Where the time of a step with three experts goes: the 15 kernels or operators that take most."""
    import train_step
    from torch.profiler import ProfilerActivity, profile

    on_gpu = args.device.startswith("cuda")
    small = args.quick or not on_gpu
    options = train_step.arguments().parse_args(["--device", args.device])
    base, tower = train_step.language_model(small, args.device), train_step.vision_tower(small, args.device)
    lengths = train_step.mixture_rows(256 if small else 4096, 1, tower.num_patches)
    rows = [train_step.make_row(each, tower, base.config.vocab_size) for each in lengths]
    model = train_step.build("mole K=3", base, tower, options)
    run = train_step.training_step(model, train_step.on_device(rows, args.device))
    run()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as recorded:
        run()
        train_step.common.synchronize(args.device)
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    return [
        {
            "name": event.key[:90],
            "calls": event.count,
            "ms": getattr(event, key) / 1e3,
            "share": getattr(event, key) / total,
        }
        for event in events[:15]
    ]


def tests(args: Any) -> Rows:
    """Every test marked `gpu`."""
    _needs_gpu(args)
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    with tempfile.TemporaryDirectory(prefix="gpu_check") as name:
        report = Path(name) / "tests.xml"
        command = ["-m", "pytest", "-m", "gpu", "-q", "--junitxml", str(report), *map(str, files)]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(report).iter("testcase"))
    rows = []
    for case in cases:
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        result = "failed" if bad else "not available" if "skipped" in kinds else "passed"
        rows.append({"test": f"{case.get('classname')}::{case.get('name')}", "result": result})
    assert rows, "no test is marked gpu"
    assert done.returncode in (0, 5), "; ".join(row["test"] for row in rows if row["result"] == "failed")
    return rows


def _needs_gpu(args: Any) -> None:
    if not args.device.startswith("cuda"):
        raise NotAvailable("needs a GPU")


def _check_finite(rows: Rows) -> None:
    for row in rows:
        for key, value in row.items():
            assert not isinstance(value, float) or math.isfinite(value), f"{row.get('variant')}: {key} is {value}"


def _tiny_world(folder: Path, args: Any) -> list[str]:
    """Arguments of a run in the tiny world; with `--quick` in a miniature of it, made in a second."""
    if args.quick:
        sys.path.insert(0, str(ROOT / "tests"))
        from worlds.tiny_models import make_world

        return [str(make_world(folder / "world"))]
    from llava_mole import cli

    data = folder / "data"
    assert cli.main(["prepare", "tiny", "--out", str(data)]) == 0
    sources = []
    for source in ("general", "document", "biomedicine"):
        sources += [f"--data.sources.{source}.annotations", str(data / source / "train.json")]
        sources += [f"--data.sources.{source}.image_folder", str(data)]
    return [str(ROOT / "configs" / "tiny" / "finetune_mole.yaml"), "--projector_weights", "null", *sources]


def _train(config: list[str], out: Path, steps: int, args: Any, *more: str) -> Path:
    from llava_mole.config import parse_run_config
    from llava_mole.train.train import train

    given = ["--train.output_dir", str(out), "--train.max_steps", str(steps), "--train.warmup_steps", "1"]
    return train(parse_run_config([*config, *given, "--device", args.device.partition(":")[0], *more]))


def _losses(run: Path) -> list[float]:
    from llava_mole.train.tracker import read_metrics

    return [entry["loss"] for entry in read_metrics(run / "metrics.jsonl")]


def _copy(source: Path, target: Path) -> None:
    import shutil

    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


PARTS: dict[str, tuple[Callable[[Any], Rows], int]] = {
    "step": (step, 150),
    "step: backends": (step_backends, 90),
    "step: recomputed": (step_recomputed, 45),
    "step: NeMo": (step_nemo, 45),
    "decoding": (decode, 60),
    "packing: sdpa": (packing_sdpa, 30),
    "packing: flash": (packing_flash, 30),
    "packing: flex": (packing_flex, 60),
    "profile": (profile, 45),
    "tests marked gpu": (tests, 120),
    "bf16 and fp32 curves": (curves, 90),
    "resume": (resume, 60),
    "compile": (compile_layers, 90),
    "quantised bases": (quantized, 45),
    "loader": (loader, 30),
}
"""By name: what runs, and its limit in seconds. In the order in which they run: the measurements first."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    try:
        rows = PARTS[args.part][0](args)
    except NotAvailable as reason:
        print(reason)
        return NOT_AVAILABLE
    except AssertionError as failed:
        print(failed, file=sys.stderr)
        return 1
    args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(f"{args.part}: {len(rows)} rows in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
