"""The key-value cache of a batch whose rows join and leave between the steps of decoding.

All rows end at the same column, so a step appends one column whatever the rows' lengths; shorter rows have padding on
the left, which the attention mask hides. A row's positions are therefore contiguous, and sliding windows, which
transformers builds from column numbers, stay right.

Shapes: R rows, H key-value heads, C columns of a buffer, W columns in use, D head size, n rows that join.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

_STEP = 64
"""Buffers grow by multiples of it, so that the cache moves to another buffer once in many steps."""


class _Window:
    """The rows and columns of the buffers that are in use, shared by all layers."""

    def __init__(self) -> None:
        self.rows = self.start = self.end = 0


class _RowLayer(CacheLayerMixin):
    """One layer: buffers `[R, H, C, D]`, of which the window is the cache."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self._window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def states(self) -> tuple[Tensor, Tensor]:
        """The buffers of keys and values."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def resize(self, like: tuple[Tensor, Tensor], rows: int, columns: int, start: int) -> None:
        """Move the window to column `start` of zeroed buffers with `rows` and `columns`."""
        w = self._window
        old = self.keys, self.values
        new = [each.new_zeros(rows, each.shape[1], columns, each.shape[3]) for each in like]
        for source, target in zip(old, new, strict=True):
            if source is not None and w.rows:
                target[: w.rows, :, start : start + w.end - w.start] = source[: w.rows, :, w.start : w.end]
        self.keys, self.values = new
        self.is_initialized = True

    def clear(self, rows: slice, columns: slice) -> None:
        """Set padding to zero. What another row has left there could be NaN, which a mask does not hide."""
        for buffer in self.states():
            buffer[rows, :, columns] = 0

    def put(self, row: int, keys: Tensor, values: Tensor) -> None:
        """Write a row `[H, L, D]`, ending where the window ends, with zeros on its left."""
        w = self._window
        first = w.end - keys.shape[1]
        self.clear(slice(row, row + 1), slice(w.start, first))
        for buffer, value in zip(self.states(), (keys, values), strict=True):
            buffer[row, :, first : w.end] = value

    def move(self, row: int, to: int) -> None:
        """Copy row `row` over row `to`."""
        w = self._window
        for buffer in self.states():
            buffer[to, :, w.start : w.end] = buffer[row, :, w.start : w.end]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new states `[R, H, q, D]` behind the window. It grows only by `RowCache.advance`."""
        w, (keys, values) = self._window, self.states()
        end = w.end + key_states.shape[2]
        keys[: w.rows, :, w.end : end] = key_states
        values[: w.rows, :, w.end : end] = value_states
        return keys[: w.rows, :, w.start : end], values[: w.rows, :, w.start : end]

    def get_seq_length(self) -> int:
        return self._window.end - self._window.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


class RowCache(Cache):
    """The cache of all rows. A forward pass writes one column, and `advance` makes it part of the cache.

    Until then the pass can be repeated, so a pass that fails leaves no trace.
    """

    def __init__(self) -> None:
        self._own: list[_RowLayer] = []
        super().__init__(layers=self._own)  # type: ignore[arg-type]
        self._window = _Window()
        self.lengths: list[int] = []
        """Tokens of each row that are in the cache."""

    @property
    def width(self) -> int:
        """Columns in use: the longest row."""
        return self._window.end - self._window.start

    @property
    def nbytes(self) -> int:
        """Size of all buffers."""
        return sum(each.nbytes for layer in self._own for each in layer.states())

    def add(self, prefilled: DynamicCache, lengths: Sequence[int]) -> None:
        """Append the n rows of a prefilled cache, which are padded on the left; `lengths` are their tokens.

        Raises:
            ValueError: the model keeps something else than keys and values of all tokens.
        """
        check_cache(prefilled)
        w, count = self._window, len(lengths)
        if not self._own:
            self._own.extend(_RowLayer(w) for _ in prefilled.layers)
        layers: list[Any] = prefilled.layers
        states = [(layer.keys, layer.values) for layer in layers]
        self._reserve(states, len(self.lengths) + count, max(lengths))
        shown, w.start = w.start, w.end - max([*self.lengths, *lengths])
        for layer, (keys, values) in zip(self._own, states, strict=True):
            layer.clear(slice(0, w.rows), slice(w.start, max(shown, w.start)))
            for n, length in enumerate(lengths):
                layer.put(w.rows + n, keys[n, :, -length:], values[n, :, -length:])
        w.rows += count
        self.lengths += lengths

    def advance(self) -> None:
        """Take the column that the last forward pass has written into the cache."""
        self._window.end += 1
        self.lengths = [length + 1 for length in self.lengths]
        self._reserve([], len(self.lengths), self.width)

    def remove(self, row: int) -> None:
        """Remove a row. The last row takes its place."""
        w, last = self._window, len(self.lengths) - 1
        if row != last:
            for layer in self._own:
                layer.move(last, row)
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        w.rows = last
        w.start = w.end - max(self.lengths, default=0)

    def row(self, row: int) -> DynamicCache:
        """A copy of one row without padding, for a pass of its own."""
        w, found = self._window, DynamicCache()
        for n, layer in enumerate(self._own):
            span = slice(w.end - self.lengths[row], w.end)
            keys, values = layer.states()
            found.update(keys[row : row + 1, :, span].clone(), values[row : row + 1, :, span].clone(), n)
        return found

    def mask(self, device: torch.device) -> Tensor | None:
        """bool `[R, W + 1]`, True at each row's tokens and the new column; None if there is no padding."""
        if len(set(self.lengths)) <= 1:
            return None
        columns = torch.arange(self.width + 1, device=device)
        return columns >= torch.tensor([self.width - length for length in self.lengths], device=device)[:, None]

    def _reserve(self, like: Sequence[tuple[Tensor, Tensor]], rows: int, width: int) -> None:
        """Make room for `rows` of `width` columns and one more column behind them, moving the window if needed."""
        w = self._window
        keys = self._own[0].keys if self._own else None
        held_rows, held_columns = (0, 0) if keys is None else (keys.shape[0], keys.shape[2])
        if not w.rows and keys is not None and width < held_columns:
            w.start = w.end = width  # an empty cache begins anew
        if rows <= held_rows and width <= w.end < held_columns:
            return
        needed = max(width, self.width)
        columns = max(held_columns, -(-(needed + 1 + _STEP) // _STEP) * _STEP)
        wanted = held_rows if rows <= held_rows else max(rows, min(2 * held_rows, rows + 8))
        start = needed - self.width
        for n, layer in enumerate(self._own):
            layer.resize(like[n] if like else layer.states(), wanted, columns, start)
        w.start, w.end = start, needed


def check_cache(cache: DynamicCache) -> None:
    """Raise ValueError if a model's cache holds something else than the keys and values of all tokens."""
    kinds = sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})
    if kinds:
        raise ValueError(
            f"this language model keeps {', '.join(kinds)} between the steps of decoding, and only keys and values can "
            "be batched continuously; use llava-mole chat or eval"
        )
