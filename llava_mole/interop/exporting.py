"""Exports checkpoints of this package in the layouts of LLaVA-1.5, llava-hf and PEFT."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError
from llava_mole.config import DataConfig
from llava_mole.interop.causal_lm import LLAVA_MODEL_TYPES, copy_tokenizer
from llava_mole.interop.hf_processor import embeddings_to_grow, llava_config, tokenizer_with_image, write_processor
from llava_mole.interop.kinds import LLAVA_PROJECTOR_FILE, NON_LORA_FILE, find_kind
from llava_mole.interop.lora import Lora, read_lora, write_lora
from llava_mole.interop.merging import StaticMixture, merge_lora, parse_expert, read_static, write_approximation
from llava_mole.interop.names import LLAVA_PROJECTOR, WRAPPER, llava_hf_module, llava_hf_name, llava_name
from llava_mole.interop.own import OwnCheckpoint, open_own
from llava_mole.interop.publishing import check_out, publish
from llava_mole.interop.sources import HF_ADAPTER, llava_projector, read_projector, read_source
from llava_mole.interop.tensors import read_object, save_pickle, save_tensors, write_label, write_object, write_shards
from llava_mole.interop.towers import Tower, open_tower, tower_from_hugging_face, write_hugging_face, write_open_clip
from llava_mole.model.builder import PROJECTOR_FILE, PROJECTOR_PREFIX
from llava_mole.model.checkpoint import (
    OWNER_FILE,
    SELF_HASH,
    TRAINER_DIR,
    read_manifest,
    resolve_checkpoint,
    write_checkpoint,
)

TOWER_DIR = "vision_tower"
VLLM_CLASS = "LlavaMoleForConditionalGeneration"
"""The architecture that the plug-in `serve/vllm` registers."""


@dataclass(frozen=True)
class ExportOptions:
    """How an export is written."""

    model_base: Path | None = None
    """Directory of the language model, if it is no longer where training found it."""
    vision_tower: Path | None = None
    """open_clip directory or weight file of the vision tower, likewise."""
    expert: str | None = None
    """Replaces a mixture by one plain LoRA: the number of an expert, `uniform` or `usage`."""
    usage: Path | None = None
    """`routing.json` of `llava-mole eval`, for `usage`."""
    mm_vision_tower: str | None = None
    """Name of the tower for LLaVA's config.json. None writes the tower beside it and names that."""
    tower_in_shards: bool = False
    """LLaVA's layout: store the tower with the other weights, as LLaVA's full fine-tuning does."""
    unmerged: bool = False
    """llava-hf: write the LoRA beside the model, for PEFT."""
    dtype: torch.dtype | None = None
    """Of the weights written; None keeps the stored dtypes."""
    overwrite: bool = False


def export_projector(path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Write the projector of any checkpoint: `.safetensors` with our names, or `.bin` with LLaVA's."""
    if out.suffix not in (".bin", ".safetensors"):
        raise ConfigError(f"--out {out}: a projector's file ends in .bin (LLaVA's names) or .safetensors (ours)")
    check_out(out, overwrite=options.overwrite, inputs=[path], is_file=True)
    is_own = find_kind(path).kind in ("run", "checkpoint")
    state = read_projector(resolve_checkpoint(path)) if is_own else read_source(path).projector
    with publish(out, overwrite=options.overwrite, inputs=[path], is_file=True) as temporary:
        if out.suffix == ".bin":
            save_pickle(llava_projector(state), temporary, LLAVA_PROJECTOR)
        else:
            save_tensors(state, temporary, PROJECTOR_PREFIX)
    return []


def export_tower(path: Path, out: Path, options: ExportOptions, *, open_clip: bool, name: str | None) -> list[str]:
    """Write a vision tower in open_clip's or Hugging Face's layout. `path` is a tower, or a checkpoint with one."""
    inputs = [path, options.model_base, options.vision_tower]
    check_out(out, overwrite=options.overwrite, inputs=inputs)
    tower, ratio = _find_tower(path, name, options)
    with publish(out, overwrite=options.overwrite, inputs=[*inputs, tower.weights]) as temporary:
        if open_clip:
            write_open_clip(tower, temporary)
        else:
            write_hugging_face(tower, temporary, ratio)
        write_label(temporary, {"converted": "vision tower", "from": str(path.resolve()), "exact": True})
    return [f"activation {tower.activation}"]


def _find_tower(path: Path, name: str | None, options: ExportOptions) -> tuple[Tower, str]:
    """The tower of `path`, and how its images become square."""
    found = find_kind(path)
    if found.kind in ("clip", "open_clip", "vision-tower"):
        return open_tower(path, name), "square"
    if found.kind in ("run", "checkpoint"):
        own = open_own(path, options.model_base, options.vision_tower)
        return own.tower, own.aspect_ratio
    source = read_source(path)
    if not source.tower or source.tower_config is None:
        raise WeightsError(f"{path} ({found.kind}) does not hold a whole vision tower; convert the tower's directory")
    return tower_from_hugging_face(source.tower, source.tower_config, path), source.aspect_ratio or "pad"


def export_inference(path: Path, out: Path, options: ExportOptions) -> list[str]:
    """Write a checkpoint without the state of its optimizer, two thirds of its size. It belongs to no run.

    Parts that the manifest names relative to the checkpoint get absolute paths. Raises CheckpointError if the
    checkpoint does not verify, and WeightsError if `out` may not be written.
    """
    check_out(out, overwrite=options.overwrite, inputs=[path])
    checkpoint = resolve_checkpoint(path)
    manifest = read_manifest(checkpoint)
    fields = {key: value for key, value in manifest.items() if key not in ("format", "files", "run", SELF_HASH)}
    inside = {name for file in manifest["files"] for name in (file, *map(str, Path(file).parents))}
    fields["paths"] = {
        key: str((checkpoint / value).resolve()) if "/" in value and value not in inside else value
        for key, value in manifest["paths"].items()
    }

    def write_files(folder: Path) -> None:
        for name in manifest["files"]:
            if name != OWNER_FILE and not name.startswith(f"{TRAINER_DIR}/"):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, folder / name)

    with publish(out, overwrite=options.overwrite, inputs=[path, checkpoint]) as temporary:
        write_checkpoint(temporary, write_files, fields)
        write_label(temporary, {"converted": "to a checkpoint for inference", "from": str(checkpoint.resolve())})
    return ["for inference and --init-from; no run can resume from it"]


@dataclass
class _Export:
    """An export while it is written."""

    own: OwnCheckpoint
    adapter: Path
    """Directory of the adapter to be exported."""
    lora: Lora | None
    """Its content if it is a plain LoRA; None without an adapter, or for a whole mixture."""
    options: ExportOptions
    out: Path
    """Final directory."""
    folder: Path
    """Temporary directory that becomes `out`."""
    difference: float | None = None
    """Largest difference of a logit that the merge made, if one was made."""
    advice: list[str] = field(default_factory=list)
    """What the user of the result has to know."""

    def write_weights(
        self,
        rename: Callable[[str, str], str],
        tower: Mapping[str, torch.Tensor],
        grow: Mapping[str, tuple[int, int]],
        static: StaticMixture | None = None,
    ) -> None:
        """Write language model (LoRA merged unless `unmerged`), projector and tower as one set of shards.

        `LlavaForConditionalGeneration.save_pretrained` would hold the whole model in memory, and its names depend on
        the version of transformers.

        Args:
            rename: (part, name in the part) -> name in the file; the parts are language_model, projector and tower.
            tower: tensors of the tower in Hugging Face's names; may be empty.
            grow: embedding matrices that get more rows: name -> (number of rows, row that the new ones copy).
            static: a mixture whose attention LoRA is merged and whose experts are written beside the language model.
        """
        own, dtype = self.own, self.options.dtype
        # LLaVA-NeXT has a place for the newline vector.
        projector = own.projector if own.grid is not None else llava_projector(own.projector)
        merged: dict[str, torch.Tensor] = {}
        if self.lora is not None and not self.options.unmerged:
            merged, self.difference = merge_lora(own, self.adapter, dtype)

        if static is not None:
            merged = dict(static.merged)

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in own.weights.items():
                if name in merged:
                    tensor = merged.pop(name).to(dtype or tensor.dtype)  # frees the float32 tensor
                if name in grow:
                    rows, copied = grow[name]
                    tensor = torch.cat([tensor, tensor[copied].expand(rows - tensor.shape[0], -1)])
                yield rename("language_model", name), tensor
            for part, state in (("projector", projector), ("tower", tower)):
                for name, tensor in state.items():
                    yield rename(part, name), tensor

        cast = ((n, t.to(dtype) if dtype is not None and t.is_floating_point() else t) for n, t in tensors())
        experts = () if static is None else ((rename("language_model", n), t) for n, t in static.experts.items())
        write_shards(self.folder, chain(experts, cast), "merged model" if merged else "model", own.weights.bytes)


def _write_llava(export: _Export) -> None:
    """Full LLaVA-1.5, its LoRA merged."""
    tower = export.own.tower.hugging_face_state() if export.options.tower_in_shards else {}
    export.write_weights(llava_name, tower, grow={})
    copy_tokenizer(export.own.language_model, export.folder)
    _write_llava_config(export)


def _write_llava_lora(export: _Export) -> None:
    """LLaVA-1.5's LoRA layout: adapter, `non_lora_trainables.bin`, config.json."""
    own = export.own
    if export.lora is None:
        raise ConfigError(f"{own.path} has no adapter; export it with --to llava")
    write_lora(export.lora, export.folder, str(own.language_model))
    save_pickle(llava_projector(own.projector), export.folder / NON_LORA_FILE, WRAPPER + LLAVA_PROJECTOR)
    _write_llava_config(export)


def _write_llava_hf(export: _Export) -> None:
    """`LlavaForConditionalGeneration` with its processor; the LoRA merged, or unmerged in `adapter/`."""
    own, options = export.own, export.options
    if options.unmerged and export.lora is None:
        raise ConfigError(f"{own.path} has no adapter; leave --unmerged out")
    _write_hugging_face_llava(export, None)
    if options.unmerged and export.lora is not None:
        write_lora(export.lora.renamed(llava_hf_module), export.folder / HF_ADAPTER, str(export.out.resolve()))


def _write_llava_next_hf(export: _Export) -> None:
    """`LlavaNextForConditionalGeneration` with its processor; else as `_write_llava_hf`."""
    if export.own.grid is None:
        raise ConfigError(
            f"{export.own.path} sees images by data.image_aspect_ratio {export.own.aspect_ratio!r}, LLaVA-NeXT by "
            "'anyres'; export it with --to llava-hf"
        )
    _write_llava_hf(export)


def _write_vllm(export: _Export) -> None:
    """llava-hf with the mixture in its static form, for the plug-in of vLLM."""
    own = export.own
    if own.method != "mole":
        raise ConfigError(f"{own.path} is no mixture; vLLM serves what --to llava-hf writes of it, without a plug-in")
    static = read_static(own, export.options.dtype or next(iter(own.weights.values())).dtype)
    _write_hugging_face_llava(export, static)
    config = read_object(export.folder / "config.json")
    experts = {llava_hf_name("language_model", path): layout for path, layout in static.layout.items()}
    write_object(export.folder / "config.json", {**config, "architectures": [VLLM_CLASS], "mole_experts": experts})


def _write_hugging_face_llava(export: _Export, static: StaticMixture | None) -> None:
    own, options = export.own, export.options
    tokenizer, image_id = tokenizer_with_image(own)
    config = llava_config(own, image_id)
    config.dtype = options.dtype or next(iter(own.weights.values())).dtype
    grow = embeddings_to_grow(own, tokenizer, image_id)
    export.write_weights(llava_hf_name, own.tower.hugging_face_state(), grow, static)
    config.save_pretrained(str(export.folder))
    export.advice += write_processor(own, tokenizer, export.folder)


def _write_peft(export: _Export) -> None:
    """The adapter as it is, with the projector beside it: LLaVA's file if LLaVA has such a projector, else ours."""
    for file in sorted(export.adapter.glob("adapter_*")):
        shutil.copyfile(file, export.folder / file.name)
    try:
        save_pickle(llava_projector(export.own.projector), export.folder / LLAVA_PROJECTOR_FILE, LLAVA_PROJECTOR)
    except ConfigError:
        shutil.copyfile(export.own.path / PROJECTOR_FILE, export.folder / PROJECTOR_FILE)


@dataclass(frozen=True)
class Layout:
    """A layout in which a checkpoint of this package can be exported."""

    title: str
    write: Callable[[_Export], None]
    merges: bool = False
    """Whether a LoRA is merged (unless `unmerged`)."""
    takes_mixture: bool = False
    tiled: bool = False
    """Whether it holds models that see images in tiles."""


LAYOUTS = {
    "llava": Layout("a full LLaVA-1.5 checkpoint", _write_llava, merges=True),
    "llava-lora": Layout("LLaVA-1.5's LoRA layout", _write_llava_lora),
    "llava-hf": Layout("the layout of llava-hf", _write_llava_hf, merges=True),
    "llava-next-hf": Layout("the layout of LLaVA-NeXT in llava-hf", _write_llava_next_hf, merges=True, tiled=True),
    "peft": Layout("a PEFT adapter", _write_peft, takes_mixture=True, tiled=True),
    "vllm": Layout("the layout of llava-hf with static experts, for vLLM", _write_vllm, takes_mixture=True),
}


def export_checkpoint(path: Path, out: Path, options: ExportOptions, layout: Layout) -> list[str]:
    """Write a run or checkpoint of this package in another layout.

    Returns:
        What was approximated, and how much the merge changed the logits.

    Raises:
        ConfigError: the checkpoint cannot be written in this layout with these options.
        CheckpointError, WeightsError: a part is missing or does not fit, or `out` may not be written.
    """
    inputs = [path, options.model_base, options.vision_tower, options.usage]
    check_out(out, overwrite=options.overwrite, inputs=inputs)
    own = open_own(path, options.model_base, options.vision_tower)
    inputs += [own.path, own.language_model, own.tower.weights]
    expert = None if options.expert is None else parse_expert(options.expert)
    if options.usage is not None and expert != "usage":
        raise ConfigError(f"--usage {options.usage} is for --expert usage, not {options.expert}")
    if expert is not None and own.method != "mole":
        raise ConfigError(f"--expert is for mixtures of experts; {own.path} has adapter.method {own.method!r}")
    if own.method == "none" and layout is LAYOUTS["peft"]:
        raise ConfigError(f"{own.path} has no adapter; export its projector with --to projector")
    if own.method == "mole" and expert is None and not layout.takes_mixture:
        raise ConfigError(
            f"{own.path} is a mixture of experts, which cannot be merged or written as one LoRA; --expert k, uniform "
            "or usage writes an approximation, --to peft the mixture itself"
        )
    if own.aspect_ratio == "native" and layout is not LAYOUTS["peft"]:
        raise ConfigError(
            f"{own.path} sees images in their own shape (data.image_aspect_ratio 'native'), for which {layout.title} "
            "has no place; export its adapter with --to peft"
        )
    if own.grid is not None and not layout.tiled:
        raise ConfigError(
            f"{own.path} sees images in tiles (data.image_aspect_ratio 'anyres'), for which {layout.title} has no "
            "place; export it with --to llava-next-hf"
        )
    notes = []
    quantization = own.manifest.get("quantization", "none")
    if layout.merges and not options.unmerged and "none" not in (quantization, own.method):
        notes.append(
            f"APPROXIMATION: the adapter was trained on a language model in {quantization} and is merged into the "
            "original."
        )
    with publish(out, overwrite=options.overwrite, inputs=inputs) as folder, tempfile.TemporaryDirectory() as scratch:
        folder.mkdir(parents=True)
        advice = [] if layout is LAYOUTS["peft"] else _unknown_to_others(own.config.data)
        export = _Export(own, own.adapter_dir, None, options, out, folder, advice=advice)
        if expert is not None:
            export.adapter = Path(scratch) / "lora"
            notes.insert(0, write_approximation(own, expert, options.usage, export.adapter))
        if own.method == "lora" or expert is not None:
            export.lora = read_lora(export.adapter, own.skeleton.linears())
        layout.write(export)
        _write_labels(export, layout.title, " ".join(notes))
    if export.difference is not None:
        notes.append(f"merged logits differ from unmerged by at most {export.difference:.1e}")
    return notes + export.advice


def _unknown_to_others(data: DataConfig) -> list[str]:
    """What the programs that read an export do to images and text otherwise than the run did."""
    notes = []
    if data.image_modes != "llava":
        notes.append(
            f"the run saw images by data.image_modes {data.image_modes!r}; other programs only convert to RGB: give "
            "them 8-bit RGB files without transparency and EXIF rotation"
        )
    if data.special_tokens != "keep":
        notes.append(
            f"the run read text by data.special_tokens {data.special_tokens!r}; other programs take `</s>` and the "
            "like in a user's text for control tokens"
        )
    return notes


def _write_llava_config(export: _Export) -> None:
    """Write LLaVA's config.json, and the tower beside it unless it is named. Raises ConfigError for other models."""
    own, options = export.own, export.options
    config = read_object(own.language_model / "config.json")
    types = {inner: (outer, f"Llava{inner.capitalize()}ForCausalLM") for outer, (inner, _) in LLAVA_MODEL_TYPES.items()}
    if config.get("model_type") not in types:
        raise ConfigError(
            f"{own.language_model} is a {config.get('model_type')!r}; LLaVA's layout has {', '.join(types)}"
        )
    if own.tower.kind != "clip_vision_model":
        raise ConfigError(f"the vision tower of {own.path} is {own.tower.kind!r}; LLaVA's layout has CLIP towers only")
    model_type, architecture = types[config["model_type"]]
    tower_name = options.mm_vision_tower
    if tower_name is None:
        write_hugging_face(own.tower, export.folder / TOWER_DIR, own.aspect_ratio)
        tower_name = str((export.out / TOWER_DIR).resolve())
    config |= {
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
        config["dtype"] = config["torch_dtype"] = str(options.dtype).removeprefix("torch.")
    write_object(export.folder / "config.json", config)


def _write_labels(export: _Export, title: str, note: str) -> None:
    """Write `llava_mole.json` and README.md. `note` says what is approximate; config.json gets it, too."""
    own, folder = export.own, export.folder
    fields: dict[str, Any] = {
        "converted": f"to {title}",
        "from": str(own.path.resolve()),
        "template": own.manifest["template"],
        "fingerprints": own.manifest["fingerprints"],
        "exact": not note,
    }
    lines = [f"# {title[0].upper()}{title[1:]}, written by llava_mole", ""]
    if note:
        fields["approximation"] = note
        lines += [f"**{note}**", ""]
        config = folder / "config.json"
        if config.is_file():  # not adapter_config.json, about which PEFT would warn at every load
            write_object(config, {**read_object(config), "llava_mole_note": note})
    if export.difference is not None:
        fields["largest_logit_difference_of_the_merge"] = export.difference
    write_label(folder, fields)
    lines += [f"- from: `{fields['from']}`", f"- conversation template: `{fields['template']}`"]
    lines += [f"- fingerprint of the {part.replace('_', ' ')}: `{v}`" for part, v in fields["fingerprints"].items()]
    lines += [f"- {text}" for text in export.advice]
    if own.method == "mole" and export.lora is None:
        lines += ["", "A mixture of LoRA experts: `import llava_mole.mole` before `PeftModel.from_pretrained`."]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
