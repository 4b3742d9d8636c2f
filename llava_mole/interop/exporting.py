"""Our checkpoints out, in the layouts of LLaVA-1.5, llava-hf and PEFT."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.interop.causal_lm import LLAVA_MODEL_TYPES, copy_tokenizer
from llava_mole.interop.hf_processor import embeddings_to_grow, llava_config, tokenizer_with_image, write_processor
from llava_mole.interop.kinds import NON_LORA_FILE, PROJECTOR_FILE, find_kind
from llava_mole.interop.lora import Lora, write_lora
from llava_mole.interop.merging import Extra, Naming, check_merge, parse_expert, write_approximation, write_model
from llava_mole.interop.names import (
    HF_ADAPTER,
    LLAVA_PROJECTOR,
    LORA_WRAPPER,
    llava_hf_module,
    llava_hf_name,
    llava_name,
)
from llava_mole.interop.own import OwnCheckpoint, llava_projector, open_own, read_projector
from llava_mole.interop.publishing import check_target, publish
from llava_mole.interop.sources import read_source
from llava_mole.interop.tensors import read_json, save_pickle, write_label
from llava_mole.interop.towers import Tower, hugging_face_state, open_tower, write_hugging_face, write_open_clip

TOWER_DIR = "vision_tower"


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written."""

    model_base: Path | None = None
    expert: str | None = None
    """Replaces a mixture by one plain LoRA: the number of an expert, `uniform` or `usage`."""
    usage: Path | None = None
    mm_vision_tower: str | None = None
    """Name of the tower for LLaVA's config.json. None writes the tower beside it and names that."""
    tower_in_shards: bool = False
    """LLaVA layout: the tower's weights among the others, as LLaVA's full fine-tuning saves them."""
    unmerged: bool = False
    """llava-hf: the LoRA beside the model, for PEFT."""
    dtype: torch.dtype | None = None
    overwrite: bool = False


def export_projector(path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Write a projector: `.safetensors` with our names, or `.bin` with LLaVA's. `path` is any checkpoint with one."""
    if out.suffix not in (".bin", ".safetensors"):
        raise ConfigError(f"--out {out}: a projector's file ends in .bin (LLaVA's names) or .safetensors (ours)")
    check_target(out, overwrite=options.overwrite, inputs=[path], is_file=True)
    found = find_kind(path)
    if found.kind in ("run", "checkpoint"):
        from llava_mole.model.checkpoint import resolve_checkpoint

        state = read_projector(resolve_checkpoint(path))
        kind = "linear" if set(state) == {"0.weight", "0.bias"} else "mlp"
    else:
        source = read_source(path)
        state, kind = source.projector, str(source.projector_kind)
    with publish(out, overwrite=options.overwrite, inputs=[path], is_file=True) as temporary:
        if out.suffix == ".bin":
            save_pickle(_llava_projector_state(state, kind, LLAVA_PROJECTOR), temporary)
        else:
            from safetensors.torch import save_file

            save_file({f"mm_projector.{n}": v.contiguous() for n, v in state.items()}, temporary)
    return []


def export_tower(path: Path, out: Path, options: ExportOptions, *, open_clip: bool, name: str | None) -> list[str]:
    """Write a vision tower in the other layout. `path` is a tower, or a checkpoint with one."""
    inputs = [path, options.model_base]
    check_target(out, overwrite=options.overwrite, inputs=inputs)
    tower, ratio = _any_tower(path, name, options)
    with publish(out, overwrite=options.overwrite, inputs=[*inputs, tower.weights]) as temporary:
        if open_clip:
            write_open_clip(tower, temporary)
        else:
            write_hugging_face(tower, temporary, ratio)
        write_label(temporary, {"converted": "vision tower", "from": str(path.resolve()), "exact": True})
    return [f"activation {tower.activation}"]


def export_peft(path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Write a PEFT adapter for the language model, with `mm_projector.bin` beside it.

    A mixture stays one; `import llava_mole.mole` comes before `PeftModel.from_pretrained` then.
    """

    def write(own: OwnCheckpoint, adapter: Path, lora: Lora | None, temporary: Path) -> float | None:
        for file in sorted(adapter.iterdir()):
            if file.name.startswith("adapter_"):
                shutil.copyfile(file, temporary / file.name)
        _write_projector(own, temporary, bin_if_possible=True)
        return None

    return _export(path, out, options, "a PEFT adapter", write, mole_stays=True, unmerged=True)


def export_llava_lora(path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Write LLaVA-1.5's LoRA layout: adapter, `non_lora_trainables.bin`, config.json."""

    def write(own: OwnCheckpoint, adapter: Path, lora: Lora | None, temporary: Path) -> float | None:
        if lora is None:
            raise ConfigError(f"{own.path} has no adapter; export it with --to llava")
        write_lora(lora, temporary / "adapter", str(own.language_model))
        for file in (temporary / "adapter").iterdir():
            file.rename(temporary / file.name)
        (temporary / "adapter").rmdir()
        state = _llava_projector_state(own.projector, own.config.model.projector, LORA_WRAPPER + LLAVA_PROJECTOR)
        save_pickle(state, temporary / NON_LORA_FILE)
        _write_llava_config(own, temporary, out, options)
        return None

    return _export(path, out, options, "LLaVA-1.5's LoRA layout", write, unmerged=True)


def export_llava(path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Write a full LLaVA-1.5 checkpoint, its LoRA merged."""

    def write(own: OwnCheckpoint, adapter: Path, lora: Lora | None, temporary: Path) -> float | None:
        projector = llava_projector(own.projector, own.config.model.projector)
        tower = hugging_face_state(own.tower) if options.tower_in_shards else {}
        write_model(temporary, own, lora, Extra(projector, tower, {}), llava_name, options.dtype)
        copy_tokenizer(own.language_model, temporary)
        _write_llava_config(own, temporary, out, options)
        return _checked(temporary, own, adapter, lora, llava_name)

    return _export(path, out, options, "a full LLaVA-1.5 checkpoint", write)


def export_llava_hf(path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Write a checkpoint of `transformers.LlavaForConditionalGeneration` with its processor.

    Its LoRA is merged, or a PEFT adapter of that class in `adapter/`.
    """

    def write(own: OwnCheckpoint, adapter: Path, lora: Lora | None, temporary: Path) -> float | None:
        from transformers import GenerationConfig

        projector = llava_projector(own.projector, own.config.model.projector)
        tokenizer, image_id = tokenizer_with_image(own)
        grow = embeddings_to_grow(own, tokenizer, image_id)
        rows = max(own.skeleton.config.get_text_config().vocab_size, image_id + 1)
        config = llava_config(own, image_id, rows)
        config.dtype = options.dtype or own.weights[next(iter(own.weights))].dtype
        extra = Extra(projector, hugging_face_state(own.tower), grow)
        write_model(temporary, own, None if options.unmerged else lora, extra, llava_hf_name, options.dtype)
        config.save_pretrained(str(temporary))
        write_processor(own, tokenizer, temporary)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(str(temporary))
        if not options.unmerged:
            return _checked(temporary, own, adapter, lora, llava_hf_name)
        if lora is None:
            raise ConfigError(f"{own.path} has no adapter; leave --unmerged out")
        write_lora(lora.renamed(llava_hf_module), temporary / HF_ADAPTER, str(out.resolve()))
        return None

    return _export(path, out, options, "the layout of llava-hf", write, unmerged=options.unmerged)


def _export(
    path: Path,
    out: Path,
    options: ExportOptions,
    layout: str,
    write: Callable[[OwnCheckpoint, Path, Lora | None, Path], float | None],
    *,
    mole_stays: bool = False,
    unmerged: bool = False,
) -> list[str]:
    """Open the checkpoint, settle which adapter is written, write, label and publish."""
    inputs = [path, options.model_base, options.usage]
    check_target(out, overwrite=options.overwrite, inputs=inputs)
    own = open_own(path, options.model_base)
    inputs += [own.path, own.language_model, own.tower.weights]
    check_target(out, overwrite=options.overwrite, inputs=inputs)
    expert = None if options.expert is None else parse_expert(options.expert)
    if expert is not None and own.method != "mole":
        raise ConfigError(f"--expert is for mixtures of experts; {own.path} has adapter.method {own.method!r}")
    if own.method == "none" and mole_stays:
        raise ConfigError(f"{own.path} has no adapter; export its projector with --to projector")
    if own.method == "mole" and expert is None and not mole_stays:
        raise ConfigError(
            f"{own.path} is a mixture of experts, which cannot be merged or written as one LoRA; --expert k, uniform "
            "or usage writes an approximation, --to peft the mixture itself"
        )
    notes = [] if unmerged else _quantization_note(own)
    with (
        publish(out, overwrite=options.overwrite, inputs=inputs) as temporary,
        tempfile.TemporaryDirectory() as scratch,
    ):
        temporary.mkdir(parents=True)
        adapter = own.adapter_dir
        if expert is not None:
            adapter = Path(scratch) / "lora"
            notes.insert(0, write_approximation(own, expert, options.usage, adapter))
        lora = own.lora(adapter) if own.method == "lora" or expert is not None else None
        difference = write(own, adapter, lora, temporary)
        fields = {
            "converted": f"to {layout}",
            "from": str(own.path.resolve()),
            "template": own.manifest["template"],
            "fingerprints": own.manifest["fingerprints"],
            "exact": not notes,
            **({"approximation": " ".join(notes)} if notes else {}),
            **({"largest_logit_difference_of_the_merge": difference} if difference is not None else {}),
        }
        write_label(temporary, fields)
        _write_readme(temporary, fields, own.method == "mole" and expert is None)
        if notes:
            _label_config(temporary, " ".join(notes))
    merged = [] if difference is None else [f"merged logits differ from unmerged by at most {difference:.1e}"]
    return [*notes, *merged]


def _checked(directory: Path, own: OwnCheckpoint, adapter: Path, lora: Lora | None, naming: Naming) -> float | None:
    return None if lora is None else check_merge(directory, own, adapter, naming)


def _quantization_note(own: OwnCheckpoint) -> list[str]:
    quantization = own.manifest.get("quantization", "none")
    if quantization == "none" or own.method == "none":
        return []
    return [
        f"APPROXIMATION: the adapter was trained on a language model in {quantization} and is merged into the original."
    ]


def _llava_projector_state(state: dict[str, torch.Tensor], kind: str, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value.clone() for name, value in llava_projector(state, kind).items()}


def _write_projector(own: OwnCheckpoint, directory: Path, *, bin_if_possible: bool) -> None:
    """LLaVA's file where LLaVA has such a projector, else ours."""
    try:
        state = _llava_projector_state(own.projector, own.config.model.projector, LLAVA_PROJECTOR)
    except ConfigError:
        shutil.copyfile(own.path / "mm_projector.safetensors", directory / "mm_projector.safetensors")
    else:
        save_pickle(state, directory / PROJECTOR_FILE)


def _write_llava_config(own: OwnCheckpoint, directory: Path, out: Path, options: ExportOptions) -> None:
    """LLaVA's config.json; the tower goes beside it unless it is named. Raises ConfigError for other models."""
    config = read_json(own.language_model / "config.json")
    types = {inner: (outer, f"Llava{inner.capitalize()}ForCausalLM") for outer, (inner, _) in LLAVA_MODEL_TYPES.items()}
    if config.get("model_type") not in types:
        raise ConfigError(
            f"{own.language_model} is a {config.get('model_type')!r}; LLaVA's layout has {', '.join(types)}"
        )
    model_type, architecture = types[config["model_type"]]
    tower_name = options.mm_vision_tower
    if tower_name is None:
        write_hugging_face(own.tower, directory / TOWER_DIR, own.aspect_ratio)
        tower_name = str((out / TOWER_DIR).resolve())
    parts: dict[str, Any] = {
        "model_type": model_type,
        "architectures": [architecture],
        "mm_vision_tower": tower_name,
        "mm_hidden_size": own.tower.width,
        "mm_projector_type": own.config.model.projector,
        "mm_vision_select_layer": own.config.model.vision_tower.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "image_aspect_ratio": own.aspect_ratio,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": own.config.data.max_length,
    }
    if options.dtype is not None:
        parts["dtype"] = parts["torch_dtype"] = str(options.dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps({**config, **parts}, indent=1) + "\n", encoding="utf-8")


def _label_config(directory: Path, note: str) -> None:
    """Into config.json, where there is one; PEFT would warn of a strange key in adapter_config.json at every load."""
    if (directory / "config.json").is_file():
        content = {**read_json(directory / "config.json"), "llava_mole_note": note}
        (directory / "config.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _write_readme(directory: Path, fields: dict[str, Any], is_mixture: bool) -> None:
    lines = [f"# {fields['converted'].removeprefix('to ').capitalize()}, written by llava_mole", ""]
    if "approximation" in fields:
        lines += [f"**{fields['approximation']}**", ""]
    lines += [f"- from: `{fields['from']}`", f"- conversation template: `{fields['template']}`"]
    lines += [f"- fingerprint of the {part.replace('_', ' ')}: `{v}`" for part, v in fields["fingerprints"].items()]
    if is_mixture:
        lines += ["", "A mixture of LoRA experts: `import llava_mole.mole` before `PeftModel.from_pretrained`."]
    (directory / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _any_tower(path: Path, name: str | None, options: ExportOptions) -> tuple[Tower, str]:
    """The tower of `path`, and what its images go through."""
    found = find_kind(path)
    if found.kind in ("clip", "open_clip"):
        return open_tower(path, name), "square"
    if found.kind in ("run", "checkpoint"):
        own = open_own(path, options.model_base)
        return own.tower, own.aspect_ratio
    source = read_source(path)
    if not source.tower_names or source.tower_config is None:
        raise WeightsError(f"{path} ({found.kind}) does not hold a whole vision tower; convert the tower's directory")
    from llava_mole.interop.towers import tower_from_parts

    return tower_from_parts(source.tower_state(), source.tower_config, path), source.aspect_ratio or "pad"
