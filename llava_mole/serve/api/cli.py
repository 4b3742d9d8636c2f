"""Serve models to OpenAI clients: `llava-mole serve RUN [RUN ...]`.

    llava-mole serve runs/tiny/finetune_mole
    curl http://127.0.0.1:8000/v1/models

Runs over the same base model share its weights in memory. `docs/serving.md` has the options and the limits.
"""

import argparse
import asyncio
import importlib.util
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mole.common.errors import ConfigError, command
from llava_mole.common.log import setup_logging
from llava_mole.common.text import HELP_WIDTH
from llava_mole.inference.arguments import add_limits, add_listening_arguments, add_loading_arguments

if TYPE_CHECKING:
    from llava_mole.inference.predictor import Predictor

KEY_VARIABLE = "LLAVA_MOLE_API_KEY"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="llava-mole serve",
        description="Serve one or several runs to OpenAI clients.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, width=HELP_WIDTH),
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="[NAME=]RUN", help="run directory or checkpoint; NAME is what clients call it")
    add_listening_arguments(parser, 8000)
    add(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file with the keys that clients may use, one a line (or one key in ${KEY_VARIABLE})",
    )
    limits = (
        ("max-batch", 16, "answers that are decoded together"),
        ("max-waiting", 64, "answers that may wait for a place; more are refused with status 429"),
        ("max-requests", 128, "requests at the same time, those that still send their bodies included"),
        ("max-cache-tokens", 65536, "positions of the key-value caches of all answers together"),
        ("max-prompt-tokens", 8192, "tokens of a prompt with its images; the model's context is a limit, too"),
        ("max-tokens-limit", 4096, "largest max_tokens of a request"),
        ("max-choices", 8, "answers to a request: n times its prompts"),
        ("max-body-mb", 20, "size of a request in megabytes"),
        ("max-image-mb", 15, "size of an image file in megabytes"),
        ("max-image-megapixels", 50, "width times height of an image, in millions"),
        ("drain-seconds", 30, "how long answers may go on when the server is stopped"),
    )
    add_limits(parser, limits)
    group = parser.add_argument_group("images by address (refused by default)")
    group.add_argument(
        "--allow-image-host", action="append", default=[], metavar="HOST", help="open http addresses of it; repeatable"
    )
    group.add_argument("--allow-image-folder", type=Path, metavar="DIR", help="open file addresses in this folder")
    add_loading_arguments(parser, temperature=1.0, max_new_tokens=512)
    return parser.parse_args(argv)


def named_runs(models: Sequence[str]) -> dict[str, str]:
    """Name -> run of the arguments. Raises ConfigError for a name that occurs twice."""
    found: dict[str, str] = {}
    for text in models:
        name, given, path = text.partition("=")
        if not given or "/" in name:
            path = text
            folder = Path(text).resolve()
            name = folder.parent.name if folder.name.startswith("checkpoint-") else folder.name
        if not name or not path:
            raise ConfigError(f"{text!r} was given as a model; give RUN, or NAME=RUN")
        if name in found:
            raise ConfigError(f"two models are called {name!r}, {found[name]} and {path}; name them: NAME=RUN")
        found[name] = path
    return found


def read_keys(file: Path | None) -> list[str]:
    """The API keys of the file and of the environment. Raises ConfigError for a file without a readable key."""
    keys = [os.environ[KEY_VARIABLE]] if os.environ.get(KEY_VARIABLE) else []
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file} cannot be read: {error}") from None
        if not any(lines):
            raise ConfigError(f"--api-key-file {file} holds no key; write one a line")
        keys += [line for line in lines if line]
    return keys


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises ConfigError if that is not possible, for example because it is in use."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is {port}; it must be 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
    except OSError as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error.strerror or error}") from None
    bound = socket.socket(family, kind)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(1024)  # here: two sockets may be bound to a port, but only one may listen
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port, or stop the program that "
            "uses it"
        ) from None
    bound.setblocking(False)
    return bound


def load(args: argparse.Namespace) -> dict[str, "Predictor"]:
    """The models under their names. Raises what `load_pretrained_models` raises."""
    from llava_mole.data.chat_template import check_template_name
    from llava_mole.inference.predictor import Predictor, check_placement
    from llava_mole.model.builder import load_pretrained_models

    runs = named_runs(args.models)
    check_placement(args.device, args.dtype, args.quantization)
    if args.conv_mode is not None:
        check_template_name(args.conv_mode)
    loaded = load_pretrained_models(
        list(runs.values()),
        model_base=args.model_base,
        vision_tower=args.vision_tower,
        device=args.device,
        dtype=args.dtype,
        quantization=args.quantization,
    )
    return {name: Predictor(model, template=args.conv_mode) for name, model in zip(runs, loaded, strict=True)}


def build(args: argparse.Namespace, predictors: dict[str, "Predictor"], keys: Sequence[str]) -> Any:
    """The application for these models and options."""
    from llava_mole.inference.decoding import Decoding
    from llava_mole.inference.engine import EngineLimits
    from llava_mole.serve.api.app import HttpLimits, build_app
    from llava_mole.serve.api.images import ImagePolicy
    from llava_mole.serve.api.service import Defaults, RequestLimits, Service

    Decoding(args.max_new_tokens, args.temperature, args.top_p)  # refuses values that cannot be
    if args.allow_image_folder is not None and not args.allow_image_folder.is_dir():
        raise ConfigError(f"--allow-image-folder {args.allow_image_folder} is not a folder")
    megabyte = 1000**2
    service = Service(
        predictors,
        engine_limits=EngineLimits(args.max_batch, args.max_waiting, args.max_cache_tokens),
        limits=RequestLimits(args.max_tokens_limit, args.max_prompt_tokens, args.max_choices),
        defaults=Defaults(args.max_new_tokens, args.temperature, args.top_p),
        images=ImagePolicy(
            args.max_image_megapixels * megabyte,
            args.max_image_mb * megabyte,
            args.allow_image_host,
            args.allow_image_folder,
        ),
    )
    limits = HttpLimits(args.max_body_mb * megabyte, args.max_requests, keys, args.drain_seconds)
    return build_app(service, limits)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Take the port, load the models, and serve until SIGINT or SIGTERM."""
    args = parse_arguments(argv)
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"llava-mole serve needs {package}; install it with: pip install 'llava_mole[serve]'")
    setup_logging()
    keys = read_keys(args.api_key_file)
    bound = listen(args.host, args.port)
    with bound:
        app = build(args, load(args), keys)
        _serve(app, bound, args, open_to_all=not keys)
    return 0


def _serve(app: Any, bound: socket.socket, args: argparse.Namespace, *, open_to_all: bool) -> None:
    import uvicorn

    address, port = bound.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    names = ", ".join(named_runs(args.models))
    if open_to_all and not address.startswith("127.") and address != "::1":
        print(f"warning: {address} can be reached from other machines, and no API key is set", flush=True)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                print(f"serving {names} at http://{shown}:{port}/v1   stop with Ctrl-C", flush=True)

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=args.drain_seconds,
        timeout_keep_alive=30,
    )
    # uvicorn handles the signals while it runs and raises them again when it has stopped, which is no failure here.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(Server(config).serve([bound]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    raise SystemExit(main())
