"""A mapping with bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedDict(Generic[K, V]):
    """A mapping that forgets what was set longest ago. Not locked: its owner's lock guards it.

    What every call uses is the dictionary's own: a method around it costs more than the look-up.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        entries = self._entries = OrderedDict[K, V]()
        self.get: Callable[[K], V | None] = entries.get
        """Return what is remembered, else ``None``."""
        self.touch: Callable[[K], None] = entries.move_to_end
        """Count an entry as just set; a ``KeyError`` where there is none."""
        self.pop: Callable[[K], V | None] = partial(entries.pop, default=None)
        """Forget and return what is remembered, else ``None``."""

    def set(self, key: K, value: V) -> None:
        """Remember; the oldest goes when there is no room."""
        entries = self._entries
        if key in entries:
            entries[key] = value
            entries.move_to_end(key)
        else:
            entries[key] = value
            if len(entries) > self._keep:
                entries.popitem(last=False)

    def replace(self, key: K, value: V) -> None:
        """Remember something else in the place of what is remembered."""
        if key in self._entries:
            self._entries[key] = value

    def values(self) -> list[V]:
        """Return what is remembered, oldest first."""
        return list(self._entries.values())

    def items(self) -> list[tuple[K, V]]:
        """Return what is remembered with its keys, oldest first."""
        return list(self._entries.items())

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
