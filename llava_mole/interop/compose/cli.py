"""`llava-mole compose LORA... --examples FILE`: one LoRA from several, by a search without gradients (LoraHub)."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from llava_mole.common.errors import ConfigError, WeightsError, command
from llava_mole.common.log import setup_logging

EVALUATIONS = 40
L1 = 0.05


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-mole compose",
        allow_abbrev=False,
        description="Search coefficients of ready LoRAs on a few examples, without gradients, and write one ordinary "
        "LoRA (LoraHub, arXiv 2307.13269; docs/related-methods.md).",
    )
    add = parser.add_argument
    add("loras", nargs="+", metavar="LORA", type=Path, help="directory of a LoRA saved by PEFT, or a run with a LoRA")
    add("--examples", required=True, type=Path, metavar="FILE", help="examples to fit: records in LLaVA's format "
        "(--model-path), or prompt and completion (--model-base)")  # fmt: skip
    add("--held-out", type=Path, metavar="FILE", help="examples on which the result is only measured")
    add("--image-folder", type=Path, metavar="DIR", help="where image paths begin (default: the folder of each file)")
    add("--model-path", type=Path, metavar="RUN", help="run or checkpoint with the tower, projector and template; its "
        "own adapter is used only if it is also a LORA")  # fmt: skip
    add("--model-base", type=Path, metavar="DIR", help="Hugging Face causal LM; with --model-path, where its language "
        "model is now")  # fmt: skip
    add("--vision-tower", type=Path, metavar="PATH", help="where the vision tower of --model-path is now")
    add("--output-dir", required=True, type=Path, metavar="DIR", help="directory to write")
    add("--overwrite", action="store_true", help="replace an earlier result in --output-dir")
    add("--method", choices=("sum", "product"), help="sum of the updates, exact, of added ranks; or LoraHub's product "
        "of summed factors (default: product if all ranks are equal, else sum)")  # fmt: skip
    add("--evaluations", type=int, default=EVALUATIONS, metavar="N", help="losses to compute in the search (default "
        "%(default)s, as in LoraHub)")  # fmt: skip
    add("--l1", type=float, default=L1, metavar="X", help="factor of the sum of absolute coefficients (default "
        "%(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the search (default 0)")
    add("--batch-size", type=int, default=8, metavar="N", help="examples of a forward pass (default 8)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default auto)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of the base (default float32)")
    add("--any-base", action="store_true", help="compose LoRAs although their recorded base models differ")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Search, write the LoRA and print the coefficients and losses."""
    arguments = _parser().parse_args(argv)
    setup_logging()
    if arguments.model_path is None and arguments.model_base is None:
        raise ConfigError("no base model: give --model-path RUN, or --model-base DIR for a Hugging Face causal LM")
    if arguments.model_path is None and (arguments.vision_tower or arguments.image_folder):
        raise ConfigError("--vision-tower and --image-folder need --model-path; a causal LM sees no images")
    for name, least in (("evaluations", 0), ("batch_size", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    if not math.isfinite(arguments.l1) or arguments.l1 < 0:
        raise ConfigError(f"--l1 is {arguments.l1}; it must be a finite number that is not negative")
    try:
        return _compose(arguments)
    except OSError as error:
        raise WeightsError(f"{arguments.output_dir} could not be written: {error}; it is unchanged") from None


def _compose(arguments: argparse.Namespace) -> int:
    from llava_mole.interop.compose.compose import Options, check_names, compose, read_loras, result_table, write_result
    from llava_mole.interop.compose.composition import Composition, Method
    from llava_mole.interop.compose.examples import open_causal_lm, open_run, read_examples
    from llava_mole.interop.compose.search import require_cma
    from llava_mole.interop.publishing import check_out

    paths, out = arguments.loras, arguments.output_dir
    names = check_names(paths)
    files = [arguments.examples, arguments.held_out]
    inputs = [*paths, *files, arguments.model_path, arguments.model_base, arguments.vision_tower]
    check_out(out, overwrite=arguments.overwrite, inputs=inputs)
    require_cma()
    where = {"device": arguments.device, "dtype": arguments.dtype}
    if arguments.model_path is None:
        base = open_causal_lm(arguments.model_base, **where)
    else:
        base = open_run(
            arguments.model_path, model_base=arguments.model_base, vision_tower=arguments.vision_tower, **where
        )
    inputs.append(base.directory)
    loras = read_loras(paths, base, any_base=arguments.any_base)
    ranks = [{path: a_RI.shape[0] for path, (a_RI, _) in lora.pairs.items()} for lora in loras]
    method: Method = arguments.method or ("product" if all(other == ranks[0] for other in ranks) else "sum")
    options = Options(method, arguments.evaluations, arguments.l1, arguments.seed)
    composition = Composition(loras, method, names)
    examples, held_out = (
        [] if file is None else read_examples(file, base, arguments.image_folder, arguments.batch_size)
        for file in files
    )
    rows = compose(composition, names, base, examples, held_out, options)
    print(result_table(rows))
    lora = composition.lora(rows[-1].coefficients)
    write_result(out, lora, rows, paths, base, options, overwrite=arguments.overwrite, inputs=inputs)
    adapter = out if base.loaded is None else out / "adapter"
    print(f"wrote {out} (method {method}, rank {lora.config['r']}; the PEFT adapter is {adapter})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
