"""Chat in a web page that shows which expert computes which patch and word.

    python -m llava_mole.serve.gradio_app --model-path RUN [--compare RUN2]     # or: llava-mole web ...

The page listens on this machine only, loads nothing from elsewhere and sends nothing anywhere. `docs/web.md` has the
options and the limits.
"""

import argparse
import importlib.util
import os
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, command
from llava_mole.common.log import setup_logging
from llava_mole.common.text import HELP_WIDTH
from llava_mole.inference.arguments import add_limits, add_listening_arguments, add_loading_arguments

EXAMPLES = Path("playground/data/tiny")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="llava-mole web",
        description="Chat with one or several runs in a web page that shows their routing.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=HELP_WIDTH),
    )
    add = parser.add_argument
    add("--model-path", required=True, metavar="[NAME=]RUN", help="run directory or checkpoint; NAME is shown")
    add("--compare", action="append", default=[], metavar="[NAME=]RUN", help="another run beside it; repeatable")
    add("--examples", type=Path, metavar="DIR", help=f"prepared folder whose test questions are offered as examples "
        f"(default: {EXAMPLES} if it is there, else drawn images)")  # fmt: skip
    add_listening_arguments(parser, 7860)
    limits = (
        ("max-image-mb", 15, "size of an image file in megabytes"),
        ("max-image-megapixels", 50, "width times height of an image, in millions"),
        ("max-images", 8, "images of a question"),
        ("max-tokens-limit", 1024, "longest answer that the page offers, in tokens"),
        ("max-waiting", 32, "questions that may wait for others; more are refused"),
    )
    add_limits(parser, limits)
    add_loading_arguments(parser, temperature=0.0, max_new_tokens=256)
    return parser.parse_args(argv)


def build(args: argparse.Namespace, folder: Path) -> Any:
    """Load the models and build the page; uploads and drawn examples go into `folder`.

    Raises what `load_pretrained_models` raises.
    """
    from llava_mole.inference.decoding import Decoding
    from llava_mole.serve.api.cli import load
    from llava_mole.serve.api.images import ImagePolicy
    from llava_mole.serve.web.examples import draw_examples, find_examples
    from llava_mole.serve.web.page import PageLimits, build_page

    start = Decoding(args.max_new_tokens, args.temperature, args.top_p)
    if args.examples is not None and not args.examples.is_dir():
        raise ConfigError(f"--examples {args.examples} is not a folder; give one of `llava-mole prepare`")
    examples = find_examples(args.examples or EXAMPLES)
    if args.examples is not None and not examples:
        raise ConfigError(
            f"--examples {args.examples} holds no */test_questions.jsonl with images; prepare the tiny world"
        )
    args.models = [args.model_path, *args.compare]
    models = load(args)
    drawn = folder / "examples"
    drawn.mkdir()
    megabyte = 1000**2
    limits = PageLimits(
        ImagePolicy(args.max_image_megapixels * megabyte, args.max_image_mb * megabyte, folder=folder),
        args.max_images,
        args.max_tokens_limit,
        args.max_waiting,
    )
    return build_page(models, limits, examples or draw_examples(drawn), start)


def launch(page: Any, args: argparse.Namespace) -> str:
    """Serve the page from threads of their own. Returns its address. Raises ConfigError if the port is taken."""
    import gradio as gr

    from llava_mole.serve.web.page import STYLE

    fonts = ["system-ui", "sans-serif"]
    theme = gr.themes.Soft(
        primary_hue="blue", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"], radius_size="md"
    ).set(
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_text_color="*body_text_color",
        block_title_text_color_dark="*body_text_color",
        block_title_text_weight="500",
        block_title_padding="0",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*body_text_color",
        block_label_text_color_dark="*body_text_color",
        block_border_width="1px",
        block_shadow="none",
        checkbox_border_color="*neutral_400",
        checkbox_border_color_dark="*neutral_400",
    )
    try:
        _, address, _ = page.launch(
            server_name=args.host,
            server_port=args.port or None,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=False,
            max_file_size=args.max_image_mb * 1000**2,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            inbrowser=False,
            theme=theme,
            css_paths=STYLE,
        )
    except OSError:
        raise ConfigError(
            f"cannot listen at {args.host}, port {args.port}; choose another --port, or stop the program that uses it"
        ) from None
    return str(address)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Load the models and serve the page until SIGINT or SIGTERM."""
    args = parse_arguments(argv)
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the web page needs gradio; install it with: pip install 'llava_mole[web]'")
    setup_logging()
    with tempfile.TemporaryDirectory(prefix="llava_mole_web_") as name:
        folder = Path(name).resolve()
        # Read by Gradio when it is imported: nothing is reported or fetched, uploads stay in a folder of our own.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=name, HF_HUB_OFFLINE="1")
        page = build(args, folder)
        address = launch(page, args)
        if not args.host.startswith("127.") and args.host not in ("localhost", "::1"):
            print(f"warning: {args.host} can be reached from other machines, and the page asks nobody who they are")
        print(f"page: {address}   stop with Ctrl-C", flush=True)
        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        stop.wait()
        page.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
