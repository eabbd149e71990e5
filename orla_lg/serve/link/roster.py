"""The replicas: those that are known here, and the list of them in the store that the next core reads.

A replica stands in the store from its ``Hello``, before anything is granted to it, until it says goodbye or is over:
its lease has passed, and the engines have let go of its calls.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.link.messages import Hello
from orla_lg.serve.link.flat import LinkCaller
from orla_lg.serve.link.hosted import HostedCall
from orla_lg.serve.store.store import Conflict, Store, Versioned

log = logging.getLogger("orla_lg")

PREFIX = "replica/"

MOST_REPLICAS = 1_000


class Connection(Protocol):
    """A replica's way here (``session.LinkSession``)."""

    heard_s: float
    """When something came last."""

    def cut(self, why: str) -> None:
        """End it now."""
        ...


@dataclass(eq=False, slots=True)
class QueuePlace:
    """What is remembered of a call that waited when its connection was lost."""

    at: tuple[str, int] | None
    """The backend, and its arrival number there."""
    standing: RunShare
    attempt: int = 0
    """Its last grant's."""
    tried: list[str] = field(default_factory=list)
    """The backends of its attempts so far."""


@dataclass(eq=False, slots=True)
class Replica:
    """One process that calls through a link.

    Without a ``session`` it is lost, since ``lost_s``; from ``over_s`` on it will not send anything any more.
    """

    id: str
    caller: LinkCaller
    host: str
    pid: int
    session: Connection | None = None
    calls: dict[str, HostedCall] = field(default_factory=dict)
    """By id: those that wait or are granted."""
    runs: set[str] = field(default_factory=set)
    """Ids of its open runs."""
    places: dict[str, QueuePlace] = field(default_factory=dict)
    """Of calls that waited when it was lost."""
    said_all: bool = False
    """Whether this core knows all that it holds."""
    trusted_s: float = 0.0
    """From then on its calls are at engines: none is counted only because an engine may not have noticed its end."""
    lost_s: float | None = None
    over_s: float | None = None
    moves: bool = False
    """Whether its calls may enter at another pool's core instead."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A replica as the store has it."""

    id: str
    host: str = ""
    pid: int = 0
    version: int = 0
    """Of its entry; another one is written whenever it joins a core."""


class Roster:
    """The list in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, hello: Hello) -> None:
        """Write a replica down.

        Raises:
            StoreUnavailable: The store does not answer; the replica must not be served then.
        """
        entry = {"host": hello.host, "pid": hello.pid, "version": hello.version}
        self._store.put(PREFIX + hello.replica, json.dumps(entry).encode())

    def remove(self, replica: str) -> None:
        """Strike a replica out.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self._store.put(PREFIX + replica, None)

    def strike(self, listed: Listed) -> None:
        """Strike a replica out that no core has heard of since its entry was read.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        with contextlib.suppress(Conflict):  # it has joined a core meanwhile, this one or another
            self._store.put(PREFIX + listed.id, None, expected=listed.version)

    def read(self) -> dict[str, Listed]:
        """Return who is on it, by id.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        return {
            key.removeprefix(PREFIX): _listed(key.removeprefix(PREFIX), entry)
            for key, entry in self._store.scan(PREFIX).items()
        }


def _listed(replica: str, found: Versioned) -> Listed:
    """Return an entry; one that cannot be read is waited for like any other."""
    try:
        entry = json.loads(found.value)
    except ValueError:
        entry = None
    if not isinstance(entry, Mapping):
        log.warning("the entry of replica %r in the store cannot be read; it is waited for all the same", replica)
        return Listed(replica, version=found.version)
    host, pid = entry.get("host"), entry.get("pid")
    return Listed(replica, host if isinstance(host, str) else "", pid if isinstance(pid, int) else 0, found.version)
