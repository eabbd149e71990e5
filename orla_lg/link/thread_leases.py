"""Which run owns a thread: the owner's name, and its lease in a store.

The lease of a thread is one of the store's, ``thread/TENANT/ID``, taken by a run when it reads the thread's
checkpoint and given back at its end. Its epoch grows with each owner: a run whose epoch is not
the lease's any more has lost the thread, also where the run that had it in between is over. Beside the lease stands
which run has it, for people.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

THREADS = "thread/"


class ThreadOwner(NamedTuple):
    """A run that owns a thread, or wants to."""

    holder: str
    """Random, of one run."""
    host: str = ""
    """As ``whereabouts.here`` has it."""
    pid: int = 0
    run: str = ""
    """The run's id, for people."""


class Taken(NamedTuple):
    """The thread is the asking run's."""

    epoch: int


class Busy(NamedTuple):
    """The thread is another run's."""

    owner: ThreadOwner
    left_s: float
    """Seconds until its lease ends, unless it renews."""


Answer = Taken | Busy

NOT_KNOWN = ThreadOwner("")


class LeaseStore(Protocol):
    """A store, as far as leases of threads need it (``serve.store.store.Store``)."""

    def get(self, key: str) -> Any:
        """Return a value; ``None`` where there is none."""
        ...

    def put(self, key: str, value: bytes | None) -> int:
        """Write or delete a value."""
        ...

    def lease(self, name: str, holder: str, ttl_s: float) -> Any:
        """Take or renew a lease; ``None`` while another holder has it."""
        ...


def lease_name(tenant: str | None, thread: str) -> str:
    """Return the name of a thread's lease, and of what is known of its owner."""
    return f"{THREADS}{quote(tenant or '', safe='')}/{thread}"


class LeasesInStore:
    """The leases of threads, in a store. Any thread may call; one call is carried out at a time.

    Args:
        store: Where they are.
        wall: Seconds since the epoch.
    """

    def __init__(self, store: LeaseStore, *, wall: Callable[[], float] = time.time) -> None:
        self._store, self._wall = store, wall
        self._lock = threading.Lock()

    def take(self, name: str, owner: ThreadOwner, ttl_s: float, gone: str = "") -> Answer:
        """Take a thread, or renew what the owner has.

        Args:
            name: Of the lease.
            owner: The run.
            ttl_s: For how long.
            gone: The holder that is known to have ended: its lease is given back first.
        """
        with self._lock:
            if gone and gone != owner.holder and self._has(name, gone):
                self._store.lease(name, gone, 0.0)
            lease = self._store.lease(name, owner.holder, ttl_s)
            if lease is None:
                return self._owner(name) or Busy(NOT_KNOWN, ttl_s)
            self._note(name, owner, ttl_s)
        return Taken(lease.epoch)

    def renew(self, name: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Answer:
        """Renew a lease that was taken in *epoch*; ``Busy`` if another run has it, or had it in between."""
        with self._lock:
            if not self._has(name, owner.holder):  # given back meanwhile, or another run's
                return self._owner(name) or Busy(NOT_KNOWN, 0.0)
            lease = self._store.lease(name, owner.holder, ttl_s)
            if lease is None:
                return self._owner(name) or Busy(NOT_KNOWN, ttl_s)
            if lease.epoch != epoch:  # another run had it, and is over: it is not this one's to go on with
                self._store.lease(name, owner.holder, 0.0)
                return Busy(NOT_KNOWN, 0.0)
            self._note(name, owner, ttl_s)
        return Taken(epoch)

    def give_back(self, name: str, owner: ThreadOwner) -> None:
        """Let the next run take the thread at once. Idempotent."""
        with self._lock:
            if self._has(name, owner.holder):
                self._store.put(name, None)
                self._store.lease(name, owner.holder, 0.0)

    def _has(self, name: str, holder: str) -> bool:
        known = self._owner(name)
        return known is not None and known.owner.holder == holder

    def _note(self, name: str, owner: ThreadOwner, ttl_s: float) -> None:
        said = {**owner._asdict(), "until_s": self._wall() + ttl_s}
        self._store.put(name, json.dumps(said).encode())

    def _owner(self, name: str) -> Busy | None:
        found = self._store.get(name)
        return None if found is None else read_busy(_table(found.value), self._wall())


def _table(value: bytes) -> Mapping[str, Any]:
    try:
        said = json.loads(value)
    except ValueError:
        return {}
    return said if isinstance(said, Mapping) else {}


def read_owner(said: Mapping[str, Any]) -> ThreadOwner:
    """Return the owner in a table; what is missing, or of another type, is empty."""
    holder, host, pid, run = (said.get(name) for name in ThreadOwner._fields)
    return ThreadOwner(
        holder if isinstance(holder, str) else "", host if isinstance(host, str) else "",
        pid if isinstance(pid, int) else 0, run if isinstance(run, str) else "",
    )  # fmt: skip


def read_busy(said: Mapping[str, Any], wall_s: float) -> Busy:
    """Return who has a thread, from a table with ``until_s`` by the wall clock."""
    until_s = said.get("until_s")
    return Busy(read_owner(said), max(0.0, until_s - wall_s) if isinstance(until_s, int | float) else 0.0)


def flat_answer(answer: Answer) -> dict[str, Any]:
    """Return an answer as a link carries it."""
    if isinstance(answer, Taken):
        return {"epoch": answer.epoch}
    return {"owner": answer.owner._asdict(), "left_s": answer.left_s}


def read_answer(said: Mapping[str, Any]) -> Answer:
    """Return the answer that a link carried."""
    epoch = said.get("epoch")
    if isinstance(epoch, int):
        return Taken(epoch)
    owner, left_s = said.get("owner"), said.get("left_s")
    return Busy(
        read_owner(owner if isinstance(owner, Mapping) else {}), left_s if isinstance(left_s, int | float) else 0.0
    )
