"""`llava-mole convert SOURCE --to FORMAT --out PATH`: checkpoints of others in, ours out (docs/interop.md)."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from llava_mole.common.errors import ConfigError, WeightsError, command
from llava_mole.common.log import setup_logging
from llava_mole.conversation import TOKENIZER_TEMPLATE, get_template
from llava_mole.interop import exporting
from llava_mole.interop.exporting import ExportOptions
from llava_mole.interop.importing import ImportOptions, import_checkpoint
from llava_mole.interop.kinds import KINDS, find_kind

FORMATS = {
    "checkpoint": "a run directory of llava_mole, from LLaVA-1.5 (full, LoRA, projector), llava-hf or the authors' .pt",
    "projector": "mm_projector: FILE.bin with LLaVA's names or FILE.safetensors with ours",
    "open-clip": "the vision tower as model.vision_tower takes it",
    "hf-clip": "the vision tower as transformers' CLIPVisionModel",
    "llava": "full LLaVA-1.5, LoRA merged",
    "llava-lora": "LLaVA-1.5's LoRA layout with non_lora_trainables.bin, for --model-base",
    "llava-hf": "transformers' LlavaForConditionalGeneration with processor, LoRA merged or (--unmerged) beside it",
    "peft": "the adapter, plain or mixture, for PeftModel.from_pretrained, with the projector",
}
OWN_ONLY: dict[str, Callable[[Path, Path, ExportOptions], list[str]]] = {
    "llava": exporting.export_llava,
    "llava-lora": exporting.export_llava_lora,
    "llava-hf": exporting.export_llava_hf,
    "peft": exporting.export_peft,
}
FOREIGN = ("llava", "llava-lora", "llava-projector", "projector", "llava-hf", "released-mole")
DTYPES = ("float32", "bfloat16", "float16")


def _parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:<12}{text}" for name, text in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="llava-mole convert",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Bring a checkpoint of others in, or ours out. What SOURCE is, its files say.",
        epilog=f"formats:\n{formats}",
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="checkpoint, run, model directory or weight file")
    parser.add_argument("--to", required=True, metavar="FORMAT", help="see below")
    parser.add_argument("--out", required=True, type=Path, help="directory (for projector: file) to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what a conversion has written to --out before"
    )
    parser.add_argument("--model-base", type=Path, metavar="DIR", help="language model that the source was trained on")
    coming = parser.add_argument_group("to checkpoint")
    coming.add_argument(
        "--vision-tower", type=Path, metavar="PATH", help="CLIP directory or open_clip directory or file"
    )
    coming.add_argument("--vision-tower-name", metavar="NAME", help="open_clip model name of a file without config")
    coming.add_argument("--template", help="conversation template (default vicuna_v1; plain for a projector)")
    coming.add_argument("--image-aspect-ratio", choices=("pad", "square"), help="default: what the source says, or pad")
    coming.add_argument(
        "--select-layer", type=int, metavar="N", help="tower layer (default: what the source says, or -2)"
    )
    coming.add_argument("--alpha", type=float, help="LoRA alpha of the authors' .pt (default 2 r)")
    coming.add_argument("--mode", choices=("sparse", "dense"), default="sparse", help="of the authors' .pt")
    going = parser.add_argument_group("to llava, llava-lora, llava-hf, peft")
    going.add_argument("--expert", metavar="K|uniform|usage", help="replace a mixture by one plain LoRA: approximate")
    going.add_argument(
        "--usage", type=Path, metavar="FILE", help="routing.json of `llava-mole eval` for --expert usage"
    )
    going.add_argument(
        "--mm-vision-tower", metavar="NAME", help="tower's name in LLaVA's config.json; else it is written"
    )
    going.add_argument("--tower-in-shards", action="store_true", help="llava: the tower's weights among the others")
    going.add_argument(
        "--unmerged", action="store_true", help="llava-hf: the LoRA in OUT/adapter, for PeftModel.from_pretrained"
    )
    going.add_argument(
        "--dtype", choices=DTYPES, help="of the weights written (default: as the language model has them)"
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and print what was assumed or approximated."""
    arguments = _parser().parse_args(argv)
    setup_logging()
    if arguments.to not in FORMATS:
        raise ConfigError(f"--to {arguments.to!r}: there are {', '.join(FORMATS)}")
    if arguments.template not in (None, TOKENIZER_TEMPLATE):
        get_template(arguments.template)
    try:
        notes = _convert(arguments)
    except OSError as error:
        raise WeightsError(f"{arguments.out} could not be written: {error}; it is as it was") from None
    print(f"wrote {arguments.out}")
    for note in notes:
        print(f"  {note}")
    return 0


def _convert(arguments: Any) -> list[str]:
    source, out = arguments.source, arguments.out
    options = ExportOptions(
        model_base=arguments.model_base,
        expert=arguments.expert,
        usage=arguments.usage,
        mm_vision_tower=arguments.mm_vision_tower,
        tower_in_shards=arguments.tower_in_shards,
        unmerged=arguments.unmerged,
        dtype=None if arguments.dtype is None else getattr(torch, arguments.dtype),
        overwrite=arguments.overwrite,
    )
    if arguments.unmerged and arguments.to != "llava-hf":
        raise ConfigError(
            f"--unmerged is for --to llava-hf, not {arguments.to}; llava-lora and peft are unmerged anyway"
        )
    if arguments.to == "projector":
        return exporting.export_projector(source, out, options)
    if arguments.to in ("open-clip", "hf-clip"):
        open_clip = arguments.to == "open-clip"
        return exporting.export_tower(source, out, options, open_clip=open_clip, name=arguments.vision_tower_name)
    kind = find_kind(source).kind
    if arguments.to in OWN_ONLY:
        if kind not in ("run", "checkpoint"):
            raise ConfigError(f"{source} is {KINDS[kind]}; make it a checkpoint first, with --to checkpoint")
        return OWN_ONLY[arguments.to](source, out, options)
    if kind not in FOREIGN:
        hint = {
            "language-model": "it needs no conversion: name it as model.language_model",
            "clip": "convert it with --to open-clip",
            "open_clip": "it needs no conversion: name it as model.vision_tower",
            "peft": "without a projector it is no LLaVA; train from it with mole.surgery, or give LLaVA's whole folder",
        }.get(kind, "it is ours already")
        raise ConfigError(f"{source} is {KINDS[kind]}; {hint}")
    return import_checkpoint(
        source,
        out,
        ImportOptions(
            model_base=arguments.model_base,
            vision_tower=arguments.vision_tower,
            vision_tower_name=arguments.vision_tower_name,
            template=arguments.template,
            aspect_ratio=arguments.image_aspect_ratio,
            select_layer=arguments.select_layer,
            alpha=arguments.alpha,
            mode=arguments.mode,
            overwrite=arguments.overwrite,
        ),
    )


if __name__ == "__main__":
    raise SystemExit(main())
