"""A mapping with bounded memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedDict(Generic[K, V]):
    """A mapping that forgets what was set longest ago. Not locked: its owner's lock guards it."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        """Return what is remembered."""
        return self._entries.get(key)

    def set(self, key: K, value: V) -> None:
        """Remember; the oldest goes when there is no room."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._keep:
            self._entries.popitem(last=False)

    def replace(self, key: K, value: V) -> None:
        """Remember something else in the place of what is remembered."""
        if key in self._entries:
            self._entries[key] = value

    def pop(self, key: K) -> V | None:
        """Forget and return what is remembered."""
        return self._entries.pop(key, None)

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
