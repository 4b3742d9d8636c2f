"""Imports foreign checkpoints: they become a run directory that every command of this package reads.

`OUT/checkpoint-0/` is a checkpoint as training writes it. If weights had to be rewritten, `OUT/language_model/`
(Hugging Face's layout) and `OUT/vision_tower/` (open_clip's) lie beside it. The checkpoint names parts that are usable
where they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from llava_mole import __version__
from llava_mole.common.errors import WeightsError
from llava_mole.config import (
    AdapterConfig,
    AspectRatio,
    DataConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    VisionTowerConfig,
    save_config,
)
from llava_mole.data.tokenization import load_tokenizer
from llava_mole.interop.causal_lm import LanguageModelPart, Skeleton, fingerprint_language_model
from llava_mole.interop.kinds import KINDS, find_kind
from llava_mole.interop.lora import read_lora, write_lora
from llava_mole.interop.publishing import check_out, publish
from llava_mole.interop.released import adapt, check_base_weights, read_released, write_experts
from llava_mole.interop.sources import Source, read_source
from llava_mole.interop.tensors import check_shapes, open_weights, save_tensors, write_label
from llava_mole.interop.towers import CONFIG_FILE as TOWER_CONFIG
from llava_mole.interop.towers import WEIGHTS_FILE as TOWER_WEIGHTS
from llava_mole.interop.towers import Tower, open_tower, tower_from_hugging_face, write_open_clip
from llava_mole.model.builder import ADAPTER_DIR, CONFIG_FILE, PROJECTOR_FILE, PROJECTOR_PREFIX, TOKENIZER_DIR
from llava_mole.model.checkpoint import write_checkpoint
from llava_mole.model.multimodal_projector import build_projector

LANGUAGE_MODEL_DIR, VISION_TOWER_DIR = "language_model", "vision_tower"
AdapterWriter = Callable[[Path, str], None] | None
"""Writes an adapter to a directory, for the language model at a path. None without an adapter."""


@dataclass(frozen=True)
class ImportOptions:
    """Settings that a foreign checkpoint does not record, or records wrongly."""

    model_base: Path | None = None
    vision_tower: Path | None = None
    vision_tower_name: str | None = None
    template: str | None = None
    """None: `plain` for a projector of stage 1, otherwise LLaVA-1.5's `vicuna_v1`."""
    image_aspect_ratio: AspectRatio | None = None
    """None: as the checkpoint records it, otherwise `pad`."""
    select_layer: int | None = None
    """None: as the checkpoint records it, otherwise -2."""
    alpha: float | None = None
    """LoRA alpha of the authors' MoLE file. None: 2 r."""
    mode: str | None = None
    """Mode of the authors' MoLE file: `sparse` (also None) or `dense`."""
    overwrite: bool = False


def import_checkpoint(path: Path, out: Path, options: ImportOptions) -> list[str]:
    """Make `out` a run directory from the checkpoint at `path`.

    Returns:
        The assumptions made because the checkpoint does not record them, as text.

    Raises:
        WeightsError: `path` cannot be imported, a part is missing, tensors do not fit, or `out` may not be written.
    """
    inputs = [path, options.model_base, options.vision_tower]
    check_out(out, overwrite=options.overwrite, inputs=inputs)
    found = find_kind(path)
    is_released = found.kind == "released-mole"
    if not is_released and (options.alpha is not None or options.mode is not None):
        raise WeightsError(f"--alpha and --mode are for the MoE authors' .pt; {path} is {KINDS[found.kind]}")
    released = read_released(found, options.alpha, options.mode or "sparse") if is_released else None
    source = read_source(path) if released is None else released.source
    inside, base_dir = _language_model(source, options)
    skeleton = Skeleton(inside.config, base_dir) if inside else Skeleton.of_directory(base_dir)
    tower = _tower(source, options)
    _check_projector(source, tower, skeleton)
    adapter = AdapterConfig()
    write_adapter: AdapterWriter = None
    if released is not None:
        adapter = released.adapter
        write_adapter = partial(write_experts, released, adapt(released, skeleton))
        check_base_weights(released, inside.weights if inside else open_weights(base_dir), base_dir)
    elif found.kind == "llava-lora":
        lora = read_lora(found.path, skeleton.linears())
        adapter = AdapterConfig(method="lora", rank=lora.config["r"], alpha=float(lora.config["lora_alpha"]))
        write_adapter = partial(write_lora, lora)
    config = _run_config(source, tower, adapter, out, out / LANGUAGE_MODEL_DIR if inside else base_dir, options)
    with publish(out, overwrite=options.overwrite, inputs=[*inputs, base_dir, tower.weights]) as temporary:
        temporary.mkdir(parents=True)
        if inside is not None:
            inside.write(temporary / LANGUAGE_MODEL_DIR)
        if tower.state is not None:
            write_open_clip(tower, temporary / VISION_TOWER_DIR)
        written = temporary / LANGUAGE_MODEL_DIR if inside else base_dir
        _write_checkpoint(temporary, config, source, tower, written, write_adapter)
        write_label(temporary, {"converted": "to a checkpoint of llava_mole", "from": str(path.resolve())})
    return _assumptions(source, config, options)


def _language_model(source: Source, options: ImportOptions) -> tuple[LanguageModelPart | None, Path]:
    """The language model to be extracted from a checkpoint (None if it is a directory), and the directory it is in.

    If `--model-base` is a full LLaVA, its tower completes a source without one.
    """
    if source.language_model is not None:
        if options.model_base is not None:
            raise WeightsError(f"{source.found.path} holds its own language model; leave --model-base out")
        return source.language_model, source.language_model.directory
    if options.model_base is None:
        raise WeightsError(
            f"{source.found.path} ({source.found.kind}) holds no language model; name the directory of the one it was "
            "trained on with --model-base"
        )
    base = find_kind(options.model_base)
    if base.kind == "language-model":
        return None, options.model_base
    if base.kind not in ("llava", "llava-hf", "llava-next-hf"):
        raise WeightsError(
            f"--model-base {options.model_base} is {base.kind!r}; needed is a language model or a full LLaVA"
        )
    whole = read_source(options.model_base)
    if not source.tower:
        source.tower, source.tower_config = whole.tower, whole.tower_config
    return whole.language_model, options.model_base


def _tower(source: Source, options: ImportOptions) -> Tower:
    given = None if options.vision_tower is None else open_tower(options.vision_tower, options.vision_tower_name)
    if not source.tower:
        if given is None:
            hint = f"; its configuration names {source.tower_hint!r}" if source.tower_hint else ""
            raise WeightsError(f"{source.found.path} holds no vision tower: give it with --vision-tower{hint}")
        return given
    config = source.tower_config or (given.config if given else None)
    if config is None:
        raise WeightsError(
            f"{source.found.path} holds a vision tower, but not its configuration (heads, activation); give the "
            f"directory of the tower it started from with --vision-tower ({source.tower_hint or 'a CLIP directory'})"
        )
    own = tower_from_hugging_face(source.tower, config, source.found.path)
    if given is None or given.state is not None or given.config.get("vision_cfg") != own.config["vision_cfg"]:
        return own
    in_place = given.visual_state()
    is_same = all(n in in_place and torch.equal(value, in_place[n]) for n, value in own.visual_state().items())
    return given if is_same else own


def _check_projector(source: Source, tower: Tower, skeleton: Skeleton) -> None:
    hidden = skeleton.config.get_text_config().hidden_size
    with torch.device("meta"):
        expected = build_projector(source.projector_kind, tower.width, hidden).state_dict()
    found, needed = ({name: value.shape for name, value in state.items()} for state in (source.projector, expected))
    check_shapes(f"the projector of {source.found.path}", found, needed)


def _select_layer(source: Source, tower: Tower, options: ImportOptions) -> int:
    recorded = source.select_layer if options.select_layer is None else options.select_layer
    layer, blocks = -2 if recorded is None else recorded, tower.blocks
    if type(layer) is not int or not 1 <= abs(layer) <= blocks:
        raise WeightsError(
            f"{source.found.path}: vision tower layer {layer!r}; allowed are -{blocks}..-1 and 1..{blocks}; give it "
            "with --select-layer"
        )
    return layer


def _run_config(
    source: Source, tower: Tower, adapter: AdapterConfig, out: Path, language_model: Path, options: ImportOptions
) -> RunConfig:
    """The configuration of the run; its paths are those after publishing."""
    ratio = options.image_aspect_ratio
    if ratio is not None and (ratio == "anyres") != (source.aspect_ratio == "anyres"):
        raise WeightsError(
            f"{source.found.path} is {KINDS[source.found.kind]}; --image-aspect-ratio {ratio} does not fit it: leave "
            "the option out"
        )
    tower_name, tower_weights = tower.name, tower.weights
    if tower.state is not None:
        folder = out / VISION_TOWER_DIR
        tower_name, tower_weights = str(folder / TOWER_CONFIG), folder / TOWER_WEIGHTS
    return RunConfig(
        stage=cast(Any, source.stage),
        train=TrainConfig(output_dir=str(out)),
        model=ModelConfig(
            language_model=str(language_model),
            vision_tower=VisionTowerConfig(
                name=cast(str, tower_name),
                weights=str(tower_weights),
                activation=cast(Any, tower.activation),
                select_layer=_select_layer(source, tower, options),
            ),
            projector=source.projector_kind,
        ),
        adapter=adapter,
        data=DataConfig(
            sources={"imported": SourceConfig(annotations=f"not recorded (imported from {source.found.path})")},
            template=options.template or ("plain" if source.stage == "pretrain" else "vicuna_v1"),
            image_aspect_ratio=cast(AspectRatio, ratio or source.aspect_ratio or "pad"),
            image_grid_pinpoints=source.pinpoints,
        ),
    )


def _write_checkpoint(
    run: Path, config: RunConfig, source: Source, tower: Tower, language_model: Path, write_adapter: AdapterWriter
) -> None:
    """Write `run/checkpoint-0`. Its manifest names the parts beside it by relative paths, so the run can be moved.

    `language_model` is the directory in which the language model is now, before publishing.
    """
    tokenizer = load_tokenizer(str(language_model))
    tower_name, out = config.model.vision_tower.name, Path(config.train.output_dir)

    def recorded(path: str) -> str:
        return f"../{Path(path).relative_to(out)}" if Path(path).is_relative_to(out) else str(Path(path).resolve())

    def write_files(checkpoint: Path) -> None:
        save_config(config, checkpoint / CONFIG_FILE)
        tokenizer.save_pretrained(checkpoint / TOKENIZER_DIR)
        save_tensors(source.projector, checkpoint / PROJECTOR_FILE, PROJECTOR_PREFIX)
        if write_adapter is not None:
            write_adapter(checkpoint / ADAPTER_DIR, config.model.language_model)

    fields = {
        "version": __version__,
        "stage": config.stage,
        "step": 0,
        "adapter": config.adapter.method,
        "quantization": "none",
        "template": config.data.template,
        "imported": {"kind": source.found.kind, "path": str(source.found.path.resolve()), "tower": source.tower_hint},
        "fingerprints": {
            "language_model": fingerprint_language_model(language_model),
            "vision_tower": tower.fingerprint(),
        },
        "paths": {
            "language_model": recorded(config.model.language_model),
            "vision_tower_weights": recorded(config.model.vision_tower.weights),
            "vision_tower_config": recorded(tower_name) if tower_name.endswith(".json") else tower_name,
        },
    }
    write_checkpoint(run / "checkpoint-0", write_files, fields)


def _assumptions(source: Source, config: RunConfig, options: ImportOptions) -> list[str]:
    lines = []
    if options.template is None:
        lines.append(f"template {config.data.template} (checkpoints of this kind do not record it; --template)")
    if options.select_layer is None and source.select_layer is None:
        lines.append(f"vision tower layer {config.model.vision_tower.select_layer} (--select-layer)")
    if options.image_aspect_ratio is None and source.aspect_ratio is None:
        lines.append(f"images: {config.data.image_aspect_ratio} (--image-aspect-ratio)")
    elif options.image_aspect_ratio is None and source.found.kind == "llava-hf" and source.aspect_ratio == "square":
        lines.append("images: square, as its processor crops; LLaVA-1.5 was trained with --image-aspect-ratio pad")
    if source.found.kind == "released-mole":
        mode = options.mode or "sparse"
        lines.append(f"alpha {config.adapter.alpha:g} (--alpha) and mode {mode} (--mode); the file records neither")
    return lines
