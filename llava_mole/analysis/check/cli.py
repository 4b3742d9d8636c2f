"""`llava-mole check-data CONFIG`: check every record and image of a run before it starts."""

import argparse
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_mole.common.errors import ConfigError, command, one_line
from llava_mole.common.files import atomic_path, write_json
from llava_mole.common.log import setup_logging
from llava_mole.common.processes import open_pool
from llava_mole.config import RunConfig, is_remote, parse_run_config
from llava_mole.data.chat_template import check_template_name
from llava_mole.data.native import ImageGrid

EXIT_FAILED = 1
REPORT, FINDINGS, FIGURE = "check_data.json", "findings.jsonl", "token_lengths.png"
ALONE = 10 << 20
"""Bytes of annotations up to which this process counts tokens: worker processes take seconds to load a tokenizer."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-mole check-data",
        allow_abbrev=False,
        description="Check every record and image of a run before it starts: decode every image once and tokenize "
        "records as in training. Section `check` of the configuration has the limits. Exit code 0: all limits passed; "
        "1: one failed; 2: a mistake in the arguments or the data. Options --key.sub VALUE override the configuration.",
    )
    parser.add_argument("config", metavar="CONFIG", help="configuration of the run, as for `llava-mole train`")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of {REPORT}, {FINDINGS} and {FIGURE} "
        "(default: check_data/ in the run directory)")  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes for images and tokens (default %(default)s)"
    )
    parser.add_argument("--no-tokens", action="store_true", help="do not tokenize: no lengths, no truncation")
    parser.add_argument("--no-images", action="store_true", help="do not open images")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Check, print the report and write it. Returns 0 if all limits passed, else 1."""
    given, overrides = _parser().parse_known_args(argv)
    setup_logging()
    config = parse_run_config([given.config, *overrides], prog="llava-mole check-data")
    if given.workers < 1:
        raise ConfigError(f"--workers is {given.workers}; it must be at least 1")
    check_template_name(config.data.template)
    with one_line("check-data must be able to read its data and to write below --out"):
        return check(config, given)


def check(config: RunConfig, given: argparse.Namespace) -> int:
    """Check the active sources of a configuration. Returns the exit code."""
    from llava_mole.analysis.check import report
    from llava_mole.analysis.check.images import OpenedImages, SourceImages, evaluation_files, find_overlap
    from llava_mole.analysis.check.records import TextLimits, check_records, read_all
    from llava_mole.data.lengths import ImagePlace
    from llava_mole.data.shard_files import is_sharded
    from llava_mole.data.sources import ImageReader, open_source
    from llava_mole.model.language_model import check_max_length, read_config

    data = config.data
    limits = None
    if not given.no_tokens:
        if (Path(config.model.language_model) / "config.json").is_file():
            check_max_length(read_config(config.model.language_model), data.max_length, config.model.language_model)
        tokens = image_tokens(config)
        limits = TextLimits(
            config.model.language_model,
            data.template,
            tokens,
            data.max_length,
            data.max_length_policy,
            data.special_tokens,
            image_grid(config),
        )
    # Listed first: a wrong place is then reported before minutes of decoding.
    evaluation = [] if given.no_images else evaluation_files(config.check.evaluation_images)
    out: Path = given.out or Path(config.train.output_dir, "check_data")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be created: {error.strerror}; name another folder") from None
    sources = []
    opened = OpenedImages(config.check.huge_pixels)
    with ExitStack() as stack:
        listed = stack.enter_context(atomic_path(out / FINDINGS))
        lines = stack.enter_context(listed.open("w", encoding="utf-8"))
        findings = report.FindingsFile(lines)
        pool = stack.enter_context(open_pool(given.workers)) if given.workers > 1 else None
        for name, described in data.sources.items():
            if data.mixture.get(name, 1.0) <= 0:
                continue
            source = report.SourceFindings(name)
            sources.append(source)
            images, stored, reader = None, None, None
            if is_sharded(described.annotations) or is_remote(described.image_folder):
                stored, reader = open_source(data, name)
            if not given.no_images:
                follow = described.follow_links or data.follow_links
                images = SourceImages(
                    described.image_folder, follow, data.image_modes, source, findings, opened, pool, reader
                )
            records = read_all(described.annotations, source, findings, stored)
            counting = pool if _size(described.annotations) > ALONE else None
            own = limits
            if limits is not None and limits.grid is not None:
                follow = described.follow_links or data.follow_links
                place = ImagePlace(reader or ImageReader(described.image_folder, follow_links=follow), data.image_modes)
                own = replace(limits, place=place)
            check_records(records, source, findings, own, images, counting)
        evaluated, shared = find_overlap(evaluation, opened.contents)
        not_checked = report.left_out(
            tokens=limits is not None, images=not given.no_images, evaluation=bool(evaluation)
        )
        judged = report.judge(sources, len(shared) / evaluated if evaluated else 0.0, config.check, not_checked)
        values = report.report_values(sources, evaluated, shared, judged, not_checked)
        drawn = any(source.tokens.size for source in sources)
        if drawn:
            report.draw_lengths(sources, data.max_length, stack.enter_context(atomic_path(out / FIGURE)))
    write_json(out / REPORT, values, indent=1)
    if not drawn:  # a figure of an earlier check does not belong to this report
        (out / FIGURE).unlink(missing_ok=True)
    print(report.report_text(values))
    print(f"report: {out / REPORT}\nlist: {out / FINDINGS}" + (f"\nfigure: {out / FIGURE}" if drawn else ""))
    return 0 if values["passed"] else EXIT_FAILED


def image_tokens(config: RunConfig) -> int:
    """Tokens of one image, of one in tiles those of the whole image. Raises WeightsError."""
    from llava_mole.model.multimodal_projector import image_positions

    return image_positions(config.model.projector, _tower_files(config).grid)


def image_grid(config: RunConfig) -> ImageGrid | None:
    """How images become tokens by their sizes, None for square ones. Raises WeightsError, or as `grid_of`."""
    from llava_mole.model.builder import grid_of

    data = config.data
    if data.image_aspect_ratio in ("pad", "square"):
        return None
    return grid_of(data.image_aspect_ratio, _tower_files(config), image_tokens(config), data.image_grid_pinpoints)


def _tower_files(config: RunConfig) -> Any:
    from llava_mole.model.tower_files import read_tower

    tower = config.model.vision_tower
    return read_tower(tower.name, image_size=tower.image_size, image_mean=tower.image_mean, image_std=tower.image_std)


def _size(annotations: str) -> int:
    """Bytes of an annotation file or of a prepared set."""
    path = Path(annotations)
    files = path.glob("*.arrow") if path.is_dir() else [path] if path.is_file() else []
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    raise SystemExit(main())
