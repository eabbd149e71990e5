"""The store: what must outlive the server's process, behind five methods.

Small values by name: keys, leases' epochs, the roster, spent budgets. SQLite keeps them by default (``sqlite``), a
dictionary in tests and for ``--demo`` (``MemoryStore``); another database needs these five methods and passes the
same tests. Every method is synchronous and takes well under a millisecond.

A version is a number that grows with each change of the whole store. So a value that was deleted and written again
has another version than before, and a writer that expects what it read before never overwrites what it did not see.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from orla_lg.errors import OrlaError

log = logging.getLogger("orla_lg")

ABSENT = 0
"""The version that a writer expects of a key that must not exist yet."""

WATCH_S = 1.0
"""A change is announced to watchers in so many seconds at most."""


class StoreUnavailable(OrlaError):
    """The store did not do what it was asked for: it is locked for too long, full, gone or broken."""


class Conflict(OrlaError):
    """A value has another version than its writer expected: another process wrote it in between."""


class Replaced(StoreUnavailable):
    """The writer's lease is another holder's by now: it decides nothing more, and nothing was written."""


class Versioned(NamedTuple):
    """A value, and the version that a careful writer expects."""

    value: bytes
    version: int


class Lease(NamedTuple):
    """A lease that was taken or renewed."""

    epoch: int
    """Grows at each change of holder; never falls, also when the lease ended in between."""
    until_s: float
    """Seconds of ``time.time``; for people. A holder counts by its own monotonic clock from before it asked."""


class Fence(NamedTuple):
    """What keeps a holder of a lease from writing once another one has taken it.

    A check before the write is not enough: a process may stand still between the two, for any time. So the store
    compares in the same step in which it writes.
    """

    lease: str
    """Its name."""
    epoch: int
    """That the writer took it with."""


class Store(Protocol):
    """Five methods; any thread may call them."""

    def get(self, key: str) -> Versioned | None:
        """Return a value; ``None`` where there is none."""
        ...

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        """Write a value, or delete it (``None``), and return its version.

        Args:
            key: Any text.
            value: The value; ``None`` deletes, and deleting what is not there is no fault.
            expected: The version that is overwritten, ``ABSENT`` for none; ``None``: whichever there is.
            fence: The lease that the writer writes by.

        Raises:
            Conflict: There is another version; nothing was written.
            Replaced: The lease has another epoch; nothing was written.
        """
        ...

    def scan(self, prefix: str) -> dict[str, Versioned]:
        """Return all values whose keys begin with *prefix*, sorted by key, as they were at one moment."""
        ...

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        """Take a lease that is free or over, or renew one's own; ``None`` while another holder has it.

        Args:
            name: Of the lease.
            holder: Of its taker, new for each process.
            ttl_s: For how long, from now; 0 gives it back, and the next one need not wait.
        """
        ...

    def watch(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed* after values under *prefix* change, from any thread; returns what ends that.

        Several changes may be announced by one call, within ``WATCH_S`` of the first. Leases are not watched.
        """
        ...


# The clock of leases


class Instant(NamedTuple):
    """One moment, by two clocks."""

    wall_s: float
    boot: str
    """Which start of the machine the other clock counts from; empty where that is not known."""
    since_boot_s: float


def instant() -> Instant:
    """Return this moment. The clock since boot goes on while a process, or the machine, sleeps; no one can set it."""
    if not _BOOT:
        return Instant(time.time(), "", 0.0)
    return Instant(time.time(), _BOOT, time.clock_gettime(time.CLOCK_BOOTTIME))


def _boot() -> str:
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return ""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


_BOOT = _boot()


@dataclass(frozen=True, slots=True)
class HeldLease:
    """A lease as a store keeps it.

    Two processes on one machine agree on its clock since boot, and a change of the wall clock neither ends a lease
    nor makes it last. Where the machine was started again since, or has no such clock, the wall clock decides.
    """

    holder: str
    epoch: int
    until: Instant

    def is_over(self, now: Instant) -> bool:
        """Whether another holder may take it."""
        if now.boot and now.boot == self.until.boot:
            return self.until.since_boot_s <= now.since_boot_s
        return self.until.wall_s <= now.wall_s


def leased(held: HeldLease | None, holder: str, ttl_s: float, now: Instant) -> HeldLease | None:
    """Return the lease after *holder* asked for it; ``None`` where another one holds it."""
    if held is not None and held.holder != holder and not held.is_over(now):
        return None
    epoch = 0 if held is None else held.epoch
    epoch += held is None or held.holder != holder
    return HeldLease(holder, epoch, Instant(now.wall_s + ttl_s, now.boot, now.since_boot_s + ttl_s))


# Watchers


class Watchers:
    """What is called when values under a prefix change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[object, tuple[str, Callable[[], None]]] = {}

    def add(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        """Watch a prefix; returns what ends that, as often as it is called."""
        mark = object()
        with self._lock:
            self._watched[mark] = (prefix, changed)

        def end() -> None:
            with self._lock:
                self._watched.pop(mark, None)

        return end

    @property
    def prefixes(self) -> set[str]:
        """What is watched now."""
        with self._lock:
            return {prefix for prefix, _ in self._watched.values()}

    def announce(self, is_changed: Callable[[str], bool]) -> None:
        """Call those whose prefix changed."""
        with self._lock:
            due = list(self._watched.values())
        for prefix, changed in due:
            if is_changed(prefix):
                try:
                    changed()
                except Exception:  # one watcher's fault must not keep a change from the others
                    log.exception("a watcher of the store's %r failed", prefix)


# In memory


class MemoryStore:
    """A store that ends with its process, for tests and ``--demo``.

    Args:
        now: The clock of leases.
    """

    def __init__(self, *, now: Callable[[], Instant] = instant) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._values: dict[str, Versioned] = {}
        self._leases: dict[str, HeldLease] = {}
        self._sequence = ABSENT
        self._watchers = Watchers()

    def get(self, key: str) -> Versioned | None:
        """Return a value; ``None`` where there is none."""
        return self._values.get(key)

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        """Write or delete a value, and return its version (``Store.put``)."""
        with self._lock:
            if fence is not None:
                held = self._leases.get(fence.lease)
                check_fence(fence, 0 if held is None else held.epoch)
            known = self._values.get(key)
            check_version(key, ABSENT if known is None else known.version, expected)
            if value is None and known is None:
                return self._sequence
            self._sequence += 1
            if value is None:
                del self._values[key]
            else:
                self._values[key] = Versioned(bytes(value), self._sequence)
            version = self._sequence
        self._watchers.announce(key.startswith)
        return version

    def scan(self, prefix: str) -> dict[str, Versioned]:
        """Return all values whose keys begin with *prefix*, sorted by key."""
        with self._lock:
            return {key: value for key, value in sorted(self._values.items()) if key.startswith(prefix)}

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        """Take or renew a lease (``Store.lease``)."""
        with self._lock:
            after = leased(self._leases.get(name), holder, ttl_s, self._now())
            if after is None:
                return None
            self._leases[name] = after
            return Lease(after.epoch, after.until.wall_s)

    def watch(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed* after values under *prefix* change, in the thread that changes them."""
        return self._watchers.add(prefix, changed)


def check_version(key: str, found: int, expected: int | None) -> None:
    """Refuse to overwrite what is not expected.

    Raises:
        Conflict: There is another version.
    """
    if expected is not None and found != expected:
        there = "does not exist" if found == ABSENT else f"has version {found}"
        wanted = "none" if expected == ABSENT else f"version {expected}"
        raise Conflict(f"{key!r} {there}, its writer expected {wanted}; read it again")


def check_fence(fence: Fence, found: int) -> None:
    """Refuse a write by a lease that another holder has taken since.

    Args:
        fence: The writer's.
        found: The epoch of the lease as it is; 0: there is none.

    Raises:
        Replaced: It is another one.
    """
    if found != fence.epoch:
        raise Replaced(
            f"the lease {fence.lease!r} is of epoch {found} by now, and its writer took it with {fence.epoch}: "
            "another process has replaced it"
        )
