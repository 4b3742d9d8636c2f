"""`llava-mole convert SOURCE --to FORMAT --out PATH`: imports and exports checkpoints (docs/interop.md)."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, WeightsError, command
from llava_mole.common.log import setup_logging
from llava_mole.conversation import TOKENIZER_TEMPLATE, get_template

FORMATS = {
    "checkpoint": "a run directory of llava_mole, from LLaVA-1.5, llava-hf or the authors' .pt",
    "projector": "mm_projector: FILE.bin with LLaVA's names or FILE.safetensors with ours",
    "inference": "a checkpoint of ours without its optimizer, a third of the size; cannot be resumed",
    "open-clip": "the vision tower for model.vision_tower",
    "hf-clip": "the vision tower as a CLIPVisionModel of transformers",
    "llava": "full LLaVA-1.5, LoRA merged",
    "llava-lora": "LLaVA-1.5's LoRA layout with non_lora_trainables.bin, for --model-base",
    "llava-hf": "LlavaForConditionalGeneration of transformers with processor, LoRA merged",
    "llava-next-hf": "the same with LlavaNextForConditionalGeneration, for data.image_aspect_ratio anyres",
    "vllm": "llava-hf with the experts in static form, for the plug-in of vLLM",
    "peft": "the adapter, plain or mixture, for PeftModel.from_pretrained, with the projector",
}
LAYOUT_NAMES = ("llava", "llava-lora", "llava-hf", "llava-next-hf", "peft", "vllm")
"""The names of `LAYOUTS` of `exporting`, which takes too long to import for a command's options."""
WITH_PARTS = ("checkpoint", "open-clip", "hf-clip", *LAYOUT_NAMES)
USED_BY = {
    "model_base": WITH_PARTS,
    "vision_tower": WITH_PARTS,
    "vision_tower_name": ("checkpoint", "open-clip", "hf-clip"),
    **dict.fromkeys(("template", "image_aspect_ratio", "select_layer", "alpha", "mode"), ("checkpoint",)),
    **dict.fromkeys(("expert", "usage"), ("llava", "llava-lora", "llava-hf", "llava-next-hf", "peft")),
    "mm_vision_tower": ("llava", "llava-lora"),
    "tower_in_shards": ("llava",),
    "unmerged": ("llava-hf", "llava-next-hf"),
    "dtype": ("llava", "llava-lora", "llava-hf", "llava-next-hf", "vllm"),
}
"""Option -> the formats that read it."""
FOREIGN = ("llava", "llava-lora", "llava-projector", "projector", "llava-hf", "llava-next-hf", "released-mole")
HINTS = {
    "language-model": "it needs no conversion: name it as model.language_model",
    "clip": "name it as model.vision_tower.name, or convert it with --to open-clip",
    "open_clip": "it needs no conversion: name it as model.vision_tower",
    "vision-tower": "it needs no conversion: name it as model.vision_tower.name",
    "peft": "it has no projector; train from it with mole.surgery, or give the whole LLaVA directory",
}
"""What to do with a source that cannot become a checkpoint."""


def _parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:<14}{text}" for name, text in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="llava-mole convert",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Import a checkpoint of another program, or export one of ours.\n"
        "The content of SOURCE decides what it is, not its name.",
        epilog=f"formats:\n{formats}",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="checkpoint, run, model directory or weight file")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="format of the result; they are listed below")
    parser.add_argument("--out", required=True, type=Path, help="directory (projector: file) to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the result of an earlier conversion")
    parser.add_argument("--model-base", type=Path, metavar="DIR", help="language model that SOURCE was trained on")
    tower_help = "its vision tower: open_clip directory or weight file, to checkpoint also a CLIP directory"
    parser.add_argument("--vision-tower", type=Path, metavar="PATH", help=tower_help)
    imports = parser.add_argument_group("to checkpoint")
    imports.add_argument("--vision-tower-name", metavar="NAME", help="open_clip model name of a file without config")
    imports.add_argument("--template", help="conversation template (default: vicuna_v1; plain for a projector)")
    ratio_help = "how images become square (default: as recorded, or pad)"
    imports.add_argument("--image-aspect-ratio", choices=("pad", "square"), help=ratio_help)
    imports.add_argument("--select-layer", type=int, metavar="N", help="tower layer (default: as recorded, or -2)")
    imports.add_argument("--alpha", type=float, help="LoRA alpha of the authors' .pt (default: 2 r)")
    imports.add_argument("--mode", choices=("sparse", "dense"), help="mode of the authors' .pt (default: sparse)")
    exports = parser.add_argument_group("to llava, llava-lora, llava-hf, llava-next-hf, peft")
    exports.add_argument("--expert", metavar="K|uniform|usage", help="replace a mixture by one LoRA: approximate")
    exports.add_argument("--usage", type=Path, metavar="FILE", help="routing.json of `llava-mole eval` for usage")
    tower_help = "tower's name in LLaVA's config.json; without it, the tower is written"
    exports.add_argument("--mm-vision-tower", metavar="NAME", help=tower_help)
    exports.add_argument("--tower-in-shards", action="store_true", help="llava: store the tower with the other weights")
    exports.add_argument("--unmerged", action="store_true", help="llava-hf: write the LoRA to OUT/adapter, for PEFT")
    dtype_help = "dtype of the weights written (default: as stored in the language model)"
    exports.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help=dtype_help)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and print what was assumed or approximated."""
    arguments = _parser().parse_args(argv)
    if arguments.to not in FORMATS:
        raise ConfigError(f"--to {arguments.to!r}: there are {', '.join(FORMATS)}")
    for name, formats in USED_BY.items():
        if getattr(arguments, name) not in (None, False) and arguments.to not in formats:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is for --to {', '.join(formats)}, not {arguments.to}; leave it out")
    if arguments.template not in (None, TOKENIZER_TEMPLATE):
        get_template(arguments.template)
    setup_logging()
    try:
        notes = _convert(arguments)
    except OSError as error:
        raise WeightsError(f"{arguments.out} could not be written: {error}; it is unchanged") from None
    print(f"wrote {arguments.out}")
    for note in notes:
        print(f"  {note}")
    return 0


def _convert(arguments: argparse.Namespace) -> list[str]:
    import torch

    from llava_mole.interop.exporting import (
        LAYOUTS,
        ExportOptions,
        export_checkpoint,
        export_inference,
        export_projector,
        export_tower,
    )
    from llava_mole.interop.importing import ImportOptions, import_checkpoint
    from llava_mole.interop.kinds import KINDS, find_kind

    source, out, to = arguments.source, arguments.out, arguments.to
    if arguments.dtype is not None:
        arguments.dtype = getattr(torch, arguments.dtype)
    options: ExportOptions = _options(ExportOptions, arguments)
    if to == "projector":
        return export_projector(source, out, options)
    if to in ("open-clip", "hf-clip"):
        return export_tower(source, out, options, open_clip=to == "open-clip", name=arguments.vision_tower_name)
    kind = find_kind(source).kind
    if to == "inference" or to in LAYOUTS:
        if kind not in ("run", "checkpoint"):
            raise ConfigError(f"{source} is {KINDS[kind]}; make it a checkpoint first, with --to checkpoint")
        if to == "inference":
            return export_inference(source, out, options)
        return export_checkpoint(source, out, options, LAYOUTS[to])
    if kind not in FOREIGN:
        raise ConfigError(f"{source} is {KINDS[kind]}; {HINTS.get(kind, 'it is already ours')}")
    return import_checkpoint(source, out, _options(ImportOptions, arguments))


def _options(kind: Any, arguments: argparse.Namespace) -> Any:
    """An instance of the dataclass `kind`, whose fields are named after the arguments."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


if __name__ == "__main__":
    raise SystemExit(main())
