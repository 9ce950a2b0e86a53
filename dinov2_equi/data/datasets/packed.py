"""Millions of strings in two arrays."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


class PackedStrings:
    """Strings one after the other in one array of bytes, with the place where each ends: 8 bytes each beside the text.

    Loader workers share the arrays, since reading them touches no reference count; they may be memory-mapped.

    Args:
        text: uint8 [total length], file system encoding.
        ends: int64 [n], increasing.
    """

    def __init__(self, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.int64]) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        """Return these strings, packed; they are taken one at a time."""
        text, ends = bytearray(), array("q")
        for string in strings:
            text += os.fsencode(string)
            ends.append(len(text))
        return cls(np.frombuffer(bytes(text), np.uint8), np.frombuffer(ends.tobytes(), np.int64))

    def __len__(self) -> int:
        """Return the number of strings."""
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        """Return string `index`, 0 <= index < len(self)."""
        start = int(self.ends[index - 1]) if index else 0
        return os.fsdecode(self.text[start : int(self.ends[index])].tobytes())
