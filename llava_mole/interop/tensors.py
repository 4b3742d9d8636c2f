"""Reads tensors by name from weight files of any size, one at a time."""

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_mole import __version__
from llava_mole.common.errors import WeightsError

ENTRY_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""What a model directory is read from, in transformers' order."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
SHOWN = 5
"""How many names an error lists before it only counts."""


class Weights(Mapping[str, torch.Tensor]):
    """Name -> tensor over one or several files. A tensor is read when it is asked for; only one file is open.

    Raises:
        WeightsError: a file is absent or unreadable, holds more than tensors, or two files hold the same name.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = tuple(files)
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: tuple[Path, Any] | None = None
        for file in self.files:
            for name, shape in _shapes(self._handle(file)).items():
                if name in self._file_of:
                    raise WeightsError(f"{file} and {self._file_of[name]} both hold {name}; remove one of the files")
                self._file_of[name], self._shapes[name] = file, shape

    def _handle(self, file: Path) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = (file, open_file(file))
        return self._open[1]

    def __getitem__(self, name: str) -> torch.Tensor:
        handle = self._handle(self._file_of[name])
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        """Names in the files' order, so that reading them all opens each file once."""
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Read from the header, not from the values."""
        return self._shapes[name]

    @property
    def bytes(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self.files)

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def open_file(path: Path) -> Any:
    """A `safe_open` handle, or the dict of a `.bin`/`.pt` file, which is memory-mapped where its format allows it.

    Pickles are read with `weights_only=True`: nothing in them is executed.

    Raises:
        WeightsError: no such file, not readable, or more in it than tensors.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{path} is not a readable safetensors file ({error}); download it again") from None
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path} is no weight file; its name must end in {', '.join(SUFFIXES)}")
    state = load_pickle(path)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise WeightsError(f"{path} is no state dict: {type(state).__name__} is none")
    strange = [str(n) for n, value in state.items() if not (isinstance(n, str) and isinstance(value, torch.Tensor))]
    if strange:
        raise WeightsError(f"{path} is no state dict: {shorten(strange)} is no tensor with a name")
    return state


def load_pickle(path: Path) -> Any:
    """What a torch file holds. Raises WeightsError where that is more than tensors and plain containers."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written before torch 1.6: no zip archive, which memory-mapping needs
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means that the file is cut short or holds code
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"{path} is damaged or holds more than tensors, which is never executed here; convert it to safetensors "
            f"where you trust it ({reason})"
        ) from None


def find_weights(directory: Path) -> list[Path]:
    """The weight files of a Hugging Face model directory; empty where it has none.

    Where there are several forms, as after saving twice, it is the one that transformers loads.

    Raises:
        WeightsError: an index names files that are not there, or is no index.
    """
    file = _entry(directory)
    if file is None or file.suffix != ".json":
        return [] if file is None else [file]
    files = sorted({str(name) for name in _weight_map(file).values()})
    bad = [name for name in files if Path(name).name != name]
    if bad:
        raise WeightsError(f"{file} names {bad[0]!r}, which is no file beside it")
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        raise WeightsError(f"{directory} lacks {len(absent)} of {len(files)} shards: {shorten(absent)}")
    return [directory / name for name in files]


def open_weights(path: Path) -> Weights:
    """The weights in a file or model directory. Raises WeightsError, also where a shard lacks what its index names."""
    files = [path] if path.is_file() else find_weights(path)
    if not files:
        raise WeightsError(f"{path} holds no weights; looked for {', '.join(ENTRY_FILES)}")
    weights = Weights(files)
    entry = None if path.is_file() else _entry(path)
    if entry is not None and entry.suffix == ".json":
        check_names(path, weights, _weight_map(entry), "its index names")
    return weights


def _entry(directory: Path) -> Path | None:
    return next((directory / name for name in ENTRY_FILES if (directory / name).is_file()), None)


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map; download it again")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightsError where the file is absent or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WeightsError(f"{path} does not exist") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WeightsError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def shorten(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def two_spellings(one: str, other: str) -> str:
    """What is wrong with a file that names one tensor twice: which of them counts, nobody can say."""
    return f"{one} and {other} are one tensor in two spellings; remove one of them"


def check_names(where: object, found: Mapping[str, Any], needed: Mapping[str, Any], who: str = "needed are") -> None:
    """Raise WeightsError that lists names that are missing or unexpected."""
    missing, unexpected = [n for n in needed if n not in found], [n for n in found if n not in needed]
    problems = [f"{len(missing)} missing: {shorten(missing)}"] if missing else []
    problems += [f"{len(unexpected)} unexpected: {shorten(unexpected)}"] if unexpected else []
    if problems:
        raise WeightsError(f"{where} does not fit ({who} {len(needed)} tensors): {'; '.join(problems)}")


def check_shapes(where: object, found: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError that lists names that are missing or unexpected, or tensors of another shape, with both."""
    check_names(where, found, needed)
    other = [f"{n} is {tuple(found[n])}, needed is {tuple(needed[n])}" for n in needed if found[n] != needed[n]]
    if other:
        raise WeightsError(f"{where} does not fit: {len(other)} tensors of another shape: {shorten(other)}")


def check_finite(where: object, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightsError that lists tensors with values that are not finite."""
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise WeightsError(f"{where} has values that are not finite, in {shorten(broken)}; download it again")


def _shapes(handle: Any) -> dict[str, tuple[int, ...]]:
    if isinstance(handle, dict):
        return {name: tuple(value.shape) for name, value in handle.items()}
    return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}


LABEL_FILE = "llava_mole.json"
FORMAT = "llava_mole.converted/1"
SHARD_BYTES = 1_000_000_000
"""A shard is kept in memory until it is full, so this bounds the memory of a conversion."""


def write_label(directory: Path, fields: dict[str, Any]) -> None:
    """Write `llava_mole.json`: where the files of a directory come from and whether they are exact."""
    text = json.dumps({"format": FORMAT, "version": __version__, **fields}, indent=1) + "\n"
    (directory / LABEL_FILE).write_text(text, encoding="utf-8")


def save_pickle(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a small `.bin` file. Raises OSError where torch would make something else of a full disk."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    path.write_bytes(buffer.getbuffer())


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes tensors as `model.safetensors`, or as numbered shards with an index where they are more than one shard.

    Args:
        directory: exists; receives the files.
        label: of the progress bar, which counts bytes.
        total: bytes to come, for the bar; None where unknown.
        shard_bytes: size of a shard, held in memory until it is full.
    """

    def __init__(self, directory: Path, label: str, total: int | None = None, *, shard_bytes: int = SHARD_BYTES):
        self._directory = directory
        self._limit = shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total = 0
        self._bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor. Raises WeightsError where it has values that are not finite."""
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{name} has values that are not finite; download or train the weights again")
        if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
            self._flush()
        # A copy: memory-mapped views would keep their file's pages, and safetensors refuses shared storage.
        self._pending[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        self._pending_bytes += tensor.nbytes
        self._total += tensor.nbytes
        self._bar.update(tensor.nbytes)

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._flush()
        self._bar.close()
        count = len(self._shards)
        if count == 1:
            os.replace(self._shard(1), self._directory / "model.safetensors")
            return
        weight_map = {}
        for number, names in enumerate(self._shards, start=1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self._shard(number), self._directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self._directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", "utf-8")

    def _shard(self, number: int) -> Path:
        return self._directory / f"shard-{number}.safetensors"

    def _flush(self) -> None:
        from safetensors.torch import save_file

        if self._pending:
            self._shards.append(list(self._pending))
            save_file(self._pending, self._shard(len(self._shards)), metadata={"format": "pt"})
        self._pending, self._pending_bytes = {}, 0
