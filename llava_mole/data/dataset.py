"""The training set: positions of a plan become examples, and `build_dataset` checks everything before a run starts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from llava_mole.config import DataConfig
from llava_mole.conversation import Rendered, Template, render
from llava_mole.data.chat_template import resolve_template
from llava_mole.data.collator import Example
from llava_mole.data.grouping import GroupedPlan, modality_length
from llava_mole.data.holdout import hold_out
from llava_mole.data.images import ImageProcessor, load_image, resolve_image
from llava_mole.data.mixture import TrainingPlan, check_lambdas
from llava_mole.data.records import Record, read_records
from llava_mole.data.tokenization import Encoded, TextTokenizer, encode
from llava_mole.errors import ConfigError, DataError
from llava_mole.log import get_logger

SUBSTITUTES = 100
"""Records that are tried in place of one whose image cannot be read: beyond that the whole folder is gone."""

logger = get_logger(__name__)


class SupervisedDataset:
    """Map-style data set over the positions of a plan; can be pickled into data loader workers.

    Args:
        records_by_source: Records of each source of the plan.
        image_folders: Root of the image paths, by source.
        plan: Which sample comes when.
        tokenizer: Tokenizes the rendered conversations.
        template_name: One of `templates.TEMPLATES`, or `tokenizer`; unknown names raise ConfigError.
        image_processor: Makes the tower's input of an image.
        num_image_tokens: Placeholder ids for one image.
        max_length: Most tokens of a sample; longer ones are cut at the end.
        lengths: Tokens of every record, by source; only `lengths` needs them.
    """

    def __init__(
        self,
        records_by_source: Mapping[str, Sequence[Record]],
        image_folders: Mapping[str, str],
        plan: TrainingPlan | GroupedPlan,
        tokenizer: TextTokenizer,
        template_name: str,
        image_processor: ImageProcessor,
        num_image_tokens: int,
        max_length: int,
        lengths: Mapping[str, npt.NDArray[np.int32]] | None = None,
    ) -> None:
        self.plan = plan
        self._template = resolve_template(template_name, tokenizer)
        self._records = dict(records_by_source)
        self._image_folders = dict(image_folders)
        self._source_index = {name: index for index, name in enumerate(plan.names)}
        self._tokenizer = tokenizer
        self._image_processor = image_processor
        self._num_image_tokens = num_image_tokens
        self._max_length = max_length
        self._lengths = lengths
        self.validation: SupervisedDataset | None = None
        """Samples held out of the plan, each once; None where validation is off."""

    def lengths(self, positions: Iterable[int]) -> list[int]:
        """Tokens of the samples at some positions of the plan. Raises ValueError if lengths were not counted."""
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

        Where an image of it cannot be read, the next record of its source whose images can be takes its place: the same
        one at every attempt, on every rank. `Example.replaced_image` then says what was wrong.

        Raises:
            DataError: the record cannot be used, or no image near it can be read; the message starts with `file:line`.
        """
        source, sample = self.plan[position]
        record, pictures, replaced = readable_record(self._records[source], sample, self._image_folders[source])
        encoded = encode_record(record, self._template, self._tokenizer, self._num_image_tokens, self._max_length)
        images = torch.stack([self._image_processor(picture) for picture in pictures]) if pictures else None
        index = self._source_index[source]
        return Example(record.id, source, index, encoded.input_ids, encoded.labels, images, replaced)


def readable_record(
    records: Sequence[Record], sample: int, image_folder: str
) -> tuple[Record, list[Image.Image], str | None]:
    """Record `sample` with its decoded images, or the next one with images that can be read, and what was wrong.

    Raises:
        DataError: none of the next 100 records has images that can be read.
    """
    problem = None
    for offset in range(min(len(records), 1 + SUBSTITUTES)):
        record = records[(sample + offset) % len(records)]
        if not record.images and problem is not None:
            continue
        try:
            return record, [load_image(path, image_folder) for path in record.images], problem
        except DataError as error:
            problem = problem or f"{record.where}: {error}"
    raise DataError(f"{problem}; nor can the image of any of the {SUBSTITUTES} records after it")


def encode_record(
    record: Record, template: Template, tokenizer: TextTokenizer, num_image_tokens: int, max_length: int
) -> Encoded:
    """Render and tokenize one record.

    Raises:
        DataError: the template cannot hold it, its image is cut off by `max_length`, or no supervised token is left;
            the message starts with `file:line`.
    """
    rendered = _render(record, template)
    try:
        encoded = encode(rendered, tokenizer, num_image_tokens=num_image_tokens, max_length=max_length)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
    if encoded.num_images != len(record.images):
        raise DataError(
            f"{record.where}: template {template.name!r} shows {encoded.num_images} of the record's "
            f"{len(record.images)} images; take another template, or one image a record"
        )
    if not encoded.num_supervised:
        raise DataError(
            f"{record.where}: no token of an answer is left after the cut at data.max_length {max_length} "
            f"({len(encoded.input_ids) + encoded.truncated} tokens); raise it, or shorten or remove the record"
        )
    return encoded


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
) -> SupervisedDataset:
    """Read the sources of a configuration and check all of it: template, files, records, images, lengths.

    Sources with lambda 0 are not read. Logs for each source how many records it has, how many samples of it an epoch
    takes, and how many of its records are cut at `max_length`.

    Args:
        data_config: Section `data` of the configuration.
        tokenizer: Of the language model.
        image_processor: Of the vision tower.
        num_image_tokens: Feature rows of one image.
        seed: Seed of the order.
        epochs: Passes over the mixture.
        batching: `packed` counts the tokens of every record, which takes a minute for some 300,000; `grouped` puts
            the plan into LLaVA's order for `global_batch_size` and `micro_batch_size`.
        global_batch_size, micro_batch_size: Samples of a step and of a micro-batch, for `grouped`.
        resuming: The run has trained on this data before: an image that is gone by now is replaced when its turn
            comes, as it would be without a restart.

    Raises:
        ConfigError: unknown template, empty mixture, lambda below 0, `max_length` too small for one image.
        DataError: anything wrong with a file, a record or an image; the message starts with the file.
    """
    template = resolve_template(data_config.template, tokenizer)
    names = _active_sources(data_config)
    if data_config.max_length <= num_image_tokens:
        raise ConfigError(
            f"data.max_length {data_config.max_length} leaves no room for text beside the {num_image_tokens} tokens of "
            "an image; raise it"
        )
    _warn_about_end_marker(template, tokenizer)
    all_records = {name: read_records(data_config.sources[name].annotations, name) for name in names}
    records, held_out = hold_out(all_records, data_config.validation_samples, seed)
    image_folders = {name: data_config.sources[name].image_folder for name in names}
    lambdas = {name: value for name, value in data_config.mixture.items() if name in records}
    plan: TrainingPlan | GroupedPlan
    plan = base = TrainingPlan({name: len(records[name]) for name in names}, lambdas, seed, epochs)
    lengths: dict[str, npt.NDArray[np.int32]] | None = {} if batching == "packed" else None
    held_out_lengths: dict[str, npt.NDArray[np.int32]] = {}
    for name in names:
        if not resuming:
            _check_images(all_records[name], image_folders[name])
        limits = (template, tokenizer, num_image_tokens, data_config.max_length)
        if lengths is None:
            cut = _count_cut(records[name], *limits)
        else:
            lengths[name], cut = _count_tokens(records[name], *limits)
        if name in held_out:
            held_out_lengths[name], _ = _count_tokens(held_out[name], *limits)
        logger.info(
            "data: %s: %d records, lambda %g, %d samples an epoch, %d text only, %d cut at %d tokens",
            name,
            len(records[name]),
            lambdas.get(name, 1.0),
            base.counts[name] // epochs,
            sum(not record.images for record in records[name]),
            cut,
            data_config.max_length,
        )
    if batching == "grouped":
        words = {name: [modality_length(record) for record in records[name]] for name in names}
        plan = GroupedPlan(base, words, global_batch_size, micro_batch_size, seed)
    logger.info("data: %d samples in %d epochs, plan %s", len(plan), epochs, plan.digest[:12])
    rest = (tokenizer, data_config.template, image_processor, num_image_tokens, data_config.max_length)
    dataset = SupervisedDataset(records, image_folders, plan, *rest, lengths)
    if held_out:
        once = TrainingPlan({name: len(held_out[name]) for name in names}, {}, seed, epochs=1)
        dataset.validation = SupervisedDataset(held_out, image_folders, once, *rest, held_out_lengths)
        logger.info("data: %d samples of each source are held out for validation", data_config.validation_samples)
    return dataset


def _active_sources(data_config: DataConfig) -> list[str]:
    """Names with lambda above 0. The mixture is checked here, before any file is read."""
    check_lambdas(data_config.sources, data_config.mixture)
    return [name for name in data_config.sources if data_config.mixture.get(name, 1.0) > 0]


def _warn_about_end_marker(template: Template, tokenizer: TextTokenizer) -> None:
    if template.stop.strip() and len(tokenizer.encode_with_offsets(template.stop)[0]) != 1:
        logger.warning(
            "template %r ends answers with %r, which is several tokens of this tokenizer: the model learns to write it "
            "out, and generation must stop at that string",
            template.name,
            template.stop,
        )


def _check_images(records: Sequence[Record], folder: str) -> None:
    known: set[str] = set()
    for record in records:
        for path in record.images:
            if path not in known:
                try:
                    resolve_image(path, folder)
                except DataError as error:
                    raise DataError(f"{record.where}: {error}") from None
                known.add(path)


def _count_tokens(
    records: Sequence[Record], template: Template, tokenizer: TextTokenizer, num_image_tokens: int, max_length: int
) -> tuple[npt.NDArray[np.int32], int]:
    """Tokens of every record after the cut, and how many are cut; finds unusable records, as `_count_cut` does."""
    lengths, cut = np.empty(len(records), dtype=np.int32), 0
    bar = tqdm(records, desc="counting tokens", unit="record", mininterval=1.0, delay=3.0, disable=None)
    for index, record in enumerate(bar):
        encoded = encode_record(record, template, tokenizer, num_image_tokens, max_length)
        lengths[index] = len(encoded.input_ids)
        cut += bool(encoded.truncated)
    return lengths, cut


def _count_cut(
    records: Sequence[Record], template: Template, tokenizer: TextTokenizer, num_image_tokens: int, max_length: int
) -> int:
    """How many records are longer than `max_length`; finds those that the template or the cut makes unusable.

    Only records that may be too long are tokenized. A token covers at least one byte of the text, but for the leading
    space of each piece, so bytes bound the tokens. A normaliser that lengthens rare characters could pass the bound;
    such a record is then cut, and checked, when it is loaded.
    """
    cut = 0
    for record in records:
        rendered = _render(record, template)
        images = len(record.images)
        most_tokens = 1 + len(rendered.text.encode()) + (images + 1) + images * num_image_tokens
        if most_tokens > max_length:
            cut += bool(encode_record(record, template, tokenizer, num_image_tokens, max_length).truncated)
    return cut


def _render(record: Record, template: Template) -> Rendered:
    try:
        return render(template, record.turns)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from None
