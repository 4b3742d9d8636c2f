"""Weight files: tensors read by name one at a time, checked, and written shard by shard."""

import copy
import io
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_mole import __version__
from llava_mole.common.errors import WeightsError
from llava_mole.common.files import read_json
from llava_mole.common.text import count_of, shorten

ENTRY_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""The files a model directory may be read from, in transformers' order of preference."""
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
LABEL_FILE = "llava_mole.json"
LABEL_FORMAT = "llava_mole.converted/1"
SHARD_BYTES = 1_000_000_000
"""Largest shard written. A shard is collected in memory first, so this limits the memory of a conversion."""
SHOWN = 5
"""Number of names that an error lists before it only counts."""


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by name, over one or several files. A tensor is read on access; one file is open at a time.

    Raises WeightsError if a file is missing or unreadable, holds more than tensors, or two files hold the same name.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = tuple(files)
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of every tensor, from the files' headers."""
        self._stored: dict[str, tuple[Path, str]] = {}
        """File of a tensor and its name there."""
        self._open: dict[Path, Any] = {}  # at most one file, also over all parts
        for file in self.files:
            handle = self._handle(file)
            for name in handle.keys():
                if name in self._stored:
                    raise WeightsError(f"{file} and {self._stored[name][0]} both hold {name}; remove one of the files")
                header = handle[name].shape if isinstance(handle, dict) else handle.get_slice(name).get_shape()
                self._stored[name], self.shapes[name] = (file, name), tuple(header)

    def part(self, names: Mapping[str, str]) -> "Weights":
        """Some of the tensors under new names. `names` is new name -> present name."""
        part = copy.copy(self)
        name_of = {present: name for name, present in names.items()}
        part._stored = {name_of[present]: stored for present, stored in self._stored.items() if present in name_of}
        part.shapes = {name: self.shapes[names[name]] for name in part._stored}
        return part

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open.clear()
            self._open[file] = _open_file(file)
        return self._open[file]

    def __getitem__(self, name: str) -> torch.Tensor:
        file, stored = self._stored[name]
        handle = self._handle(file)
        return handle[stored] if isinstance(handle, dict) else handle.get_tensor(stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        """Yield the names file by file, so that reading all tensors in this order opens each file once."""
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def bytes(self) -> int:
        """Size of the files together."""
        return sum(file.stat().st_size for file in self.files)

    def __str__(self) -> str:
        return str(self.files[0] if len(self.files) == 1 else self.files[0].parent)


def open_weights(path: Path) -> Weights:
    """The weights in a file or a model directory.

    Raises WeightsError if there are none, a file is unreadable, or a shard lacks a tensor that the index names.
    """
    if path.is_file():
        return Weights([path])
    files = find_weights(path)
    if not files:
        raise WeightsError(f"{path} holds no weights; looked for {', '.join(ENTRY_FILES)}")
    weights, entry = Weights(files), _entry(path)
    if entry is not None and entry.suffix == ".json":
        check_names(path, weights, _weight_map(entry), "its index names")
    return weights


def find_weights(directory: Path) -> list[Path]:
    """The weight files of a Hugging Face model directory; empty if it has none.

    If a directory holds several formats, the first of `ENTRY_FILES` is taken, as in transformers. Raises WeightsError
    if the index is malformed or names files that do not exist.
    """
    file = _entry(directory)
    if file is None or file.suffix != ".json":
        return [] if file is None else [file]
    files = sorted({str(name) for name in _weight_map(file).values()})
    bad = [name for name in files if Path(name).name != name]
    if bad:
        raise WeightsError(f"{file} names {bad[0]!r}, which is not a file beside it")
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        raise WeightsError(f"{directory} lacks {len(absent)} of {len(files)} shards: {shorten(absent)}")
    return [directory / name for name in files]


def _entry(directory: Path) -> Path | None:
    return next((directory / name for name in ENTRY_FILES if (directory / name).is_file()), None)


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{index} has no weight_map; download it again")
    return weight_map


def _open_file(path: Path) -> Any:
    """A `safe_open` handle, or the state dict of a `.bin` or `.pt` file.

    Pickles are read with `weights_only=True`, so no code in them runs, and memory-mapped if their format allows it.
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
        raise WeightsError(f"{path} is not a weight file; its name must end in {', '.join(SUFFIXES)}")
    can_be_mapped = zipfile.is_zipfile(path)  # not if written before torch 1.6
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except Exception as error:  # torch raises many types; each means that the file is cut short or holds code
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"{path} is damaged or holds more than tensors, which is never executed here; convert it to safetensors "
            f"if you trust it ({reason})"
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise WeightsError(f"{path} is not a state dict but a {type(state).__name__}")
    strange = [str(n) for n, value in state.items() if not isinstance(n, str) or not isinstance(value, torch.Tensor)]
    if strange:
        raise WeightsError(f"{path} is not a state dict: no named tensor at {shorten(strange)}")
    return state


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError if the file is unreadable, WeightsError for another JSON value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def check_names(where: object, found: Mapping[str, Any], needed: Mapping[str, Any], who: str = "needed are") -> None:
    """Raise WeightsError if names are missing or unexpected, and list them."""
    missing, unexpected = [n for n in needed if n not in found], [n for n in found if n not in needed]
    problems = [f"{len(missing)} missing: {shorten(missing, SHOWN)}"] if missing else []
    problems += [f"{len(unexpected)} unexpected: {shorten(unexpected, SHOWN)}"] if unexpected else []
    if problems:
        raise WeightsError(f"{where} does not fit ({who} {count_of(len(needed), 'tensor')}): {'; '.join(problems)}")


def check_shapes(where: object, found: Mapping[str, tuple[int, ...]], needed: Mapping[str, tuple[int, ...]]) -> None:
    """Raise WeightsError if names are missing or unexpected or shapes differ, and list them."""
    check_names(where, found, needed)
    other = [f"{n} is {tuple(found[n])}, needed is {tuple(needed[n])}" for n in needed if found[n] != needed[n]]
    if other:
        count = count_of(len(other), "tensor")
        raise WeightsError(f"{where} does not fit: {count} of another shape: {shorten(other, SHOWN)}")


def check_finite(where: object, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise WeightsError if tensors have values that are not finite, and list them."""
    broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise WeightsError(f"{where} has values that are not finite, in {shorten(broken)}; download it again")


def write_object(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object into a directory that is not yet published. Raises OSError."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_label(directory: Path, fields: dict[str, Any]) -> None:
    """Write `llava_mole.json`: where a directory's files come from and whether they are exact."""
    write_object(directory / LABEL_FILE, {"format": LABEL_FORMAT, "version": __version__, **fields})


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, prefix: str = "") -> None:
    """Write a `.safetensors` file, with `prefix` before every name."""
    from safetensors.torch import save_file

    save_file({prefix + name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def save_pickle(tensors: Mapping[str, torch.Tensor], path: Path, prefix: str) -> None:
    """Write a small `.bin` file, with `prefix` before every name. Raises OSError, which torch.save would hide."""
    buffer = io.BytesIO()
    torch.save({prefix + name: value for name, value in tensors.items()}, buffer)
    path.write_bytes(buffer.getbuffer())


def write_shards(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], label: str, total: int) -> None:
    """Write `model.safetensors`, or numbered shards and their index if the tensors take more than `SHARD_BYTES`.

    The files are those of `huggingface_hub.save_torch_state_dict`, which needs the whole state dict in memory (13.5 GB
    for a 7B model in half precision). This function takes an iterator and holds one shard. Raises WeightsError if a
    tensor has values that are not finite.

    Args:
        directory: an existing directory.
        tensors: names and tensors, for example read one by one from other files.
        label: label of the progress bar.
        total: expected number of bytes, for the progress bar.
    """
    names: list[list[str]] = []
    written = 0
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=None) as bar:
        for shard in _shards(tensors, bar):
            save_tensors(shard, directory / f"shard-{len(names)}")
            names.append(list(shard))
            written += sum(tensor.nbytes for tensor in shard.values())
    count = len(names)
    if count == 1:
        os.replace(directory / "shard-0", directory / ENTRY_FILES[0])
    else:
        files = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        for number, file in enumerate(files):
            os.replace(directory / f"shard-{number}", directory / file)
        weight_map = {name: file for file, shard_names in zip(files, names, strict=True) for name in shard_names}
        index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(weight_map.items()))}
        write_object(directory / ENTRY_FILES[1], index)


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], bar: Any) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{name} has values that are not finite; download or train the weights again")
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        # A copy: memory-mapped views would keep their file's pages, and safetensors refuses shared storage.
        shard[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        bar.update(tensor.nbytes)
    yield shard
