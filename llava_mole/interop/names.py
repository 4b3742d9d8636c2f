"""The names of a multimodal model's tensors in LLaVA-1.5's layout and in the two of `llava-hf`."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from llava_mole.common.errors import WeightsError
from llava_mole.interop.tensors import shorten, two_spellings

LLAVA_PROJECTOR = "model.mm_projector."
LLAVA_TOWER = "model.vision_tower.vision_tower.vision_model."
LORA_WRAPPER = "base_model.model."
"""What PEFT puts in front of the names of the model it wraps."""

HF_LINEARS = {"linear_1": "0", "linear_2": "2"}
"""llava-hf's projector -> position in LLaVA's `mlp2x_gelu`."""
HF_ADAPTER = "adapter"
"""Where an unmerged LoRA lies beside a `llava-hf` checkpoint of ours."""


@dataclass
class Parts:
    """The names in a file by part: name within the part -> name in the file."""

    language_model: dict[str, str] = field(default_factory=dict)
    """As transformers names a causal LM's: `model.layers...`, `lm_head.weight`."""
    projector: dict[str, str] = field(default_factory=dict)
    """`0.weight`, `0.bias`, `2.weight`, ..."""
    tower: dict[str, str] = field(default_factory=dict)
    """Hugging Face's CLIP names, without prefix."""
    unknown: list[str] = field(default_factory=list)
    doubled: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of names in the file that mean the same tensor."""

    def put(self, part: dict[str, str], inner: str, name: str) -> None:
        """Enter the name in the file of a part's tensor."""
        if inner in part:
            self.doubled.append((part[inner], name))
        part[inner] = name

    def check(self, where: object) -> None:
        """Raise WeightsError that lists names which belong to no part, or names two that mean one tensor."""
        if self.doubled:
            raise WeightsError(f"{where}: {two_spellings(*self.doubled[0])}")
        if self.unknown:
            raise WeightsError(f"{where}: {len(self.unknown)} unexpected tensors: {shorten(self.unknown)}")


def unwrap(name: str) -> str:
    """A name without PEFT's wrapper and without the doubled `model.` of LLaVA's older files."""
    name = name.removeprefix(LORA_WRAPPER)
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def split_llava(names: Iterable[str]) -> Parts:
    """Sort the names of a LLaVA-1.5 file (full, `non_lora_trainables.bin` or `mm_projector.bin`) by part."""
    parts = Parts()
    for name in names:
        short = unwrap(name)
        if "mm_projector." in short and short.partition("mm_projector.")[0] in ("", "model."):
            parts.put(parts.projector, short.partition("mm_projector.")[2], name)
        elif short.startswith("model.vision_tower."):
            inner = short.removeprefix("model.vision_tower.").removeprefix("vision_tower.")
            _put_tower(parts, inner, name)
        elif short.startswith(("model.image_newline", "model.vision_resampler.")):
            parts.unknown.append(name)
        else:
            _put_language_model(parts, short, name)
    return parts


def split_llava_hf(names: Iterable[str]) -> Parts:
    """Sort the names of a `LlavaForConditionalGeneration` by part; old names and new ones."""
    parts = Parts()
    for name in names:
        short = name.removeprefix("model.")
        if short.startswith("vision_tower."):
            _put_tower(parts, short.removeprefix("vision_tower."), name)
        elif short.startswith("multi_modal_projector."):
            linear, _, kind = short.removeprefix("multi_modal_projector.").partition(".")
            if linear in HF_LINEARS:
                parts.put(parts.projector, f"{HF_LINEARS[linear]}.{kind}", name)
            else:
                parts.unknown.append(name)
        elif name.startswith("model.language_model."):
            _put_language_model(parts, "model." + name.removeprefix("model.language_model."), name)
        elif name.startswith("language_model."):
            _put_language_model(parts, name.removeprefix("language_model."), name)
        elif name.startswith("lm_head."):
            _put_language_model(parts, name, name)
        else:
            parts.unknown.append(name)
    return parts


def llava_name(part: str, name: str) -> str:
    """The name in a full LLaVA-1.5 checkpoint of tensor `name` of a part: language_model, projector or tower."""
    return {"language_model": "", "projector": LLAVA_PROJECTOR, "tower": LLAVA_TOWER}[part] + name


def llava_hf_name(part: str, name: str) -> str:
    """The name in a `llava-hf` checkpoint, in the old form, which every version of transformers reads."""
    if part == "projector":
        position, _, kind = name.partition(".")
        linears = {ours: theirs for theirs, ours in HF_LINEARS.items()}
        return f"multi_modal_projector.{linears[position]}.{kind}"
    return {"language_model": "language_model.", "tower": "vision_tower.vision_model."}[part] + name


def llava_hf_module(path: str) -> str:
    """What `LlavaForConditionalGeneration` calls a module of its language model (`model.layers...`)."""
    return "model.language_model." + path.removeprefix("model.")


def _put_tower(parts: Parts, inner: str, name: str) -> None:
    inner = inner.removeprefix("vision_model.")
    if not inner.endswith("position_ids"):  # a constant that older versions of transformers stored
        parts.put(parts.tower, inner, name)


def _put_language_model(parts: Parts, inner: str, name: str) -> None:
    if not inner.endswith("rotary_emb.inv_freq"):  # likewise
        parts.put(parts.language_model, inner, name)
