"""Tensor names of a multimodal model: LLaVA-1.5's layout and the two of `llava-hf`."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from llava_mole.common.errors import WeightsError
from llava_mole.common.text import count_of, shorten
from llava_mole.model.multimodal_projector import NEWLINE_KEY

WRAPPER = "base_model.model."
"""Prefix that PEFT adds to the names of the model it wraps."""
LLAVA_PROJECTOR = "model.mm_projector."
LLAVA_TOWER = "model.vision_tower.vision_tower.vision_model."
HF_LINEARS = {"linear_1": "0", "linear_2": "2"}
"""llava-hf's name of a projector layer -> its position in LLaVA's `mlp2x_gelu`."""
HF_NEWLINE = "image_newline"
"""LLaVA-NeXT's vector that ends a row of tiles, our `NEWLINE_KEY`."""
BUFFERS = ("rotary_emb.inv_freq", "position_ids")
"""Endings of constant buffers that older versions of transformers stored. They are not weights and are skipped."""


def spelled_twice(one: str, other: str) -> str:
    """Error text for a tensor stored under two names."""
    return f"{one} and {other} are one tensor in two spellings; remove one of them"


@dataclass
class Parts:
    """The tensor names of a file, sorted by part: name within the part -> name in the file."""

    language_model: dict[str, str] = field(default_factory=dict)
    """Named as in a causal LM of transformers: `model.layers...`, `lm_head.weight`."""
    projector: dict[str, str] = field(default_factory=dict)
    """`0.weight`, `0.bias`, `2.weight`, ..."""
    tower: dict[str, str] = field(default_factory=dict)
    """Hugging Face's CLIP names, without prefix."""
    unknown: list[str] = field(default_factory=list)
    doubled: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of names in the file that mean the same tensor."""

    def put(self, part: dict[str, str], inner: str, name: str) -> None:
        """Record that the file stores tensor `inner` of a part as `name`. Constant buffers are skipped."""
        if inner.endswith(BUFFERS):
            return
        if inner in part:
            self.doubled.append((part[inner], name))
        part[inner] = name

    def check(self, where: object) -> None:
        """Raise WeightsError if names belong to no part, or two names mean the same tensor."""
        if self.doubled:
            raise WeightsError(f"{where}: {spelled_twice(*self.doubled[0])}")
        if self.unknown:
            raise WeightsError(f"{where}: {count_of(len(self.unknown), 'unexpected tensor')}: {shorten(self.unknown)}")


def split_llava(names: Iterable[str]) -> Parts:
    """Sort the names of a LLaVA-1.5 file: full checkpoint, `non_lora_trainables.bin` or `mm_projector.bin`."""
    parts = Parts()
    for name in names:
        short = unwrap(name)
        before, is_projector, inner = short.partition("mm_projector.")
        if is_projector and before in ("", "model."):
            parts.put(parts.projector, inner, name)
        elif short.startswith("model.vision_tower."):
            inner = short.removeprefix("model.vision_tower.").removeprefix("vision_tower.")
            parts.put(parts.tower, inner.removeprefix("vision_model."), name)
        elif short.startswith(("model.image_newline", "model.vision_resampler.")):
            parts.unknown.append(name)
        else:
            parts.put(parts.language_model, short, name)
    return parts


def unwrap(name: str) -> str:
    """A name without PEFT's prefix and without the doubled `model.` of older files."""
    name = name.removeprefix(WRAPPER)
    return name.removeprefix("model.") if name.startswith("model.model.") else name


def split_llava_hf(names: Iterable[str]) -> Parts:
    """Sort the names of a `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`, old or new layout."""
    parts = Parts()
    for name in names:
        short = name.removeprefix("model.")
        linear, _, kind = short.removeprefix("multi_modal_projector.").partition(".")
        if short.startswith("vision_tower."):
            parts.put(parts.tower, short.removeprefix("vision_tower.").removeprefix("vision_model."), name)
        elif short.startswith("multi_modal_projector.") and linear in HF_LINEARS:
            parts.put(parts.projector, f"{HF_LINEARS[linear]}.{kind}", name)
        elif short == HF_NEWLINE:
            parts.put(parts.projector, NEWLINE_KEY, name)
        elif name.startswith("model.language_model."):
            parts.put(parts.language_model, "model." + name.removeprefix("model.language_model."), name)
        elif name.startswith(("language_model.", "lm_head.")):
            parts.put(parts.language_model, name.removeprefix("language_model."), name)
        else:
            parts.unknown.append(name)
    return parts


def llava_name(part: str, name: str) -> str:
    """The name of a tensor in a full LLaVA-1.5 checkpoint. `part` is language_model, projector or tower."""
    return {"language_model": "", "projector": LLAVA_PROJECTOR, "tower": LLAVA_TOWER}[part] + name


def llava_hf_name(part: str, name: str) -> str:
    """The name of a tensor in a `llava-hf` checkpoint, in the old layout, which every version of transformers reads."""
    if part == "projector" and name == NEWLINE_KEY:
        return HF_NEWLINE
    if part == "projector":
        position, _, kind = name.partition(".")
        linears = {ours: theirs for theirs, ours in HF_LINEARS.items()}
        return f"multi_modal_projector.{linears[position]}.{kind}"
    return {"language_model": "language_model.", "tower": "vision_tower.vision_model."}[part] + name


def llava_hf_module(path: str) -> str:
    """The path in `LlavaForConditionalGeneration` of a module of its language model (`model.layers...`)."""
    return "model.language_model." + path.removeprefix("model.")
