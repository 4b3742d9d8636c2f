"""Token counts of records: counted once for a tokenizer and template, kept inside a prepared data set.

Image positions are not counted, so the counts hold for every vision tower. They are a cache beside the shards:
`lengths-<key>.npy`, int32 [rows, 2], `key` from the tokenizer's own JSON, the template's strings, the version of
`tokenization` and the data set.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader
from tqdm import tqdm

from llava_mole.common.errors import DataError
from llava_mole.common.log import get_logger
from llava_mole.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_mole.conversation import Template, Turn, render
from llava_mole.data.chat_template import resolve_template
from llava_mole.data.encoding import render_record
from llava_mole.data.prepared import PreparedRecords
from llava_mole.data.records import Record
from llava_mole.data.store_format import sync_directory
from llava_mole.data.tokenization import VERSION, HFTextTokenizer, TextTokenizer, encode

Counts = npt.NDArray[np.int32]
"""[n, 2]: tokens of each record, and the tokens up to its last image and its first supervised token, whichever is
later: fewer than those make it useless. Image positions are not included in either."""
NEVER = int(np.iinfo(np.int32).max) // 2
"""Second column of a record without any supervised token."""
_CHUNK = 1024
_ALONE = 8
"""So many chunks are worked off in this process; more by several."""

logger = get_logger(__name__)


def count_record(record: Record, template: Template, tokenizer: TextTokenizer) -> tuple[int, int]:
    """One row of `Counts`. Raises DataError where the template cannot hold the record."""
    encoded = encode(render_record(record, template), tokenizer, num_image_tokens=1, max_length=None)
    ids, labels = encoded.input_ids, encoded.labels
    image_end = len(ids) - ids[::-1].index(IMAGE_TOKEN_INDEX) if encoded.num_images else 0
    supervised = next((n + 1 for n, label in enumerate(labels) if label != IGNORE_INDEX), None)
    needed = NEVER if supervised is None else max(supervised, image_end) - encoded.num_images
    return len(ids) - encoded.num_images, needed


def count_tokens(
    records: Sequence[Record],
    template: Template,
    tokenizer: TextTokenizer,
    *,
    name: str = "",
    processes: int | None = None,
) -> Counts:
    """`count_record` for every record, in several processes where there are many; arguments as for `map_records`."""
    count = partial(count_record, template=template, tokenizer=tokenizer)
    return map_records(records, count, f"counting tokens {name}".strip(), processes=processes)


def map_records(
    records: Sequence[Record],
    function: Callable[[Record], tuple[int, int]],
    title: str,
    *,
    processes: int | None = None,
) -> npt.NDArray[np.int32]:
    """Two numbers for every record, int32 [n, 2], with a progress bar.

    Args:
        records: Any sequence; it is pickled to the processes, as is `function`.
        function: Gives the numbers of a record.
        title: Shown beside the bar.
        processes: None takes the CPUs this process may use, and this process alone for a few thousand records.

    Raises:
        DataError: what `function` raised.
    """
    work = _Work(records, function)
    workers = _cpus() if processes is None else processes
    chunks: Iterable[tuple[int, npt.NDArray[np.int32] | str]] = map(work.__getitem__, range(len(work)))
    if workers > 1 and len(work) > _ALONE:
        # A loader gives each process the work once, keeps results in order, and notices a process that dies.
        chunks = DataLoader(work, batch_size=None, num_workers=workers, prefetch_factor=4, collate_fn=_as_it_is)  # type: ignore[arg-type]
    result = np.empty((len(records), 2), dtype=np.int32)
    with tqdm(total=len(records), desc=title, unit="record", delay=3.0, disable=None) as bar:
        for start, part in chunks:
            if isinstance(part, str):
                raise DataError(part)
            result[start : start + len(part)] = part
            bar.update(len(part))
    return result


class _Work:
    """Chunk number n of the work; an error is its message, since it has to travel between processes."""

    def __init__(self, records: Sequence[Record], function: Callable[[Record], tuple[int, int]]) -> None:
        self._records, self._function = records, function

    def __len__(self) -> int:
        return -(-len(self._records) // _CHUNK)

    def __getitem__(self, chunk: int) -> tuple[int, npt.NDArray[np.int32] | str]:
        start = chunk * _CHUNK
        rows = range(start, min(start + _CHUNK, len(self._records)))
        try:
            pairs = [self._function(self._records[row]) for row in rows]
        except DataError as error:
            return start, str(error)
        return start, np.array(pairs, dtype=np.int32).reshape(-1, 2)


def _as_it_is(part: Any) -> Any:
    """A loader's default would make tensors of arrays."""
    return part


def _cpus() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def lengths_path(records: PreparedRecords, template: Template, tokenizer: TextTokenizer) -> Path | None:
    """Where the counts of a prepared set lie; None for a tokenizer without an identity."""
    if not isinstance(tokenizer, HFTextTokenizer):
        return None
    parts = (str(VERSION), tokenizer.fingerprint, repr(template), records.digest)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return records.directory / f"lengths-{key}.npy"


def read_lengths(path: Path | None, rows: int) -> Counts | None:
    """Counts that were stored; None where there are none that can be used, which is said."""
    if path is None or not path.is_file():
        return None
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        logger.warning("%s: cannot be read (%s); the tokens are counted again", path, " ".join(str(error).split()))
        return None
    if counts.shape != (rows, 2) or counts.dtype != np.int32 or (counts.size and int(counts.min()) < 0):
        logger.warning("%s: does not fit the data set; the tokens are counted again", path)
        return None
    return counts


def stored_counts(
    records: PreparedRecords, template: Template, tokenizer: TextTokenizer, *, processes: int | None = None
) -> Counts:
    """The counts of a whole prepared set: read where they are stored, else counted and stored.

    A directory that cannot be written is reported, and the counts are used all the same. Raises as `count_tokens`.
    """
    path = lengths_path(records, template, tokenizer)
    counts = read_lengths(path, len(records))
    if counts is None:
        counts = count_tokens(records, template, tokenizer, name=records.source, processes=processes)
        if path is not None:
            _store(path, counts)
    return counts


def add_lengths(
    directory: str | os.PathLike[str], hf_tokenizer: Any, template_name: str, *, processes: int | None = None
) -> int:
    """Store the token counts of a prepared data set, so that no training run has to count; returns the tokens.

    Args:
        directory: Prepared data set.
        hf_tokenizer: Fast tokenizer of the language model.
        template_name: `data.template` of the runs to come.

    Raises:
        ConfigError: no such template.
        DataError: no prepared set, or the template cannot hold a record.
        WeightsError: see `HFTextTokenizer`.
    """
    tokenizer = HFTextTokenizer(hf_tokenizer)
    template = resolve_template(template_name, tokenizer)
    records = PreparedRecords(directory, Path(directory).name)
    return int(stored_counts(records, template, tokenizer, processes=processes)[:, 0].sum())


def _store(path: Path, counts: Counts) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, counts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        logger.warning("%s: cannot be written (%s); the next run counts the tokens again", path, error.strerror)
        temporary.unlink(missing_ok=True)


def most_tokens(records: PreparedRecords, template: Template, num_image_tokens: int) -> npt.NDArray[np.int64]:
    """An upper bound of the tokens of every record, from columns alone, int64 [n].

    A token covers at least one byte of the text, but for the leading space of each piece, so bytes bound the tokens. A
    normaliser that lengthens rare characters could pass the bound.
    """
    images, turns = (records.column(key).astype(np.int64) for key in ("num_images", "num_turns"))
    fixed, each = _overhead(template)
    return fixed + each * ((turns + 1) // 2) + records.column("text_bytes") + 2 + images * (num_image_tokens + 1)


def _overhead(template: Template) -> tuple[int, int]:
    """Bytes that a template adds to a conversation, and to each of its rounds."""
    if template.caption:
        return len(template.answer_end.encode()), 0
    sizes = []
    for rounds in (1, 2, 3):
        turns = [Turn("user", "x"), Turn("assistant", "x")] * rounds
        sizes.append(len(render(template, turns).text.encode()) - 2 * rounds)
    each = max(sizes[1] - sizes[0], sizes[2] - sizes[1])
    # An empty question is replaced by `user_empty`, which may be longer than what it replaces.
    return sizes[0] + len(template.user_empty.encode()), each + len(template.user_empty.encode())
