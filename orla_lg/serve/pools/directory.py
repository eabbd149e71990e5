"""The directory: which core decides for which pool, where it is reached, and which standbys wait for its end.

It stands in the store, for other cores, for gateways and for replicas. It is a hint and not the fence: that is the
lease. A core that was replaced and does not know it yet may still stand here for as long as it takes the next one to
write; a replica that goes there meets an older epoch, and refuses its grants.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from orla_lg.link.places import CORES, MOST_PLACES, STANDBYS, CorePlace, read_place, text_of
from orla_lg.serve.store.store import Conflict, Store

__all__ = ["CorePlace", "Directory"]


class Directory:
    """The places in a store, the whole of it and not one pool's part.

    Args:
        store: Where they stand.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def announce(self, place: CorePlace) -> bool:
        """Write down that a core decides; returns whether it does, as far as the directory knows.

        An entry of a greater epoch stays: its core followed this one.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        key = CORES + place.pool
        while True:
            found = self._store.get(key)
            known = None if found is None else read_place(key, found.value)
            if known is not None and known.epoch > place.epoch:
                return False
            try:
                self._store.put(key, text_of(place), expected=0 if found is None else found.version)
            except Conflict:
                continue
            return True

    def stand_by(self, place: CorePlace, holder: str) -> None:
        """Write down that a process waits for the end of a pool's core.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self._store.put(f"{STANDBYS}{place.pool}/{holder}", text_of(place))

    def leave(self, pool: str, holder: str) -> None:
        """Strike a standby out that ends, or that decides now.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self._store.put(f"{STANDBYS}{pool}/{holder}", None)

    def cores(self) -> dict[str, CorePlace]:
        """Return the deciding cores, by pool.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        return {place.pool: place for place in self._places(CORES)}

    def standbys(self, pool: str) -> list[CorePlace]:
        """Return the standbys of a pool.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        return self._places(f"{STANDBYS}{pool}/")

    def waiting(self, pool: str) -> dict[str, tuple[CorePlace, int]]:
        """Return the standbys of a pool by holder, each with the version of its entry.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        prefix = f"{STANDBYS}{pool}/"
        return {
            key.removeprefix(prefix): (place, entry.version)
            for key, entry in list(self._store.scan(prefix).items())[:MOST_PLACES]
            if (place := read_place(key, entry.value)) is not None
        }

    def strike(self, pool: str, holder: str, version: int) -> None:
        """Strike a standby out that has not written its entry since it was read.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        with contextlib.suppress(Conflict):
            self._store.put(f"{STANDBYS}{pool}/{holder}", None, expected=version)

    def places(self) -> list[CorePlace]:
        """Return the cores and standbys of all pools.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        return self._places(CORES) + self._places(STANDBYS)

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed* after a core or a standby came or went, from any thread; returns what ends that."""
        ends = [self._store.watch(prefix, changed) for prefix in (CORES, STANDBYS)]

        def end() -> None:
            for each in ends:
                each()

        return end

    def _places(self, prefix: str) -> list[CorePlace]:
        found = list(self._store.scan(prefix).items())[:MOST_PLACES]
        return [place for key, entry in found if (place := read_place(key, entry.value)) is not None]
