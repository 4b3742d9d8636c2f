"""LoraHub as a whole: LoRAs in, coefficients by a search on examples, one ordinary LoRA out."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.common.log import get_logger
from llava_mole.common.text import format_table
from llava_mole.config import load_config, save_config
from llava_mole.interop.causal_lm import fingerprint_language_model
from llava_mole.interop.compose.composition import Composition, Injected, Method
from llava_mole.interop.compose.examples import Base, count_examples
from llava_mole.interop.compose.search import search
from llava_mole.interop.kinds import KINDS, find_kind
from llava_mole.interop.lora import ADAPTER_CONFIG, Lora, read_lora, write_lora
from llava_mole.interop.publishing import publish
from llava_mole.interop.tensors import read_object, write_label
from llava_mole.model.builder import ADAPTER_DIR, CONFIG_FILE
from llava_mole.model.checkpoint import (
    MANIFEST,
    OWNER_FILE,
    SELF_HASH,
    TRAINER_DIR,
    read_manifest,
    resolve_checkpoint,
    write_checkpoint,
)

logger = get_logger(__name__)
Batches = Sequence[dict[str, Any]]
ZERO_SHOT, UNIFORM, COMPOSED = "no LoRA (zero-shot)", "uniform, 1 / N", "composed"
"""Names of the rows that are not a given LoRA."""


@dataclass(frozen=True)
class Options:
    """How to search."""

    method: Method
    evaluations: int
    l1: float
    """Factor of sum |w_i| in the objective."""
    seed: int


@dataclass
class Row:
    """One line of the result."""

    name: str
    coefficients: list[float]
    loss: float
    """Mean over the examples of their mean cross-entropy, in nats per token."""
    held_out: float | None
    """The same of the held-out examples, if there are any."""


def find_lora(path: Path, base: Base, *, any_base: bool) -> tuple[Path, str | None]:
    """Where the LoRA in `path` is, and the name of a base model that could not be compared with the one given.

    Args:
        path: a directory in which PEFT saved a LoRA, a LLaVA-1.5 LoRA, or a run or checkpoint of this package.
        base: the base model.
        any_base: whether a recorded base is ignored.

    Raises:
        WeightsError: there is no LoRA, or it was trained on another base.
        CheckpointError: a checkpoint does not verify.
    """
    kind = find_kind(path).kind
    if kind in ("run", "checkpoint"):
        checkpoint = resolve_checkpoint(path)
        manifest = read_manifest(checkpoint)
        if manifest["adapter"] != "lora":
            raise WeightsError(
                f"{path} has adapter.method {manifest['adapter']!r}; plain LoRAs are composed (`llava-mole convert "
                "--to peft --expert` makes one of a mixture)"
            )
        _check_base(path, manifest["fingerprints"]["language_model"], base, any_base)
        return checkpoint / ADAPTER_DIR, None
    if kind not in ("peft", "llava-lora"):
        raise WeightsError(f"{path} is {KINDS[kind]}; give directories of LoRAs, or runs with adapter.method 'lora'")
    name = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not name or not (Path(name) / "config.json").is_file():
        return path, name or None
    if Path(name).resolve() != base.directory.resolve():
        _check_base(path, fingerprint_language_model(Path(name)), base, any_base)
    return path, None


def read_loras(paths: Sequence[Path], base: Base, *, any_base: bool) -> list[Lora]:
    """Read LoRAs and check that they belong to the base. The errors are those of `find_lora` and `read_lora`."""
    linears = base.linears
    loras = []
    names: dict[str, Path] = {}
    for path in paths:
        directory, name = find_lora(path, base, any_base=any_base)
        if name is not None:
            names.setdefault(Path(name).name, path)
        loras.append(read_lora(directory, linears))
    if len(names) > 1 and not any_base:
        given = ", ".join(f"{path} on {name!r}" for name, path in names.items())
        raise WeightsError(f"the LoRAs name different bases: {given}; give --any-base if they are the same model")
    return loras


def _check_base(path: Path, found: str, base: Base, any_base: bool) -> None:
    if found != base.fingerprint and not any_base:
        raise WeightsError(
            f"{path} was trained on another language model (fingerprint {found}) than {base.directory} "
            f"({base.fingerprint}); give the original as the base, or --any-base to compose it all the same"
        )


def compose(
    composition: Composition, names: Sequence[str], base: Base, examples: Batches, held_out: Batches, options: Options
) -> list[Row]:
    """Search the coefficients.

    Returns:
        The base alone, each LoRA alone, all of them with coefficient 1 / N, and last the composition that was found.
        The value that the search minimises, loss + l1 * sum |w_i|, is lowest in the last row.

    Raises:
        ConfigError: the loss is not finite, or `cma` is not installed.
    """
    injected = composition.inject(base.causal_lm)
    count = composition.count
    points = [(ZERO_SHOT, [0.0] * count)]
    points += [(name, [float(n == m) for m in range(count)]) for n, name in enumerate(names)]
    if count > 1:
        points.append((UNIFORM, [1 / count] * count))
    losses: dict[tuple[float, ...], float] = {}

    def objective(coefficients: Sequence[float]) -> float:
        losses[tuple(coefficients)] = loss = _loss(injected, base, examples, coefficients)
        return loss + options.l1 * sum(map(abs, coefficients))

    total = len(points) + options.evaluations

    def progress(number: int, value: float, best: float) -> None:
        logger.info("evaluation %d of at most %d: objective %.4f, best %.4f", number, total, value, best)

    found, _ = search(
        objective,
        [point for _, point in points],
        evaluations=options.evaluations,
        seed=options.seed,
        on_evaluation=progress,
    )
    points.append((COMPOSED, found))
    return [
        Row(name, list(point), losses[tuple(point)], _loss(injected, base, held_out, point) if held_out else None)
        for name, point in points
    ]


@torch.no_grad()
def _loss(injected: Injected, base: Base, batches: Batches, coefficients: Sequence[float]) -> float:
    """Mean over all examples of their mean cross-entropy."""
    injected.set(coefficients)
    total = sum(float(base.losses(injected.model, batch).double().sum()) for batch in batches)
    return total / count_examples(batches)


def result_table(rows: Sequence[Row]) -> str:
    """The rows as a table with the coefficients and losses."""
    has_held_out = rows[0].held_out is not None
    lines = [["", "coefficients", "loss", *(["held-out loss"] if has_held_out else [])]]
    for row in rows:
        coefficients = " ".join(f"{value:.3f}" for value in row.coefficients)
        lines.append([row.name, coefficients, f"{row.loss:.4f}", *([f"{row.held_out:.4f}"] if has_held_out else [])])
    return format_table(lines, right=(2, 3))


def write_result(
    out: Path,
    lora: Lora,
    rows: Sequence[Row],
    paths: Sequence[Path],
    base: Base,
    options: Options,
    *,
    overwrite: bool,
    inputs: Sequence[Path | None],
) -> None:
    """Write the composed LoRA, and where it comes from, to `out`: as a whole or not at all.

    If the base is a checkpoint of this package, `out` becomes a checkpoint for inference: that checkpoint with the
    LoRA as its adapter, in `out/adapter`. Otherwise the LoRA itself is in `out`.

    Raises:
        WeightsError: `out` may not be written.
        OSError: the disk cannot be written.
    """
    label = {
        "composed": f"LoRAs by coefficients, method {options.method}",
        "from": [str(path.resolve()) for path in paths],
        "coefficients": rows[-1].coefficients,
        "search": {"evaluations": options.evaluations, "l1": options.l1, "seed": options.seed},
        "losses": {row.name: {"examples": row.loss, "held_out": row.held_out} for row in rows},
        "base": {"path": str(base.directory.resolve()), "fingerprint": base.fingerprint},
    }
    with publish(out, overwrite=overwrite, inputs=inputs) as temporary:
        if base.loaded is None:
            write_lora(lora, temporary, str(base.directory))
        else:
            _write_checkpoint(temporary, lora, base.loaded.path, base.directory)
        write_label(temporary, label)


def _write_checkpoint(out: Path, lora: Lora, checkpoint: Path, language_model: Path) -> None:
    """A checkpoint for inference: `checkpoint` with the LoRA in place of its adapter."""
    manifest = read_manifest(checkpoint)
    own = ("format", "files", "run", SELF_HASH)
    fields = {key: value for key, value in manifest.items() if key not in own} | {
        "adapter": "lora",
        "paths": {
            key: str((checkpoint / value).resolve()) if "/" in value else value
            for key, value in manifest["paths"].items()
        },
    }
    config = load_config(checkpoint / CONFIG_FILE)
    config.adapter.method, config.adapter.options = "lora", {}
    config.adapter.rank, config.adapter.alpha = lora.config["r"], float(lora.config["lora_alpha"])
    config.adapter.dropout = None

    def write_files(folder: Path) -> None:
        for name in manifest["files"]:
            if name not in (OWNER_FILE, MANIFEST, CONFIG_FILE) and not name.startswith(
                (f"{TRAINER_DIR}/", f"{ADAPTER_DIR}/")
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)
        save_config(config, folder / CONFIG_FILE)
        write_lora(lora, folder / ADAPTER_DIR, str(language_model))

    write_checkpoint(out, write_files, fields)


def check_names(paths: Sequence[Path]) -> list[str]:
    """A name for each LoRA: its folder's, or its path where that is taken. ConfigError for a path given twice."""
    repeated = next((path for n, path in enumerate(paths) if path.resolve() in [p.resolve() for p in paths[:n]]), None)
    if repeated is not None:
        raise ConfigError(f"{repeated} is given twice; give each LoRA once")
    short = [path.resolve().name for path in paths]
    taken = [*short, *(2 * [ZERO_SHOT, UNIFORM, COMPOSED])]
    return [name if taken.count(name) == 1 else str(path.resolve()) for name, path in zip(short, paths, strict=True)]
