"""The store on Redis or Valkey, which several machines reach: one script for each step, and a time-out for each.

Each write, each lease and each scan is one script, which the server runs by itself and whole: a value's version is
compared in the step that writes it, and a lease's time is the server's own clock, so that no two machines' clocks are
compared. A write that returned is in the server's memory, and in its log as ``appendfsync`` says.

An answer may be lost although the write took place. A lease that is asked for again by the same holder is renewed,
and a value that is expected to have its old version is a ``Conflict``: its writer reads again, and finds its own. A
write that was given up takes place before the next question of this process is asked, or never (``redis_line``).

A server without a log (``appendonly no``) that is started again has forgotten all of it. That is warned of when it
is opened, and noticed when it happens: each store has a name of its own (``born``). A process that has read another
name before believes nothing that it reads there: a server's keys that are gone would open it to all. It holds its
lease on, with the same epoch; a lease that nothing is known of begins at the server's clock, which no epoch before
has reached.

Where what stands is written in ``link.redis_keys``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from orla_lg.errors import ConfigError
from orla_lg.link.redis_keys import EXTRA, RedisAddress, lexical_range, read_entry
from orla_lg.serve.store.redis_line import AGAIN_S, ANSWER_S, CONNECT_S, DEADLINE, RedisLine, said_of
from orla_lg.serve.store.redis_scripts import SCRIPTS
from orla_lg.serve.store.store import (
    Fence,
    Lease,
    StoreUnavailable,
    Versioned,
    Watchers,
    check_fence,
    check_version,
)

log = logging.getLogger("orla_lg")

OPEN_S = 10.0
"""A server may take so long to be reached for the first time."""

POLL_S = 0.25
"""How often a watched store is asked for its version, beside what it announces."""

THROWS_AWAY = frozenset({
    "allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl",
})  # fmt: skip
"""What a server without memory left may do."""

ON_ITS_WAY_S = 0.05
"""What is announced may come so much later than the version that it made."""

PAGE = 5_000
"""Values that one script brings; a scan of more takes several, all of one version."""

MOST_SCANS = 5
"""A scan that others write into all the while is one script in the end, however much it brings."""


class KnownLease(NamedTuple):
    """A lease as this process has it."""

    epoch: int
    until_s: float
    """Monotonic: until then no other process can have taken it."""


class RedisStore:
    """A store on a Redis or Valkey server (``store.Store``); close it at the end.

    Args:
        address: Where it is.
        where: What messages begin with: the key of the configuration, or the option, that named it.
        answer_s: How long the server may take for one step.
        again_s: How long after a fault a connection is tried again.
        poll_s: How often its version is asked for where something is watched.
        epochs_behind: Behind which epoch that of a new lease begins; -1: the server's clock, in milliseconds.
        settings: Of the client, as redis-py takes them.

    Raises:
        ConfigError: It cannot be used: redis-py is missing, the password is wrong.
        StoreUnavailable: It does not answer.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        where: str = "store",
        answer_s: float = ANSWER_S,
        again_s: float = AGAIN_S,
        poll_s: float = POLL_S,
        epochs_behind: int = -1,
        **settings: Any,
    ) -> None:
        if importlib.util.find_spec("redis") is None:
            raise ConfigError(f"{where}: {address.text} needs the package redis: {EXTRA}")
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self.address, self._where, self._poll_s = address, where, poll_s
        self._epochs_behind = epochs_behind
        self.place = address.text
        """As messages name it."""
        step_s = max(CONNECT_S, answer_s)
        timing = {"socket_timeout": step_s, "socket_connect_timeout": step_s, "retry": Retry(NoBackoff(), 0)}
        self._client = address.connect(**{**settings, **timing, "protocol": 3})
        self._values, self._names, self._version, self._born, self._channel = map(
            address.key, ("values", "names", "version", "born", "changes")
        )
        self._known: bytes | None = None
        """The store's own name, as it was read first."""
        self._forgot = False
        self._held: dict[tuple[str, str], KnownLease] = {}
        """By name and holder."""
        self._watchers = Watchers()
        self._watching: threading.Thread | None = None
        self._seen = 0
        """The version up to which changes were announced."""
        self._lock = threading.Lock()
        self._closed = threading.Event()
        pool = self._client.connection_pool
        self._line = RedisLine(
            lambda: pool.connection_class(**pool.connection_kwargs), self._begin, f"{where}: {self.place}",
            answer_s=answer_s, again_s=again_s,
        )  # fmt: skip
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    # The five methods

    def get(self, key: str) -> Versioned | None:
        """Return a value; ``None`` where there is none."""
        self._check_memory()
        with self._asking("read"):
            found = self._line.ask("HGET", self._values, _bytes(key))
        return None if found is None else _versioned(found)

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        """Write or delete a value, and return its version (``Store.put``)."""
        keys = [self._values, self._names, self._version, self._lease_key("" if fence is None else fence.lease)]
        given = [
            _bytes(key), value or b"", int(value is not None), -1 if expected is None else expected,
            -1 if fence is None else fence.epoch, self._channel,
        ]  # fmt: skip
        said, _, number = self._run("write", "put", keys, given)
        if said == b"fence":
            assert fence is not None
            check_fence(fence, number)
        elif said == b"version":
            check_version(key, number, expected)
        return int(number)

    def scan(self, prefix: str) -> dict[str, Versioned]:
        """Return all values whose keys begin with *prefix*, sorted by key, as they were at one moment."""
        self._check_memory()
        for _ in range(MOST_SCANS):
            if (pages := self._pages(prefix)) is not None:
                break
        else:
            pages = self._page(*lexical_range(prefix), -1)[1]
        return dict(sorted((_text(key), _versioned(value)) for key, value in pages))

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        """Take or renew a lease (``Store.lease``), by the server's clock."""
        asked_s = time.monotonic()
        mine = self._held.get((name, holder))
        has = mine.epoch if mine is not None and asked_s < mine.until_s else 0
        given = [_bytes(holder), round(ttl_s * 1000), has, self._epochs_behind]
        said, _, *rest = self._run("take a lease in", "lease", [self._lease_key(name)], given)
        if said == b"held":
            self._held.pop((name, holder), None)
            return None
        epoch, until_ms = rest
        self._held[name, holder] = KnownLease(int(epoch), asked_s + ttl_s)
        return Lease(int(epoch), float(until_ms) / 1000)

    def watch(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed* after values under *prefix* change, from a thread of the store's own."""
        with self._lock:
            if self._watching is None and not self._closed.is_set():
                self._seen = self._look()[0]
                self._watching = threading.Thread(target=self._watch, name="orla-store", daemon=True)
                self._watching.start()
        return self._watchers.add(prefix, changed)

    def close(self) -> None:
        """Let the connections go. Idempotent."""
        self._closed.set()
        self._line.close()
        if self._watching is not None and self._watching is not threading.current_thread():
            self._watching.join(5)
        self._client.close()

    # How the server is asked

    def _run(self, what: str, script: str, keys: list[Any], given: list[Any]) -> Any:
        """Return the answer of a script that writes; one that came too late by a clock that was set is run again."""
        for _ in range(2):
            asked_s = time.monotonic()
            with self._asking(what):
                found = self._evaluated(script, keys, [DEADLINE, *given])
            self._line.learn(float(found[1]), asked_s)
            if found[0] != b"late":
                return found
        raise StoreUnavailable(f"{self._where}: cannot {what} {self.place}: its clock jumps")

    def _evaluated(self, script: str, keys: list[Any], given: list[Any]) -> Any:
        from redis.exceptions import NoScriptError

        text, known_as = SCRIPTS[script]
        try:
            return self._line.ask("EVALSHA", known_as, len(keys), *keys, *given)
        except NoScriptError:  # it was started, or told to forget scripts, since
            return self._line.ask("EVAL", text, len(keys), *keys, *given)

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn what redis-py raises into what a store raises."""
        import redis

        try:
            yield
        except redis.RedisError as error:
            text = f"{self._where}: cannot {what} {self.place}: {said_of(error, ANSWER_S)}"
            raise StoreUnavailable(text) from error

    def _page(self, begins: bytes, ends: bytes, most: int) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        """Return the version of the store, and the first values between two bounds."""
        keys = [self._values, self._names, self._version, self._born]
        with self._asking("read"):
            born, version, sizes, content = self._evaluated("scan", keys, [begins, ends, most])
        self._check_born(born)
        return version, list(_parts(sizes, content))

    def _pages(self, prefix: str) -> list[tuple[bytes, bytes]] | None:
        """Return the values under a prefix; ``None`` where the store was written to between two pages."""
        begins, ends = lexical_range(prefix)
        version, found = self._page(begins, ends, PAGE)
        page = found
        while len(page) == PAGE:
            later, page = self._page(b"(" + page[-1][0], ends, PAGE)
            if later != version:
                return None
            found += page
        return found

    def _lease_key(self, name: str) -> bytes:
        return self.address.key("lease:").encode() + _bytes(name)

    # What it is

    def _open(self) -> None:
        """Wait for the first connection, and say what is wrong with the server.

        Raises:
            ConfigError, StoreUnavailable: As the class says.
        """
        from redis import exceptions

        until_s = time.monotonic() + OPEN_S
        while True:
            try:
                with self._asking("use"):
                    self._line.ask("PING")
                break
            except StoreUnavailable as error:
                fault = self._line.fault
                if isinstance(fault, exceptions.AuthenticationError | exceptions.NoPermissionError):
                    raise ConfigError(f"{error}") from error
                if time.monotonic() >= until_s or not (
                    fault is None or isinstance(fault, exceptions.BusyLoadingError | TimeoutError)
                ):
                    raise
                time.sleep(0.05)
        self._warn_of("appendonly", {"no"}, "when it is started again it has forgotten keys, limits and which core "
                      "was the last; `CONFIG SET appendonly yes`, and the same in its file, mends that")  # fmt: skip
        self._warn_of("maxmemory-policy", THROWS_AWAY, "when its memory is full it throws away what stands here; "
                      "`CONFIG SET maxmemory-policy noeviction` mends that")  # fmt: skip

    def _warn_of(self, setting: str, wrong: Collection[str], what: str) -> None:
        import redis

        try:
            found = self._line.ask("CONFIG", "GET", setting)
        except (redis.RedisError, StoreUnavailable):  # a managed server does not say
            return
        pairs = found if isinstance(found, dict) else dict(zip(found[::2], found[1::2], strict=True))
        if (said := pairs.get(setting.encode(), b"").decode()) in wrong:
            log.warning("%s: %s has %s %s: %s", self._where, self.place, setting, said, what)

    def _begin(self, connection: Any) -> None:
        """Read the store's own name by a new connection, and give it one where it has none."""
        connection.send_command("GET", self._born)
        if (born := connection.read_response()) is None:  # only then: a server whose memory is full takes no SET
            connection.send_command("SET", self._born, secrets.token_hex(8), "NX")
            connection.read_response()
            connection.send_command("GET", self._born)
            born = connection.read_response()
        self._check_born(born, raises=False)

    def _check_born(self, born: bytes | None, *, raises: bool = True) -> None:
        if self._known is None:
            self._known = born
        elif born != self._known and not self._forgot:
            self._forgot = True
            log.error("%s", self._forgotten())
        if raises:
            self._check_memory()

    def _check_memory(self) -> None:
        if self._forgot:
            raise StoreUnavailable(self._forgotten())

    def _forgotten(self) -> str:
        return (
            f"{self._where}: {self.place} has forgotten what stood in it, keys and limits with it, and this process "
            "believes nothing that it says: bring its file back, or make keys again, and start each server again"
        )

    # Watching

    def _look(self) -> tuple[int, bytes | None]:
        """Return the store's version, and its own name."""
        with self._asking("read"):
            version, born = self._line.ask("MGET", self._version, self._born)
        return int(version or 0), born

    def _watch(self) -> None:
        """Announce what the server does, and what its version shows to have been missed."""
        import redis

        while not self._closed.is_set():
            channel = self._client.pubsub()
            try:
                channel.subscribe(self._channel)
                while not self._closed.is_set():
                    before, (version, born) = self._seen, self._look()
                    self._check_born(born, raises=False)
                    if version > before:
                        self._hear(channel, ON_ITS_WAY_S, version)
                    if version > self._seen or version < before:  # some were missed, or are lost
                        self._seen = version
                        self._watchers.announce(lambda prefix: True)
                    self._hear(channel, self._poll_s)
            except (redis.RedisError, OSError, StoreUnavailable):
                pass  # it is away, and asked again
            except Exception:  # without this thread no key that is revoked is noticed
                log.exception("%s: %s is watched again after a fault", self._where, self.place)
            finally:
                channel.close()
            self._closed.wait(self._poll_s)

    def _hear(self, channel: Any, seconds: float, version: int | None = None) -> None:
        """Announce changes as they come, for so long, or up to a version."""
        until_s = time.monotonic() + seconds
        while (left_s := until_s - time.monotonic()) > 0 and not self._closed.is_set():
            message = channel.get_message(ignore_subscribe_messages=True, timeout=min(left_s, 0.1))
            if message is None:
                continue
            try:
                number, key = read_entry(message["data"])
                changed = _text(key)
            except ValueError:  # another program's
                continue
            self._seen = max(self._seen, number)
            self._watchers.announce(changed.startswith)
            if version is not None and self._seen >= version:
                return


def _parts(sizes: bytes, content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield names and values as a scan's script puts them together."""
    at, each = 0, map(int, sizes.split())
    for of_name, of_value in zip(each, each, strict=True):
        middle, end = at + of_name, at + of_name + of_value
        yield content[at:middle], content[middle:end]
        at = end


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogatepass")


def _versioned(found: bytes) -> Versioned:
    version, value = read_entry(found)
    return Versioned(value, version)
