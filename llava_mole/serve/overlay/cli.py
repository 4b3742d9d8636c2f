"""`llava-mole routing RUN`: measure the routers of a run on its data, or draw those of one image and prompt.

    llava-mole routing RUN --image photo.png --prompt "What color is the car?" --out DIR

The measuring itself is `analysis/routing`'s, which knows no prompts.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from llava_mole.analysis.routing.cli import build_parser, measure
from llava_mole.common.errors import ConfigError, command, value_errors_as
from llava_mole.common.files import refuse_existing, write_json
from llava_mole.common.log import setup_logging

DATA_FILE, FIGURE = "routing_overlay.json", "routing_overlay.png"


def _parser() -> argparse.ArgumentParser:
    parser = build_parser()
    group = parser.add_argument_group(
        "one prompt",
        "with --prompt, the routing of this prompt and its answer is written, as data and as a figure",
    )
    add = group.add_argument
    add("--prompt", metavar="TEXT", help="the question")
    add("--image", action="append", default=[], metavar="FILE", help="an image of the prompt; repeatable")
    add("--answer", metavar="TEXT", help="show this answer instead of the model's own")
    add("--expert", type=int, metavar="K", help="let every token use expert K (from 0)")
    add("--layers", type=int, nargs="+", metavar="N", help="layers of the figure, from 0 (default: all, or 8 of them)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer in tokens (default %(default)s)")
    add("--conv-mode", metavar="TEMPLATE", help="conversation template (default: the checkpoint's)")
    add("--overwrite", action="store_true", help="replace the files of an earlier prompt")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or write the overlay."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.prompt is None:
        own = ("image", "answer", "expert", "layers")
        if given := [name for name in own if getattr(arguments, name) not in (None, [])]:
            raise ConfigError(f"--{given[0]} needs --prompt TEXT: what is asked")
        return measure(arguments, rest)
    if rest:
        raise ConfigError(f"{rest[0]} has no meaning with --prompt, which reads no data; leave it out")
    return _write_overlay(arguments)


def _write_overlay(arguments: argparse.Namespace) -> int:
    setup_logging()
    from llava_mole.common.figures import check_matplotlib, save_figure
    from llava_mole.inference.predictor import Predictor
    from llava_mole.inference.token_routing import route_answer
    from llava_mole.mole import force_expert
    from llava_mole.serve.overlay.files import as_data, draw, shown_images, spread
    from llava_mole.serve.session import check_image

    check_matplotlib()
    out = arguments.out or Path("routing_overlay")
    for name in (DATA_FILE, FIGURE):
        refuse_existing(out / name, overwrite=arguments.overwrite)
    for name in arguments.image:
        check_image(name)
    predictor = Predictor.from_pretrained(
        arguments.run,
        model_base=arguments.model_base,
        vision_tower=arguments.vision_tower,
        device=arguments.device,
        dtype=arguments.dtype,
        template=arguments.conv_mode,
    )
    language_model = predictor.loaded.model.language_model
    with contextlib.ExitStack() as block:
        with value_errors_as(ConfigError):
            block.enter_context(force_expert(language_model, arguments.expert))
        answer = arguments.answer
        if answer is None:
            (answer,) = predictor.generate(
                [arguments.image], [arguments.prompt], max_new_tokens=arguments.max_new_tokens
            )
            if not answer.strip():
                raise ConfigError("the model's answer is empty, so it has no tokens; give one with --answer TEXT")
        routing = route_answer(predictor, arguments.image, arguments.prompt, answer)
    layers = spread(len(routing.layers)) if arguments.layers is None else arguments.layers
    if wrong := [n for n in layers if not 0 <= n < len(routing.layers)]:
        raise ConfigError(f"--layers {wrong[0]}: the layers with experts are 0 to {len(routing.layers) - 1}")
    processor = predictor.loaded.image_processor
    images = [picture for image in arguments.image for picture in shown_images(processor, image)]
    forced = "" if arguments.expert is None else f", expert {arguments.expert} forced"
    title = f"{predictor.loaded.path.parent.name}{forced}\nprompt: {arguments.prompt}\nanswer: {answer}"
    figure = draw(routing, images, layers, title=title)
    about = {
        "run": str(predictor.loaded.path),
        "template": predictor.template.name,
        "images": arguments.image,
        "prompt": arguments.prompt,
        "answer": answer,
        "answer_is_given": arguments.answer is not None,
        "forced_expert": arguments.expert,
    }
    write_json(out / DATA_FILE, {**about, **as_data(routing)}, indent=None)
    save_figure(figure, out / FIGURE)
    print(f"answer: {answer}")
    for role in ("image", "prompt", "answer"):
        if role in routing.roles:
            shares = "   ".join(f"expert {n} {100 * x:.0f}%" for n, x in enumerate(routing.part(role).load(None)))
            print(f"{role + ' tokens':<15}{shares}")
    print(f"data: {out / DATA_FILE}\nfigure: {out / FIGURE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
