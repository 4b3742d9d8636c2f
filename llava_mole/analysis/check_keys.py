"""A set of 64-bit hashes in 11 to 23 bytes each, where Python's set of them takes 70: millions of names and contents.

Two different things have the same key by chance with probability n(n - 1) / 2^65 for n keys: 1 in 900 million for
200,000 of them, 1 in 37 million for a million. One record would then be called a duplicate, or one image not be opened.
"""

import hashlib
from array import array

_EMPTY = 0


def key_of(data: bytes) -> int:
    """64 bits of the BLAKE2b hash of `data`, never 0; the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def key_of_text(text: str) -> int:
    """The key of a text; halves of surrogate pairs, which JSON can spell, are allowed."""
    return key_of(text.encode("utf-8", "surrogatepass"))


class Keys:
    """A set of keys, made by `key_of`: open addressing with linear probing, at most 70 % full."""

    def __init__(self) -> None:
        self._slots = array("Q", (_EMPTY,)) * 1024
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, key: int) -> bool:
        return self._slots[self._slot(key)] != _EMPTY

    def add(self, key: int) -> bool:
        """Add a key; returns whether it is new."""
        slot = self._slot(key)
        if self._slots[slot] != _EMPTY:
            return False
        self._slots[slot] = key
        self._count += 1
        if self._count > 0.7 * len(self._slots):
            self._grow()
        return True

    def _slot(self, key: int) -> int:
        """Where the key is, or the empty slot where it belongs."""
        slots = self._slots
        mask = len(slots) - 1
        slot = key & mask
        while slots[slot] not in (_EMPTY, key):
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", (_EMPTY,)) * (2 * len(old))
        for key in old:
            if key != _EMPTY:
                self._slots[self._slot(key)] = key
