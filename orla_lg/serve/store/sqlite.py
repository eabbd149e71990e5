"""The store in a SQLite file: several processes at once, safe against ``kill -9`` at any moment.

The file is in WAL mode: readers never wait, and a writer waits for another one for ``BUSY_S`` at most, so that the
server's loop is not held up by a process that was frozen while it wrote. A commit that returned outlives its process;
a new epoch, and what a ``durable`` store writes (keys), a loss of power as well.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from orla_lg.core.boundary.plain import shown
from orla_lg.errors import ConfigError
from orla_lg.serve.store.state_file import prepare, state_folder
from orla_lg.serve.store.store import (
    ABSENT,
    Fence,
    HeldLease,
    Instant,
    Lease,
    StoreUnavailable,
    Versioned,
    Watchers,
    check_fence,
    check_version,
    instant,
    leased,
)

log = logging.getLogger("orla_lg")

FILE_NAME = "serve.db"

APPLICATION = 0x6F726C61
"""``orla``: in the file's header, so that no other program's database is taken for one."""

BUSY_S = 0.25
"""A writer waits so long for another process."""

OPEN_S = 5.0
"""The first of several processes that begin at once may take so long to make the file."""

POLL_S = 0.25
"""How often a watched file is looked at; that reads a few bytes of shared memory."""

CHECKPOINT_S = 10.0
"""How often a watched store moves what was written from the log into the file, in a thread of its own."""

LOG_PAGES = 4096
"""A log of so many pages is moved by the writer itself."""

LEAST_BYTES = 512
"""SQLite writes over a file that is smaller, whatever is in it."""

MIGRATIONS: Sequence[Sequence[str]] = (
    (
        "CREATE TABLE entries (key BLOB PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL) WITHOUT ROWID",
        "CREATE TABLE sequence (version INTEGER NOT NULL)",
        "INSERT INTO sequence VALUES (0)",
        "CREATE TABLE leases (name BLOB PRIMARY KEY, holder BLOB NOT NULL, epoch INTEGER NOT NULL, "
        "until_wall_s REAL NOT NULL, boot TEXT NOT NULL, until_boot_s REAL NOT NULL) WITHOUT ROWID",
    ),
)
"""What makes each schema of the one before; a file's version says how many were applied. Only ever appended to."""


def default_file() -> Path:
    """Return where the server keeps its state unless it is named another file.

    Raises:
        ConfigError: This user has no home.
    """
    return state_folder() / FILE_NAME


class SqliteStore:
    """A store in one file (``store.Store``); close it at the end.

    Args:
        file: Its path; made with its folder where it is missing, for this user alone.
        where: What messages begin with: the key of the configuration, or the option, that named it.
        durable: Each write is on the disk when it returns; takes milliseconds.
        busy_s: How long a writer waits for another process.
        poll_s: How often changes by other processes are looked for.
        now: The clock of leases.

    Raises:
        ConfigError: The file cannot be used, is another program's, is of a newer version of ours, or is others' to
            change.
    """

    def __init__(
        self,
        file: Path,
        *,
        where: str = "store",
        durable: bool = False,
        busy_s: float = BUSY_S,
        poll_s: float = POLL_S,
        now: Callable[[], Instant] = instant,
    ) -> None:
        self.file = file.absolute()
        self.place = f"{self.file}"
        """As messages name it."""
        self._where, self._poll_s, self._now = where, poll_s, now
        self._lock = threading.Lock()
        self._watchers = Watchers()
        self._seen: _PrefixStates | None = None
        self._watching: threading.Thread | None = None
        self._wake = threading.Event()
        self._closed = False
        self._pid = os.getpid()
        found = prepare(self.file, where)
        self._inode = found.st_ino
        if 0 < found.st_size < LEAST_BYTES:
            raise ConfigError(f"{where}: {shown(self.file, 200)} cannot be used: file is not a database")
        try:
            self._connection = _opened(self.file, where)
            self._connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            self._connection.execute(f"PRAGMA busy_timeout = {round(busy_s * 1000)}")
            self._connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")
        except sqlite3.Error as error:
            raise ConfigError(f"{where}: {shown(self.file, 200)} cannot be used: {error}") from error

    # The five methods

    def get(self, key: str) -> Versioned | None:
        """Return a value; ``None`` where there is none."""
        with self._using() as connection:
            row = connection.execute("SELECT value, version FROM entries WHERE key = ?", (_bytes(key),)).fetchone()
        return None if row is None else Versioned(*row)

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        """Write or delete a value, and return its version (``Store.put``)."""
        name = _bytes(key)
        with self._using() as connection, _transaction(connection):
            if fence is not None:
                held = _held(connection, fence.lease)
                check_fence(fence, 0 if held is None else held.epoch)
            row = connection.execute("SELECT version FROM entries WHERE key = ?", (name,)).fetchone()
            found = ABSENT if row is None else row[0]
            check_version(key, found, expected)
            if value is None and found == ABSENT:
                return int(connection.execute("SELECT version FROM sequence").fetchone()[0])
            connection.execute("UPDATE sequence SET version = version + 1")
            (version,) = connection.execute("SELECT version FROM sequence").fetchone()
            if value is None:
                connection.execute("DELETE FROM entries WHERE key = ?", (name,))
            else:
                connection.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", (name, bytes(value), version))
        if self._watching is not None and any(map(key.startswith, self._watchers.prefixes)):
            self._wake.set()
        return int(version)

    def scan(self, prefix: str) -> dict[str, Versioned]:
        """Return all values whose keys begin with *prefix*, sorted by key."""
        condition, bounds = _range(prefix)
        with self._using() as connection:
            rows = connection.execute(
                f"SELECT key, value, version FROM entries WHERE {condition} ORDER BY key", bounds
            ).fetchall()
        return {_text(key): Versioned(value, version) for key, value, version in rows}

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        """Take or renew a lease (``Store.lease``)."""
        with self._using() as connection:
            self._check_in_place()
            with _transaction(connection):
                before = _held(connection, name)
                after = leased(before, holder, ttl_s, self._now())
                if after is None:
                    return None
                connection.execute(
                    "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)",
                    (_bytes(name), _bytes(after.holder), after.epoch, *after.until),
                )
            if before is None or before.epoch != after.epoch:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")  # an epoch must not be given a second time
        return Lease(after.epoch, after.until.wall_s)

    def watch(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed* after values under *prefix* change, from a thread of the store's own."""
        with self._using():
            if self._seen is None:
                self._seen = _PrefixStates(self.file)
            self._seen.begin(prefix)
            if self._watching is None:
                self._watching = threading.Thread(
                    target=self._watch, args=(self._seen,), name="orla-store", daemon=True
                )
                self._watching.start()
        return self._watchers.add(prefix, changed)

    def close(self) -> None:
        """Let the file go. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self._pid == os.getpid():
                self._connection.close()
        self._wake.set()
        if self._watching is not None and self._watching is not threading.current_thread():
            self._watching.join(OPEN_S)

    # Within

    @contextlib.contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread at a time; what SQLite finds wrong is ``StoreUnavailable``."""
        with self._lock:
            if self._closed:
                raise StoreUnavailable(f"{self._where}: {shown(self.file, 200)} is closed")
            if self._pid != os.getpid():
                raise StoreUnavailable(f"{self._where}: {shown(self.file, 200)} is open in the process that forked")
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise StoreUnavailable(f"{self._where}: {shown(self.file, 200)}: {error}") from error

    def _check_in_place(self) -> None:
        """Refuse to lease from a file that is no longer where others look for it: they hold another's leases."""
        try:
            inode = self.file.stat().st_ino
        except OSError:
            inode = None
        if inode != self._inode:
            raise StoreUnavailable(f"{self._where}: {shown(self.file, 200)} was removed or replaced while in use")

    def _watch(self, seen: _PrefixStates) -> None:
        complained = False
        with contextlib.closing(seen):
            while not self._closed:
                self._wake.wait(self._poll_s)
                self._wake.clear()
                try:
                    changed = seen.look(self._watchers.prefixes)
                except sqlite3.Error as error:
                    if not complained:
                        complained = True
                        log.warning("%s: %s cannot be watched now: %s", self._where, shown(self.file, 200), error)
                    continue
                complained = False
                if changed and not self._closed:
                    self._watchers.announce(changed.__contains__)


class _PrefixStates:
    """What was seen last of each prefix: its newest version and its count, one of which differs after any change."""

    def __init__(self, file: Path) -> None:
        self._lock = threading.Lock()
        self._connection = _connect(file, BUSY_S)
        self._data_version = -1
        self._state: dict[str, tuple[int, int]] = {}
        self._checkpoint_s = time.monotonic()

    def begin(self, prefix: str) -> None:
        """Look at a prefix for the first time: what changes from now on is a change."""
        with self._lock:
            if prefix not in self._state:
                self._state[prefix] = self._of(prefix)

    def look(self, prefixes: set[str]) -> set[str]:
        """Return the prefixes under which something changed since the last look."""
        with self._lock:
            (data_version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if data_version == self._data_version:
                return set()
            found = {prefix: self._of(prefix) for prefix in prefixes}
            changed = {prefix for prefix, state in found.items() if self._state.get(prefix) != state}
            self._data_version = data_version
            self._state.update(found)
            if (now := time.monotonic()) >= self._checkpoint_s + CHECKPOINT_S:
                self._checkpoint_s = now
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
            return changed

    def _of(self, prefix: str) -> tuple[int, int]:
        condition, bounds = _range(prefix)
        newest, count = self._connection.execute(
            f"SELECT coalesce(max(version), 0), count(*) FROM entries WHERE {condition}", bounds
        ).fetchone()
        return newest, count

    def close(self) -> None:
        """Let the file go."""
        with self._lock:
            self._connection.close()


# SQL


def _connect(file: Path, busy_s: float) -> sqlite3.Connection:
    return sqlite3.connect(file, timeout=busy_s, isolation_level=None, check_same_thread=False)


def _opened(file: Path, where: str) -> sqlite3.Connection:
    """Return a connection to the file as this version writes it."""
    connection = _connect(file, OPEN_S)
    try:
        _log_ahead(connection)
        with _transaction(connection):
            _migrate(connection, shown(file, 200), where)
    except BaseException:
        connection.close()
        raise
    return connection


def _log_ahead(connection: sqlite3.Connection) -> None:
    """Turn WAL mode on; the one step for which SQLite does not wait by itself while another process does it too."""
    until_s = time.monotonic() + OPEN_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() >= until_s:
                raise
            time.sleep(0.01)


def _migrate(connection: sqlite3.Connection, file: str, where: str) -> None:
    def pragma(name: str) -> int:
        return int(connection.execute(f"PRAGMA {name}").fetchone()[0])

    version, application = pragma("user_version"), pragma("application_id")
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != APPLICATION and (application or version or tables):
        raise ConfigError(f"{where}: {file} is the database of another program; name another file")
    if version > len(MIGRATIONS):
        raise ConfigError(
            f"{where}: {file} was written by a newer orla_lg (schema {version}, this one knows {len(MIGRATIONS)}); "
            "run that one, or name another file"
        )
    for step in MIGRATIONS[version:]:
        for statement in step:
            connection.execute(statement)
    if version < len(MIGRATIONS):
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute(f"PRAGMA application_id = {APPLICATION}")


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _held(connection: sqlite3.Connection, name: str) -> HeldLease | None:
    row = connection.execute(
        "SELECT holder, epoch, until_wall_s, boot, until_boot_s FROM leases WHERE name = ?", (_bytes(name),)
    ).fetchone()
    return None if row is None else HeldLease(_text(row[0]), row[1], Instant(*row[2:]))


def _range(prefix: str) -> tuple[str, tuple[bytes, ...]]:
    """Return the condition for keys that begin with *prefix*; no byte of UTF-8 is 255, so the last may be raised."""
    if not prefix:
        return "1", ()
    first = _bytes(prefix)
    return "key >= ? AND key < ?", (first, first[:-1] + bytes((first[-1] + 1,)))


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(stored: bytes) -> str:
    return stored.decode("utf-8", "surrogatepass")
