"""The model card of a saved adapter: how to load it, and what it is."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, ModelCard
from peft import PeftConfig

_BEGIN, _END = "<!-- MoLE, written on saving: begin -->", "<!-- MoLE: end -->"
_TAGS = ("lora", "mixture-of-experts", "mole")
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}  # fmt: skip
"""Class of transformers that loads the base model of a task; others load with AutoModel."""


def write_card(
    directory: Path, config: Any, presets: Mapping[str, Mapping[str, Any]], base_class: Mapping[str, str] | None
) -> None:
    """Complete the README.md of a saved adapter, or write one. What its owner has written into it stays.

    Args:
        directory: holds the adapter's files.
        config: the adapter's `MoleConfig`.
        presets: the presets, by name.
        base_class: PEFT's `auto_mapping`: `base_model_class` and `parent_library` of the base model.
    """
    file = directory / "README.md"
    card = ModelCard.load(file) if file.is_file() else ModelCard("---\nlibrary_name: peft\n---\n# MoLE adapter\n")
    base = config.base_model_name_or_path or None
    _label(card.data, base)
    before, found, rest = card.text.partition(_BEGIN)
    after = rest.partition(_END)[2] if found else card.text
    section = _section(config, presets, base_class or {}, card.data.get("license"))
    card.text = f"{before if found else ''}{_BEGIN}\n{section}\n{_END}{after if found else f'{chr(10)}{after}'}"
    card.save(file)


def _label(data: CardData, base: str | None) -> None:
    """Tags, base model and licence in the header."""
    tags = {*(data.get("tags") or []), *_TAGS} - {"base_model:adapter:"}
    data["tags"] = sorted(tags)
    if base is not None:
        data["base_model"] = base
    elif not data.get("base_model"):
        data.pop("base_model", None)
    if not data.get("license"):
        known = _licence_of(base)
        data["license"] = known or "other"
        if known is None and not data.get("license_name"):
            data["license_name"] = "license-of-the-base-model"


def _licence_of(base: str | None) -> str | None:
    """The licence in the card of a base model in a local directory."""
    file = Path(base or "") / "README.md"
    if base is None or not file.is_file():
        return None
    licence = ModelCard.load(file).data.get("license")
    return licence if isinstance(licence, str) else None


def _section(config: Any, presets: Mapping[str, Mapping[str, Any]], base_class: Mapping[str, str], licence: str) -> str:
    library = base_class.get("parent_library", "transformers").partition(".")[0]
    name = base_class.get("base_model_class") or _CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    name = name or "AutoModel"
    base = config.base_model_name_or_path or "BASE_MODEL"
    preset, others = _preset(config, presets)
    rows = {
        "base model": f"`{base}`",
        "experts (K)": config.num_experts if config.experts_by_layer is None else f"{config.experts_by_layer} by layer",
        "LoRA rank (r)": config.r,
        "alpha": f"{config.alpha:g}",
        "preset": preset,
        "other options": ", ".join(f"`{key}={value!r}`" for key, value in others.items()) or "none",
        "licence": "that of the base model" if licence == "other" else licence,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""## How to load this mixture of LoRA experts (MoLE)

```python
import llava_mole.mole  # registers MoLE in PEFT, which otherwise ends with KeyError: 'MOLE'
from peft import PeftModel
from {library} import {name}

base = {name}.from_pretrained({base!r})
model = PeftModel.from_pretrained(base, "DIRECTORY")  # where this file lies
```

| | |
|---|---|
{table}
"""


def _preset(config: Any, presets: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The preset of a configuration, and its options beyond that, sizes and places apart."""
    defaults = type(config)(r=config.r, num_experts=config.num_experts)
    base_options = {option.name for option in dataclasses.fields(PeftConfig)}
    apart = {
        *base_options, "r", "alpha", "num_experts", "target_modules", "attention_modules", "ffn_modules",
        "base_fingerprint",
    }  # fmt: skip
    values = {option.name: getattr(config, option.name) for option in dataclasses.fields(config)}
    changed = {key: v for key, v in values.items() if key not in apart and v != getattr(defaults, key)}
    known = {name: {key: v for key, v in changes.items() if key not in apart} for name, changes in presets.items()}
    fitting = [name for name, changes in known.items() if all(changed.get(key) == v for key, v in changes.items())]
    best = max(fitting, key=lambda name: len(known[name]), default="none")
    return best, {key: value for key, value in changed.items() if key not in known.get(best, {})}
