"""The training set: examples at the positions of a plan, and `build_dataset`, which checks all data before a run."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from llava_mole.common.distributed import get_world_size, on_main
from llava_mole.common.errors import ConfigError, DataError
from llava_mole.common.log import get_logger
from llava_mole.common.text import count_of
from llava_mole.config import DataConfig, check_lambdas, is_remote
from llava_mole.conversation import Template
from llava_mole.data.anyres import Size, join_tiles
from llava_mole.data.batching import GroupedPlan, modality_lengths
from llava_mole.data.chat_template import resolve_template
from llava_mole.data.collator import Example
from llava_mole.data.images import ImageProcessor, Oddity, warn_odd
from llava_mole.data.lengths import CountPlace, Fitted, ImagePlace, Limits, fit_source, image_counts, sample_of
from llava_mole.data.mixture import TrainingPlan, hold_out
from llava_mole.data.records import Record, RecordSubset
from llava_mole.data.shard_files import is_sharded
from llava_mole.data.sources import ImageReader, open_source, source_digest
from llava_mole.data.store import PreparedRecords
from llava_mole.data.tokenization import Encoded, TextTokenizer, encode_record, encode_shortened

SUBSTITUTES = 100
"""Most records tried in place of one with an unreadable image; if all fail, the whole folder is probably missing."""

logger = get_logger(__name__)


class SupervisedDataset:
    """Map-style data set over the positions of a plan; can be pickled into data loader workers.

    Args:
        records_by_source: Records of each source of the plan.
        readers: Reads the images, by source.
        plan: Order of the samples.
        limits: Template, tokenizer, tokens per image, longest sample and length policy.
        image_processor: Converts an image to the input of the vision tower.
        lengths: Tokens of every record, by source; required by the method `lengths` only.
        image_draft: See `DataConfig.image_draft`.
    """

    def __init__(
        self,
        records_by_source: Mapping[str, Sequence[Record]],
        readers: Mapping[str, ImageReader],
        plan: TrainingPlan,
        limits: Limits,
        image_processor: ImageProcessor,
        lengths: Mapping[str, npt.NDArray[np.int32]] | None = None,
        *,
        image_draft: bool = False,
    ) -> None:
        self.plan = plan
        self._records = dict(records_by_source)
        self._readers = dict(readers)
        self._source_index = {name: index for index, name in enumerate(plan.names)}
        self.limits = limits
        self.image_processor = image_processor
        self._lengths = lengths
        self._draft_size = 2 * image_processor.image_size if image_draft else None
        self.warned = torch.zeros(len(plan.names), dtype=torch.uint8).share_memory_()
        """By source: whether an image that `llava` alters was logged; shared with the loader's workers."""
        self.validation: SupervisedDataset | None = None
        """Each held-out sample once; None if validation is off."""
        self.report: dict[str, dict[str, int]] = {}
        """By source: the numbers of records, text_only, cut, shortened and dropped records."""
        self.digests: dict[str, str] = {}
        """By source: digest of its records' content."""

    def lengths(self, positions: Iterable[int]) -> list[int]:
        """Tokens of the samples at positions of the plan. Raises ValueError if lengths were not counted."""
        if self._lengths is None:
            raise ValueError("this data set was built without lengths")
        return [int(self._lengths[source][sample]) for source, sample in (self.plan[p] for p in positions)]

    @property
    def source_names(self) -> tuple[str, ...]:
        """Sources in the order of `Example.source_index`."""
        return self.plan.names

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, position: int) -> Example:
        """The example at a position of the plan.

        If an image of the record cannot be read, the next record of its source with readable images replaces it: the
        same one at every attempt and on every rank. `Example.replaced_image` then holds the reason.

        Raises:
            DataError: the record cannot be used, or none of the records after it has readable images; the message
                starts with `file:line`.
        """
        source, record, pictures, replaced = self._readable(position, self._draft_size)
        encoded = self._encode(record, [picture.size for picture in pictures])
        index = self._source_index[source]
        images, shown, grids = None, None, None
        if pictures:
            images, shown, grids = join_tiles([self.image_processor.tiles(picture) for picture in pictures])
        return Example(record.id, source, index, encoded.input_ids, encoded.labels, images, replaced, shown, grids)

    def __getitems__(self, positions: Sequence[int]) -> list[Example]:
        """The examples of a batch; images on servers are fetched at once. Raises as `[position]`, and StorageError."""
        wanted: dict[str, list[str]] = {}
        for source, sample in map(self.plan.__getitem__, positions):
            if self._readers[source].is_distant:
                wanted.setdefault(source, []).extend(self._records[source][sample].images)
        for source, paths in wanted.items():
            self._readers[source].prefetch(paths)
        return [self[position] for position in positions]

    def sample(self, position: int) -> tuple[str, Record, list[Image.Image]]:
        """Source, record and decoded images of the sample at a position, replaced as in `__getitem__`.

        Raises:
            DataError: none of the records after it has readable images.
        """
        return self._readable(position, None)[:3]

    def _readable(self, position: int, draft_size: int | None) -> tuple[str, Record, list[Image.Image], str | None]:
        source, sample = self.plan[position]
        warned, index, reader = self.warned, self._source_index[source], self._readers[source]

        def load(path: str, where: str) -> Image.Image:
            def warn(_: str, oddity: Oddity) -> None:
                if not warned[index]:
                    warned[index] = 1
                    warn_odd(f"data: {source}", f"{reader.name_of(path)!r} ({where})", oddity)

            picture = reader.load(
                path,
                draft_size=draft_size,
                modes=self.image_processor.modes,
                on_odd=None if warned[index] else warn,
            )
            if self.limits.grid is not None:
                self.limits.grid.layout(picture.size, path)  # refuses what cannot be shown: the record is replaced
            return picture

        return source, *readable_record(self._records[source], sample, load)

    def _encode(self, record: Record, sizes: Sequence[Size]) -> Encoded:
        limits = self.limits
        arguments = (record, limits.template, limits.tokenizer, limits.image_tokens(sizes), limits.max_length)
        if limits.policy == "truncate_history":
            shortened = encode_shortened(*arguments)
            if shortened is not None:
                return shortened
        return encode_record(*arguments)


def readable_record(
    records: Sequence[Record], sample: int, load: Callable[[str, str], Image.Image]
) -> tuple[Record, list[Image.Image], str | None]:
    """Record `sample` or, if its images cannot be read, the next record with readable images.

    Args:
        load: Opens an image, given its path and the `where` of its record. Raises DataError.

    Returns:
        The record, its decoded images, and the problem of the record it replaces (None if it replaces none).

    Raises:
        DataError: none of the next 100 records has readable images.
    """
    problem = None
    for offset in range(min(len(records), 1 + SUBSTITUTES)):
        record = records[(sample + offset) % len(records)]
        if not record.images and problem is not None:
            continue
        try:
            pictures = [load(path, record.where) for path in record.images]
            return record, pictures, problem
        except DataError as error:
            problem = problem or f"{record.where}: {error}"
    raise DataError(f"{problem}; nor can the image of any of the {SUBSTITUTES} records after it")


def build_dataset(
    data_config: DataConfig,
    tokenizer: TextTokenizer,
    image_processor: ImageProcessor,
    num_image_tokens: int,
    *,
    seed: int,
    epochs: int,
    batching: Literal["packed", "padded", "grouped"] = "padded",
    global_batch_size: int = 1,
    micro_batch_size: int = 1,
    resuming: bool = False,
    store_lengths: bool = True,
) -> SupervisedDataset:
    """Read the sources of a configuration and check templates, files, records, images and lengths.

    Sources with lambda 0 are not read. For each source, logs the numbers of records, of samples per epoch, and of
    records cut at `max_length`.

    Args:
        data_config: Section `data` of the configuration.
        tokenizer: Tokenizer of the language model.
        image_processor: Image processor of the vision tower.
        num_image_tokens: Tokens of one image; of one in tiles, the image processor's grid knows them.
        seed: Seed of the order.
        epochs: Passes over the mixture.
        batching: `packed` counts the tokens of every record (about a minute for 300,000); `grouped` uses LLaVA's order
            for `global_batch_size` and `micro_batch_size`.
        global_batch_size, micro_batch_size: Samples of a step and of a micro-batch, for `grouped`.
        resuming: Whether the run has trained on this data before. Missing images are then not an error; they are
            replaced when they are read, as without a restart.
        store_lengths: Whether to store token counts, so that the next run need not count: those of prepared sets beside
            them, others in `data.cache_dir`.

    Raises:
        ConfigError: the template is unknown, the mixture is empty, a lambda is below 0, or `max_length` is too small
            for one image.
        DataError: a file, a record or an image is invalid; the message starts with the file.
    """
    template = resolve_template(data_config.template, tokenizer)
    names = _active_sources(data_config)
    grid = image_processor.grid
    largest = num_image_tokens if grid is None else grid.most
    if data_config.max_length <= largest:
        which = "an image; raise it" if grid is None else "the largest image; raise it, or give smaller pinpoints"
        raise ConfigError(
            f"data.max_length {data_config.max_length} leaves no room for text beside the {largest} tokens of {which}"
        )
    _warn_about_end_marker(template, tokenizer)
    limits = Limits(template, tokenizer, num_image_tokens, data_config.max_length, data_config.max_length_policy, grid)
    all_records, readers = _open_sources(data_config, names)
    # A text that is escaped or refused is found by counting: its bytes do not tell.
    all_lengths = batching == "packed" or data_config.validation_samples > 0 or data_config.special_tokens != "keep"
    digests = on_main(
        lambda: {name: source_digest(all_records[name], data_config.sources[name].annotations) for name in names}
    )
    fitted = {}
    for name in names:
        if not resuming:
            _check_images(all_records[name], readers[name])
        # Rank 0 counts for all ranks.
        fit = partial(
            fit_source,
            all_records[name],
            limits,
            name,
            all_lengths=all_lengths,
            store=store_lengths,
            place=ImagePlace(readers[name], image_processor.modes),
            count_place=CountPlace(Path(data_config.cache_dir) / "lengths", digests[name]),
        )
        fitted[name] = on_main(fit)
    fitting = {name: fitted[name].select(all_records[name]) for name in names}
    records, held_out = hold_out(fitting, data_config.validation_samples, seed)
    lambdas = {name: value for name, value in data_config.mixture.items() if name in records}
    sizes = {name: len(records[name]) for name in names}
    plan = TrainingPlan(sizes, lambdas, seed, epochs, detail=_plan_detail(all_records, fitted))
    report = {}
    for name in names:
        counts = {"cut": fitted[name].cut, "shortened": fitted[name].shortened, "dropped": fitted[name].dropped}
        text_only = int((image_counts(records[name]) == 0).sum())
        report[name] = {"records": sizes[name], "text_only": text_only, **counts}
        logger.info(
            "data: %s: %s, lambda %g, %s per epoch, %d text only, %s at %d tokens",
            name,
            count_of(sizes[name], "record"),
            lambdas.get(name, 1.0),
            count_of(plan.counts[name] // epochs, "sample"),
            text_only,
            ", ".join(f"{count} {what}" for what, count in counts.items() if count or what == "cut"),
            data_config.max_length,
        )
    if batching == "grouped":
        words = {name: modality_lengths(records[name]).tolist() for name in names}
        plan = GroupedPlan(plan, words, global_batch_size, micro_batch_size, seed)
    samples, passes = count_of(len(plan), "sample"), count_of(epochs, "epoch")
    logger.info("data: %s in %s, plan %s", samples, passes, plan.digest[:12])
    lengths = {name: _lengths_of(records[name], fitted[name]) for name in names} if all_lengths else None
    reading = partial(
        SupervisedDataset,
        readers=readers,
        limits=limits,
        image_processor=image_processor,
        image_draft=data_config.image_draft,
    )
    dataset = reading(records, plan=plan, lengths=lengths)
    dataset.report = report
    dataset.digests = digests
    if held_out:
        once = TrainingPlan({name: len(held_out[name]) for name in names}, {}, seed, epochs=1)
        held_out_lengths = {name: _lengths_of(held_out[name], fitted[name]) for name in names}
        dataset.validation = reading(held_out, plan=once, lengths=held_out_lengths)
        dataset.validation.warned = dataset.warned
        held = count_of(data_config.validation_samples, "sample")
        logger.info("data: held out for validation: %s of each source", held)
    return dataset


def _open_sources(
    data_config: DataConfig, names: Sequence[str]
) -> tuple[dict[str, Sequence[Record]], dict[str, ImageReader]]:
    """Records and image readers by source. Rank 0 builds the indexes of shards; without a shared folder, every node."""
    for name in names if get_world_size() > 1 else ():
        if is_sharded(data_config.sources[name].annotations):
            on_main(partial(_index, data_config, name))
    opened = {name: open_source(data_config, name) for name in names}
    return {name: records for name, (records, _) in opened.items()}, {
        name: reader for name, (_, reader) in opened.items()
    }


def _index(data_config: DataConfig, name: str) -> None:
    open_source(data_config, name)


def _lengths_of(records: Sequence[Record], fitted: Fitted) -> npt.NDArray[np.int32]:
    """Lengths of the records that `hold_out` selected from a fitted source."""
    assert fitted.lengths is not None
    if isinstance(records, RecordSubset) and len(records) < len(fitted.lengths):
        return fitted.lengths[records.indices]
    return fitted.lengths


def _plan_detail(records: Mapping[str, Sequence[Record]], fitted: Mapping[str, Fitted]) -> str:
    """The part of the plan's digest beyond sizes: kept records and shards of prepared sets; empty without either.

    The digest of a prepared set is not used, because it also covers the time of preparation.
    """
    digest = hashlib.sha256()
    kept = {name: outcome.kept for name, outcome in fitted.items() if outcome.kept is not None}
    for name, indices in kept.items():
        digest.update(name.encode())
        digest.update(indices.astype("<i8").tobytes())
    prepared = {name: source for name, source in records.items() if isinstance(source, PreparedRecords)}
    for name, source in prepared.items():
        shards = " ".join(shard["sha256"] for shard in source.manifest["shards"])
        digest.update(f"\n{name}: {shards}".encode())
    return digest.hexdigest() if kept or prepared else ""


def _active_sources(data_config: DataConfig) -> list[str]:
    """Names of the sources with lambda above 0. Checks the mixture before any file is read."""
    check_lambdas(data_config.sources, data_config.mixture)
    return [name for name in data_config.sources if data_config.mixture.get(name, 1.0) > 0]


def _warn_about_end_marker(template: Template, tokenizer: TextTokenizer) -> None:
    if template.stop.strip() and len(tokenizer.encode_with_offsets(template.stop)[0]) != 1:
        logger.warning(
            "template %r ends answers with %r, which this tokenizer splits into several tokens: the model learns to "
            "write it out, and generation must stop at that string",
            template.name,
            template.stop,
        )


def _check_images(records: Sequence[Record], reader: ImageReader) -> None:
    """Raise DataError for a missing image. `prepare` has checked prepared sets, so only a sample of them is tried."""
    known: set[str] = set()
    sampled = isinstance(records, PreparedRecords) or is_remote(reader.folder)
    for index in sample_of(len(records)) if sampled else range(len(records)):
        record = records[int(index)]
        for path in record.images:
            if path not in known:
                try:
                    reader.check(path)
                except DataError as error:
                    raise DataError(f"{record.where}: {error}") from None
                known.add(path)
