"""Things that are costly to make, kept while they are used and there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Key = TypeVar("Key")
Made = TypeVar("Made")


class LastUsed(Generic[Key, Made]):
    """Things that were made, the last used ones up to a number of bytes; the last one always."""

    def __init__(self, most_bytes: int, size_of: Callable[[Made], int]) -> None:
        self._kept: OrderedDict[Key, Made] = OrderedDict()
        self._bytes, self._most_bytes, self._size_of = 0, most_bytes, size_of

    def get(self, key: Key, make: Callable[[], Made]) -> Made:
        """What was made for a key, or is made now."""
        if key not in self._kept:
            self._kept[key] = make()
            self._bytes += self._size_of(self._kept[key])
        self._kept.move_to_end(key)
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= self._size_of(dropped)
        return self._kept[key]
