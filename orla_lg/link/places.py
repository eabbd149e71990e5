"""Where cores and standbys are reached: the entries of the directory in a store, and what replicas are given of it.

Servers write them (``serve.pools.directory``); replicas read them, by their core's word or in the store itself.
An entry is a hint and no right: what decides is the lease, whose epoch each grant carries.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from orla_lg.link.whereabouts import here

log = logging.getLogger("orla_lg")

CORES = "core/"
"""``core/POOL``: the core that decides for a pool."""

STANDBYS = "standby/"
"""``standby/POOL/HOLDER``: a process that takes over at the core's end."""

MOST_PLACES = 1_000

MOST_URLS = 16
"""Of one pool, so many are given to a replica; the core's come first."""


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
    beat: int = 0
    """Of a standby, counted up for as long as it lives; an entry that stays as it is belongs to none that does."""
    holder: str = ""
    """As which it holds, or would take, the lease."""


def text_of(place: CorePlace) -> bytes:
    """Return an entry as it stands in the store."""
    return json.dumps(place._asdict()).encode()


def read_place(key: str, value: bytes) -> CorePlace | None:
    """Return an entry; ``None`` for one that cannot be read, which no process goes to."""
    try:
        said = json.loads(value)
    except ValueError:
        said = None
    if not isinstance(said, Mapping) or not isinstance(said.get("pool"), str):
        log.warning("the store's entry %r is no core's and is passed by", key)
        return None
    return CorePlace(
        said["pool"], _texts(said.get("urls")), _whole(said.get("epoch")), _texts(said.get("backends")),
        _text(said.get("host")), _whole(said.get("pid")), _whole(said.get("beat")), _text(said.get("holder")),
    )  # fmt: skip


def _texts(said: Any) -> tuple[str, ...]:
    if not isinstance(said, Sequence) or isinstance(said, str):
        return ()
    return tuple(each for each in said if isinstance(each, str))


def _text(said: Any) -> str:
    return said if isinstance(said, str) else ""


def _whole(said: Any) -> int:
    return said if isinstance(said, int) else 0


def urls_by_pool(places: Iterable[CorePlace]) -> dict[str, list[str]]:
    """Return where the cores of each pool are reached, and then its standbys.

    What only another machine's own processes reach is left out: here it would name something else.
    """
    found: dict[str, list[str]] = {}
    for place in sorted(places, key=lambda place: -place.epoch):
        urls = found.setdefault(place.pool, [])
        urls += [url for url in place.urls if url not in urls and (place.host == here() or not _is_own(url))]
    return {pool: urls[:MOST_URLS] for pool, urls in found.items()}


def _is_own(url: str) -> bool:
    """Whether a URL means the machine that reads it."""
    host = url.partition("://")[2].rpartition("@")[2]
    return url.startswith("unix:") or host.startswith(("127.", "localhost", "[::1]"))
