"""`llava-mole conflict RUN|CONFIG ...`: gradients of a mixture's sources on the same weights, as cosines and harm."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_mole.analysis.arguments import ORIGINS, add_subject_arguments, default_out
from llava_mole.common.errors import ConfigError, command
from llava_mole.common.files import finite, write_json
from llava_mole.common.log import setup_logging

DATA_FILE = "conflict.json"
FORMAT = "llava_mole.conflict/1"
BATCHES, BATCH_SIZE = 8, 16


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-mole conflict",
        allow_abbrev=False,
        description="Measure whether the sources of a mixture pull the trained weights apart: cosines of their "
        "gradients, the interference of steps, and conflicts of tokens inside experts (docs/meters.md). Options "
        "--key.sub VALUE override the configuration.",
    )
    add = parser.add_argument
    add("subjects", nargs="+", type=Path, metavar="RUN|CONFIG", help="runs, checkpoints, or configurations, whose "
        "model is measured before its first step; several are drawn beside each other")  # fmt: skip
    add("--batches", type=int, default=BATCHES, metavar="N", help="batches of each source (default %(default)s)")
    add("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help="samples of a batch (default %(default)s)")
    add("--rate-factor", type=float, default=1.0, metavar="X", help="factor on the run's peak learning rates for the "
        "interference matrix (default 1)")  # fmt: skip
    add("--no-interference", action="store_true", help="leave the interference matrix out")
    add("--no-tokens", action="store_true", help="leave the conflicts of tokens inside experts out")
    add("--out", type=Path, metavar="DIR", help="folder of data and figures (default: conflict in the first run's "
        "directory, ./conflict for a configuration)")  # fmt: skip
    add_subject_arguments(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, and write data and figures."""
    arguments, overrides = _parser().parse_known_args(argv)
    for name, least in (("batches", 1), ("batch_size", 1)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}")
    if not 0 < arguments.rate_factor < float("inf"):
        raise ConfigError(f"--rate-factor is {arguments.rate_factor}; it must be a finite number above 0")
    setup_logging()
    from llava_mole.analysis.conflict.report import comparison, draw, table
    from llava_mole.common.figures import check_matplotlib

    check_matplotlib()
    paths = arguments.subjects
    out = arguments.out or default_out(paths[0], "conflict")
    results = []
    for path in paths:
        results.append(_measure(path, overrides, arguments))
        if results[-1]["sources"] != results[0]["sources"]:
            raise ConfigError(
                f"{path} has the sources {', '.join(results[-1]['sources'])}, and {paths[0]} "
                f"{', '.join(results[0]['sources'])}; measure runs of the same sources together"
            )
        print(table(results[-1]), end="\n\n")
    if len(results) > 1:
        print(comparison(results), end="\n\n")
    write_json(out / DATA_FILE, finite({"format": FORMAT, "runs": results}), indent=1)
    print(f"data: {out / DATA_FILE}")
    for file in draw(results, out):
        print(f"figure: {file}")
    return 0


def _measure(path: Path, overrides: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    from tqdm import tqdm

    from llava_mole.analysis.conflict.interference import StepRule
    from llava_mole.analysis.conflict.meter import measure_conflict, passes_of
    from llava_mole.analysis.opening import open_subject

    subject = open_subject(path, overrides, arguments)
    probe = subject.probe(arguments.batches, arguments.batch_size, ORIGINS[arguments.origin])
    rule = None
    if not arguments.no_interference:
        rates = {name: rate * arguments.rate_factor for name, rate in subject.rates().items()}
        rule = StepRule(rates, subject.config.train.max_grad_norm, subject.second_moments())
    total = passes_of(len(probe.sources), probe.batches, interference=rule is not None, tokens=not arguments.no_tokens)
    with tqdm(total=total, desc=f"conflict of {subject.name}", unit="batch") as bar:
        result = measure_conflict(
            subject.model,
            probe,
            subject.parameters,
            subject.config.train.loss_reduction,
            rule=rule,
            tokens=not arguments.no_tokens,
            advance=bar.update,
        )
    adapter = subject.config.adapter
    return {
        "name": subject.name,
        "path": str(subject.path),
        "step": subject.step,
        "adapter": adapter.method,
        "preset": adapter.preset if adapter.method == "mole" else None,
        "rank": adapter.rank,
        "samples_from": subject.origin(probe),
        **result,
    }
