"""`llava-mole routing RUN`: what the routers of a run do, and what their decisions are worth."""

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_mole.analysis.arguments import ORIGINS, add_subject_arguments, default_out
from llava_mole.common.errors import CheckpointError, ConfigError
from llava_mole.common.files import finite, write_json
from llava_mole.common.log import get_logger, setup_logging

if TYPE_CHECKING:
    from llava_mole.analysis.opening import Subject

logger = get_logger(__name__)

DATA_FILE = "routing.json"
FORMAT = "llava_mole.routing/1"
SAMPLES, PERMUTATIONS = 64, 200


def build_parser() -> argparse.ArgumentParser:
    """The options of measuring. `serve/overlay/cli.py`, where the command begins, adds those of a single prompt."""
    parser = argparse.ArgumentParser(
        prog="llava-mole routing",
        allow_abbrev=False,
        description="Measure the routers of a mixture of experts: load and certainty, what the choice of an expert "
        "says about source and kind of a token, likeness of experts, drift between checkpoints, and what forcing, "
        "exchanging and switching off experts costs (docs/meters.md). Options --data.sub VALUE override the data.",
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="run directory, or one of its checkpoints")
    add("--against", type=Path, nargs="+", metavar="CHECKPOINT", help="checkpoints whose routers are compared with "
        "RUN's (default: the other checkpoints of the run)")  # fmt: skip
    add("--samples", type=int, default=SAMPLES, metavar="N", help="samples of each source (default %(default)s)")
    add("--permutations", type=int, default=PERMUTATIONS, metavar="N", help="random permutations for the baseline of "
        "mutual information (default %(default)s)")  # fmt: skip
    add("--no-interventions", action="store_true", help="leave forced, exchanged and switched-off experts out")
    add("--by-layer", action="store_true", help="also switch off every expert of every layer by itself")
    add("--out", type=Path, metavar="DIR", help="folder of data and figures (default: routing in the run directory)")
    add_subject_arguments(parser)
    return parser


def measure(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Measure, print the tables, and write data and figures. Raises UserError."""
    for name in ("samples", "permutations"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} is {getattr(arguments, name)}; it must be at least 1")
    if arguments.run.is_file():
        raise ConfigError(f"{arguments.run} is a file; give a run or checkpoint, whose routers have been trained")
    setup_logging()
    from llava_mole.analysis.opening import open_subject
    from llava_mole.analysis.routing.report import draw, table
    from llava_mole.common.figures import check_matplotlib

    check_matplotlib()
    out = arguments.out or default_out(arguments.run, "routing")
    subject = open_subject(arguments.run, overrides, arguments)
    result = _measure(subject, arguments)
    print(table(result), end="\n\n")
    write_json(out / DATA_FILE, finite({"format": FORMAT, **result}), indent=1)
    print(f"data: {out / DATA_FILE}")
    for file in draw(result, out):
        print(f"figure: {file}")
    return 0


def _measure(subject: "Subject", arguments: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    from llava_mole.analysis.routing.drift import describe_drift, weights_of
    from llava_mole.analysis.routing.interventions import count_scores, routers
    from llava_mole.analysis.routing.meter import measure_interventions, measure_routing
    from llava_mole.analysis.routing.tokens import route_tokens
    from llava_mole.analysis.undisturbed import undisturbed

    if subject.config.adapter.method != "mole":
        raise ConfigError(
            f"{subject.path} has adapter.method {subject.config.adapter.method!r}; routers are measured in runs with "
            "'mole'"
        )
    model, others = subject.model, list(_others(subject, arguments.against))
    found = routers(model)
    probe = subject.probe(1, arguments.samples, ORIGINS[arguments.origin])
    sources = probe.sources
    tokenizer = subject.dataset.limits.tokenizer.hf  # type: ignore[attr-defined]
    scores = 0 if arguments.no_interventions else count_scores(list(found.values()), by_layer=arguments.by_layer)
    total = arguments.samples * len(sources)
    with tqdm(total=total * (1 + len(others) + scores), desc=f"routing of {subject.name}", unit="sample") as bar:
        rows = [row for source in range(len(sources)) for row in probe.batch(0, source)]
        result, routed = measure_routing(
            model, rows, sources, tokenizer, permutations=arguments.permutations, advance=bar.update
        )
        started = time.perf_counter()
        for checkpoint in others:
            with weights_of(model, checkpoint, subject.path), undisturbed(model):
                before = route_tokens(model, rows, tokenizer, bar.update)
            name = "/".join(checkpoint.resolve().parts[-2:])
            result["drift"].append({"name": name, "path": str(checkpoint), **describe_drift(before, routed)})
        result["seconds"]["drift"] = time.perf_counter() - started
        if scores:
            started = time.perf_counter()
            result["interventions"] = measure_interventions(
                model, rows, sources, by_layer=arguments.by_layer, advance=bar.update
            )
            result["seconds"]["interventions"] = time.perf_counter() - started
    about = {"name": subject.name, "path": str(subject.path), "step": subject.step}
    return {**about, "preset": subject.config.adapter.preset, "samples": arguments.samples,
            "samples_from": subject.origin(probe), **result}  # fmt: skip


def _others(subject: "Subject", given: Sequence[Path] | None) -> Iterator[Path]:
    """The checkpoints to compare with, in order of their steps: those given, or the run's others that verify."""
    from llava_mole.model.checkpoint import list_checkpoints, read_manifest, resolve_checkpoint, verify_checkpoint

    if given is not None:
        yield from (resolve_checkpoint(path) for path in given)
        return
    for path in reversed(list_checkpoints(subject.path.parent)):
        if path.resolve() != subject.path.resolve():
            try:
                verify_checkpoint(path)
                if read_manifest(path)["fingerprints"] != read_manifest(subject.path)["fingerprints"]:
                    raise CheckpointError("its language model or vision tower, which train along, have other weights")
            except CheckpointError as error:
                logger.warning("%s is left out: %s", path.name, error)
            else:
                yield path
