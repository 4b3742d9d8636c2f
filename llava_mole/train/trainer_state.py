"""The optimizer's state of a checkpoint on disk: one whole file, or the pieces that every rank has written.

A piece file `trainer/optimizer-00001-of-00004.safetensors` holds flat slices, `<kind>/<parameter>`, and in its metadata
the shape of every parameter and where its slice begins. Together the slices of all files are every parameter once.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llava_mole.common.distributed import all_gather_objects, get_rank, get_world_size, on_main
from llava_mole.common.errors import CheckpointError
from llava_mole.common.files import sync
from llava_mole.model.checkpoint import OPTIMIZER_FILE, PIECES, TRAINER_DIR
from llava_mole.train.strategy import Strategy
from llava_mole.train.trained_parts import trained_parts

_PLACES = "fragments"


class TrainerState(Mapping[str, torch.Tensor]):
    """`{"<kind>/<parameter>": float32 tensor}` of a verified checkpoint; a tensor is read on access, whole.

    Raises CheckpointError if the checkpoint has no such state, or pieces of it are missing.
    """

    def __init__(self, checkpoint: Path) -> None:
        whole = checkpoint / OPTIMIZER_FILE
        self.is_whole = whole.is_file()
        self.files = [whole] if self.is_whole else sorted((checkpoint / TRAINER_DIR).glob(PIECES))
        if not self.files:
            raise CheckpointError(f"{checkpoint} has no {OPTIMIZER_FILE}: no run can resume from it")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[tuple[Path, int]]] = {}
        """Tensor -> the files that hold a slice of it, and where that begins."""
        self._open: dict[Path, Any] = {}
        covered: dict[str, int] = {}
        for file in self.files:
            handle = self._handle(file)
            places = {} if self.is_whole else json.loads(handle.metadata()[_PLACES])
            for key in handle.keys():
                shape = tuple(handle.get_slice(key).get_shape())
                start, whole_shape = (0, shape) if self.is_whole else places[key.partition("/")[2]]
                self.shapes[key] = tuple(whole_shape)
                self._places.setdefault(key, []).append((file, start))
                covered[key] = covered.get(key, 0) + math.prod(shape)
        partly = [key for key, shape in self.shapes.items() if covered[key] != math.prod(shape)]
        if partly:
            raise CheckpointError(
                f"{checkpoint / TRAINER_DIR} lacks pieces of {len(partly)} tensors (first: {partly[0]}); all files "
                f"{PIECES} that the ranks wrote must be there"
            )

    def _handle(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]

    def __getitem__(self, key: str) -> torch.Tensor:
        if self.is_whole:
            return self._handle(self.files[0]).get_tensor(key)
        flat = torch.empty(math.prod(self.shapes[key]), dtype=torch.float32)
        for file, start in self._places[key]:
            piece = self._handle(file).get_tensor(key)
            flat[start : start + piece.numel()] = piece
        return flat.reshape(self.shapes[key])

    def __contains__(self, key: object) -> bool:
        return key in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class Pieces:
    """What the ranks write of one checkpoint, each its own file into the same folder.

    Every rank makes one of `strategy`, and calls `write` as often as rank 0 does.
    """

    def __init__(self, strategy: Strategy) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        self.elements = 0
        """Trained weights, over all ranks."""
        self.parts = trained_parts(set(strategy.parameters))
        """Which of language model and vision tower are among them."""
        for fragment in strategy.fragments():
            self.elements += math.prod(fragment.shape)
            if fragment.inside.stop > fragment.inside.start:
                self._places[fragment.name] = fragment.inside.start, fragment.shape
                for kind, held in strategy.values(fragment):
                    self._tensors[f"{kind}/{fragment.name}"] = held.detach().to("cpu", torch.float32, copy=True)

    def write(self, directory: Path | None) -> None:
        """Write this rank's file below rank 0's `directory`, or nothing if that is None; a collective.

        Raises:
            OSError: some rank could not write; on every rank. The message names the first one.
        """
        target, problem = on_main(lambda: directory), None
        if target is None:
            return
        name = f"optimizer-{get_rank():05d}-of-{get_world_size():05d}.safetensors"
        try:
            file = target / TRAINER_DIR / name
            save_file(self._tensors, file, metadata={_PLACES: json.dumps(self._places)})
            sync(file)  # of another machine's disk cache too
        except Exception as error:  # OSError, or what safetensors makes of one
            problem = " ".join(f"{type(error).__name__}: {error}".split())
        problems = [(rank, text) for rank, text in enumerate(all_gather_objects(problem)) if text]
        if problems:
            raise OSError(f"rank {problems[0][0]} could not write {name}: {problems[0][1]}")


def write_together(pieces: Pieces | None, write: Callable[[Callable[[Path], None]], str | None]) -> str | None:
    """Run `write` on rank 0 and let the other ranks write their pieces when it asks for them; a collective.

    Args:
        pieces: Of this rank; None where rank 0 writes everything.
        write: Writes a checkpoint on rank 0, calls its argument with the folder once, and returns the error text.

    Returns:
        The error text on rank 0, None elsewhere and on success.
    """
    if get_rank() != 0:
        if pieces is not None:
            try:
                pieces.write(None)
            except OSError:
                return None  # rank 0 has it too
        return None
    asked = False

    def ask(directory: Path) -> None:
        nonlocal asked
        asked = True
        if pieces is not None:
            pieces.write(directory)

    problem = write(ask)
    if pieces is not None and not asked:
        pieces.write(None)  # it failed before: the others are waiting
    return problem
