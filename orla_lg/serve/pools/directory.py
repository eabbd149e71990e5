"""The directory: which core decides for which pool, where it is reached, and which standbys wait for its end.

It stands in the store, for other cores, for gateways and for replicas. It is a hint and not the fence: that is the
lease. A core that was replaced and does not know it yet may still stand here for as long as it takes the next one to
write; a replica that goes there meets an older epoch, and refuses its grants.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from orla_lg.serve.store.store import Conflict, Store, Versioned

log = logging.getLogger("orla_lg")

CORES = "core/"
"""``core/POOL``: the core that decides for a pool."""

STANDBYS = "standby/"
"""``standby/POOL/HOLDER``: a process that takes over at the core's end."""

MOST_PLACES = 1_000


class CorePlace(NamedTuple):
    """Where a core, or a standby, is reached."""

    pool: str
    urls: tuple[str, ...]
    """As ``Orla.remote`` takes them, the best first."""
    epoch: int = 0
    """Of a core; 0: a standby."""
    backends: tuple[str, ...] = ()
    """Names of those in the pool, which no other pool has."""
    host: str = ""
    """As ``whereabouts.here`` has it."""
    pid: int = 0


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
            known = None if found is None else _read(key, found)
            if known is not None and known.epoch > place.epoch:
                return False
            try:
                self._store.put(key, _text(place), expected=0 if found is None else found.version)
            except Conflict:
                continue
            return True

    def stand_by(self, place: CorePlace, holder: str) -> None:
        """Write down that a process waits for the end of a pool's core.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self._store.put(f"{STANDBYS}{place.pool}/{holder}", _text(place))

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

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed* after a core or a standby came or went, from any thread; returns what ends that."""
        ends = [self._store.watch(prefix, changed) for prefix in (CORES, STANDBYS)]

        def end() -> None:
            for each in ends:
                each()

        return end

    def _places(self, prefix: str) -> list[CorePlace]:
        found = list(self._store.scan(prefix).items())[:MOST_PLACES]
        return [place for key, entry in found if (place := _read(key, entry)) is not None]


def _text(place: CorePlace) -> bytes:
    return json.dumps(place._asdict()).encode()


def _read(key: str, found: Versioned) -> CorePlace | None:
    """Return an entry; ``None`` for one that cannot be read, which no process goes to."""
    try:
        said = json.loads(found.value)
    except ValueError:
        said = None
    if not isinstance(said, Mapping) or not isinstance(said.get("pool"), str):
        log.warning("the store's entry %r is no core's and is passed by", key)
        return None
    epoch, host, pid = said.get("epoch"), said.get("host"), said.get("pid")
    return CorePlace(
        said["pool"], _texts(said.get("urls")), epoch if isinstance(epoch, int) else 0, _texts(said.get("backends")),
        host if isinstance(host, str) else "", pid if isinstance(pid, int) else 0,
    )  # fmt: skip


def _texts(said: Any) -> tuple[str, ...]:
    return tuple(each for each in said if isinstance(each, str)) if isinstance(said, Sequence) else ()
