"""Some records of a sequence, by index."""

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from llava_mole.data.records import Record


class RecordSubset(Sequence[Record]):
    """Records `indices` (int64) of `records`, in this order; nothing is copied."""

    def __init__(self, records: Sequence[Record], indices: npt.NDArray[np.int64]) -> None:
        self.records = records
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return RecordSubset(self.records, self.indices[index])
        return self.records[int(self.indices[index])]
