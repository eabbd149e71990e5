"""The table of leases in a saver's own database, as statements of SQL: what is asked, whatever carries it there.

Each function yields statements with their parameters, is sent the rows of each, and returns what it found. So one
text serves a connection that waits and one that is awaited. A row goes when its lease is given back: there are as
many as threads that run, or whose process was killed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Sequence
from typing import Any, Protocol

from orla_lg.graph.threads.registries import WriteRefused
from orla_lg.link.thread_leases import Busy, Taken, ThreadOwner
from orla_lg.link.whereabouts import here

Row = Sequence[Any]
Statements = Generator[tuple[str, Sequence[Any]], Sequence[Row], Any]

FREE = Busy(ThreadOwner(""), 0.0)


class LeaseTable(Protocol):
    """The statements of one database."""

    def make(self) -> Statements:
        """Make the table where it is missing."""
        ...

    def take(self, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Statements:
        """Take a thread; returns ``thread_leases.Answer``."""
        ...

    def renew(self, thread: str, owner: ThreadOwner, ttl_s: float) -> Statements:
        """Renew a lease; returns ``thread_leases.Answer``."""
        ...

    def give_back(self, thread: str, owner: ThreadOwner) -> Statements:
        """Let the next run take the thread."""
        ...

    def check(self, thread: str, holder: str) -> Statements:
        """Raise ``WriteRefused`` unless *holder* has the thread, or, where that is empty, nothing has it.

        What is written after it in the same transaction is written before another run can take the thread.
        """
        ...


class SqliteTable:
    """The statements for SQLite, whose file is one machine's: its clock since boot is that of all who open it."""

    def make(self) -> Statements:  # noqa: D102
        yield (
            "CREATE TABLE IF NOT EXISTS orla_thread_leases (thread_id TEXT PRIMARY KEY, holder TEXT NOT NULL, "
            "epoch INTEGER NOT NULL, host TEXT NOT NULL, pid INTEGER NOT NULL, run TEXT NOT NULL, "
            "until_s REAL NOT NULL, boot TEXT NOT NULL)", (),
        )  # fmt: skip

    def take(self, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Statements:  # noqa: D102
        busy, holder, epoch = yield from self._found(thread)
        if busy is not None and holder not in (owner.holder, gone):
            return busy
        epoch += holder != owner.holder
        yield (
            "INSERT OR REPLACE INTO orla_thread_leases VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (thread, owner.holder, epoch, owner.host, owner.pid, owner.run, since_boot() + ttl_s, _boot()),
        )
        return Taken(epoch)

    def renew(self, thread: str, owner: ThreadOwner, ttl_s: float) -> Statements:  # noqa: D102
        rows = yield (
            "UPDATE orla_thread_leases SET until_s = ?, boot = ? WHERE thread_id = ? AND holder = ? RETURNING epoch",
            (since_boot() + ttl_s, _boot(), thread, owner.holder),
        )
        if rows:
            return Taken(rows[0][0])
        return (yield from self._found(thread))[0] or FREE

    def give_back(self, thread: str, owner: ThreadOwner) -> Statements:  # noqa: D102
        yield "DELETE FROM orla_thread_leases WHERE thread_id = ? AND holder = ?", (thread, owner.holder)

    def check(self, thread: str, holder: str) -> Statements:  # noqa: D102
        busy, found, _ = yield from self._found(thread)
        if found != holder if holder else busy is not None:
            raise WriteRefused(busy or FREE)

    def _found(
        self, thread: str
    ) -> Generator[tuple[str, Sequence[Any]], Sequence[Row], tuple[Busy | None, str, int]]:
        """Return who has the thread, ``None`` if its lease is over; the holder that stands there; and the epoch."""
        rows = yield (
            "SELECT holder, epoch, host, pid, run, until_s, boot FROM orla_thread_leases WHERE thread_id = ?",
            (thread,),
        )  # fmt: skip
        if not rows:
            return None, "", 0
        holder, epoch, host, pid, run, until_s, boot = rows[0]
        left_s = until_s - since_boot() if boot == _boot() else 0.0
        return (Busy(ThreadOwner(holder, host, pid, run), left_s) if left_s > 0 else None), holder, epoch


_WRITTEN = 731057517
"""Of PostgreSQL's advisory locks, those of threads that are written to from outside any run."""


class PostgresTable:
    """The statements for PostgreSQL, whose clock decides for all machines."""

    def make(self) -> Statements:  # noqa: D102
        yield "SELECT pg_advisory_xact_lock(7310575173)", ()  # two that make one table at once fail
        yield (
            "CREATE TABLE IF NOT EXISTS orla_thread_leases (thread_id TEXT PRIMARY KEY, holder TEXT NOT NULL, "
            "epoch BIGINT NOT NULL, host TEXT NOT NULL, pid BIGINT NOT NULL, run TEXT NOT NULL, "
            "until TIMESTAMPTZ NOT NULL)", (),
        )  # fmt: skip

    def take(self, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Statements:  # noqa: D102
        yield "SELECT pg_advisory_xact_lock(%s, hashtext(%s))", (_WRITTEN, thread)
        rows = yield (
            "INSERT INTO orla_thread_leases AS l VALUES (%s, %s, 1, %s, %s, %s, clock_timestamp() + %s::float8 * "
            "interval '1 second') ON CONFLICT (thread_id) DO UPDATE SET holder = excluded.holder, epoch = l.epoch + "
            "(l.holder <> excluded.holder)::int, host = excluded.host, pid = excluded.pid, run = excluded.run, "
            "until = excluded.until WHERE l.holder = excluded.holder OR l.holder = %s OR "
            "l.until <= clock_timestamp() RETURNING epoch",
            (thread, owner.holder, owner.host, owner.pid, owner.run, float(ttl_s), gone),
        )
        if rows:
            return Taken(rows[0][0])
        return (yield from self._found(thread, "")) or FREE

    def renew(self, thread: str, owner: ThreadOwner, ttl_s: float) -> Statements:  # noqa: D102
        rows = yield (
            "UPDATE orla_thread_leases SET until = clock_timestamp() + %s::float8 * interval '1 second' "
            "WHERE thread_id = %s AND holder = %s RETURNING epoch", (float(ttl_s), thread, owner.holder),
        )  # fmt: skip
        return Taken(rows[0][0]) if rows else (yield from self._found(thread, "")) or FREE

    def give_back(self, thread: str, owner: ThreadOwner) -> Statements:  # noqa: D102
        yield "DELETE FROM orla_thread_leases WHERE thread_id = %s AND holder = %s", (thread, owner.holder)

    def check(self, thread: str, holder: str) -> Statements:  # noqa: D102
        # Until this transaction ends, no other one can change the row: a lease is taken before or after the write.
        # Where nothing has the thread there is none to hold.
        if not holder:
            yield "SELECT pg_advisory_xact_lock_shared(%s, hashtext(%s))", (_WRITTEN, thread)
        busy = yield from self._found(thread, " FOR SHARE")
        if busy is None or not holder:
            if holder or (busy is not None and busy.left_s > 0):
                raise WriteRefused(busy or FREE)
        elif busy.owner.holder != holder:
            raise WriteRefused(busy)

    def _found(self, thread: str, lock: str) -> Generator[tuple[str, Sequence[Any]], Sequence[Row], Busy | None]:
        rows = yield (
            "SELECT holder, host, pid, run, extract(epoch FROM until - clock_timestamp())::float8 "
            f"FROM orla_thread_leases WHERE thread_id = %s{lock}", (thread,),
        )  # fmt: skip
        return Busy(ThreadOwner(*rows[0][:4]), max(0.0, rows[0][4])) if rows else None


def since_boot() -> float:
    """Return seconds by a clock that goes on while a process, or the machine, sleeps."""
    with contextlib.suppress(AttributeError, OSError):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _boot() -> str:
    """Return which start of the machine ``since_boot`` counts from."""
    parts = here().split()
    return parts[1] if len(parts) > 1 else ""
