"""The store on Redis or Valkey, which several machines reach: one script for each step, and a time-out for each.

Each write, each lease and each scan is one script, which the server runs by itself and whole: a value's version is
compared in the step that writes it, and a lease's time is the server's own clock, so that no two machines' clocks are
compared. A write that returned is in the server's memory, and in its log as ``appendfsync`` says: without a log
(``appendonly no``) a server that is started again has forgotten all of it, epochs too, and is warned of.

An answer may be lost although the write took place. A lease that is asked for again by the same holder is renewed,
and a value that is expected to have its old version is a ``Conflict``: its writer reads again, and finds its own.
Nothing is sent a second time from here.

Where what stands is written in ``link.redis_keys``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from orla_lg.errors import ConfigError
from orla_lg.link.redis_keys import EXTRA, RedisAddress, lexical_range, read_entry
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

ANSWER_S = 0.25
"""The server has so long for each step: the core's loop waits for it."""

REST_S = 0.25
"""A server that did not answer is not asked again for so long: what is asked meanwhile fails at once."""

POLL_S = 0.5
"""How often a watched store is asked for its version, beside what it announces."""

MOST_SCANNED = 100_000
"""Values that one scan brings; a store that has more of them under a prefix is none of ours."""

# KEYS: values, names, version, the lease of the fence. ARGV: key, value, whether there is one, the version that is
# expected or -1, the epoch of the fence or -1, the channel.
PUT = """
local epoch = tonumber(redis.call('HGET', KEYS[4], 'epoch') or 0)
if ARGV[5] ~= '-1' and epoch ~= tonumber(ARGV[5]) then return {'fence', epoch} end
local known = redis.call('HGET', KEYS[1], ARGV[1])
local found = known and tonumber(string.match(known, '^%d+')) or 0
if ARGV[4] ~= '-1' and found ~= tonumber(ARGV[4]) then return {'version', found} end
if ARGV[3] == '0' and not known then return {'done', tonumber(redis.call('GET', KEYS[3]) or 0)} end
local version = redis.call('INCR', KEYS[3])
if ARGV[3] == '0' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('ZREM', KEYS[2], ARGV[1])
else
  redis.call('HSET', KEYS[1], ARGV[1], string.format('%d ', version) .. ARGV[2])
  redis.call('ZADD', KEYS[2], 0, ARGV[1])
end
redis.call('PUBLISH', ARGV[6], ARGV[1])
return {'done', version}
"""

# KEYS: values, names. ARGV: the bounds, and how many at most.
SCAN = """
local names = redis.call('ZRANGEBYLEX', KEYS[2], ARGV[1], ARGV[2], 'LIMIT', 0, tonumber(ARGV[3]))
local found = {}
for at = 1, #names do
  found[2 * at - 1] = names[at]
  found[2 * at] = redis.call('HGET', KEYS[1], names[at])
end
return found
"""

# KEYS: the lease. ARGV: holder, milliseconds.
LEASE = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local known = redis.call('HMGET', KEYS[1], 'holder', 'epoch', 'until')
local epoch = tonumber(known[2] or 0)
if known[1] and known[1] ~= ARGV[1] then
  if tonumber(known[3]) > now then return {0, 0} end
end
if known[1] ~= ARGV[1] then epoch = epoch + 1 end
local ends = string.format('%.0f', now + tonumber(ARGV[2]))
redis.call('HSET', KEYS[1], 'holder', ARGV[1], 'epoch', epoch, 'until', ends)
return {epoch, ends}
"""


class RedisStore:
    """A store on a Redis or Valkey server (``store.Store``); close it at the end.

    Args:
        address: Where it is.
        where: What messages begin with: the key of the configuration, or the option, that named it.
        answer_s: How long the server may take for one step.
        rest_s: How long a server that did not answer is left alone.
        poll_s: How often its version is asked for where something is watched.
        settings: Of the client, as redis-py takes them.

    Raises:
        ConfigError: It cannot be used: redis-py is missing, the password is wrong, the server keeps nothing.
        StoreUnavailable: It does not answer.
    """

    def __init__(
        self,
        address: RedisAddress,
        *,
        where: str = "store",
        answer_s: float = ANSWER_S,
        rest_s: float = REST_S,
        poll_s: float = POLL_S,
        **settings: Any,
    ) -> None:
        if importlib.util.find_spec("redis") is None:
            raise ConfigError(f"{where}: {address.text} needs the package redis: {EXTRA}")
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self.address, self._where, self._rest_s, self._poll_s = address, where, rest_s, poll_s
        self.place = address.text
        """As messages name it."""
        timing = {"socket_timeout": answer_s, "socket_connect_timeout": answer_s, "retry": Retry(NoBackoff(), 0)}
        self._client = address.connect(**{**timing, **settings})
        self._values, self._names, self._version = map(address.key, ("values", "names", "version"))
        self._channel = address.key("changes")
        self._put, self._scan, self._lease = map(self._client.register_script, (PUT, SCAN, LEASE))
        self._watchers = Watchers()
        self._watching: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._rests_until_s = 0.0
        self._check()

    # The five methods

    def get(self, key: str) -> Versioned | None:
        """Return a value; ``None`` where there is none."""
        with self._asking("read"):
            found = self._client.hget(self._values, _bytes(key))
        return None if found is None else _versioned(found)

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        """Write or delete a value, and return its version (``Store.put``)."""
        keys = [self._values, self._names, self._version, self._lease_key("" if fence is None else fence.lease)]
        given = [
            _bytes(key), value or b"", int(value is not None), -1 if expected is None else expected,
            -1 if fence is None else fence.epoch, self._channel,
        ]  # fmt: skip
        with self._asking("write"):
            said, number = self._put(keys=keys, args=given)
        if said == b"fence":
            assert fence is not None
            check_fence(fence, number)
        elif said == b"version":
            check_version(key, number, expected)
        return int(number)

    def scan(self, prefix: str) -> dict[str, Versioned]:
        """Return all values whose keys begin with *prefix*, sorted by key."""
        with self._asking("read"):
            found = self._scan(keys=[self._values, self._names], args=[*lexical_range(prefix), MOST_SCANNED + 1])
        if len(found) > 2 * MOST_SCANNED:
            raise StoreUnavailable(
                f"{self._where}: {self.address.text} has more than {MOST_SCANNED:,} values under {prefix!r}; is it "
                "another program's? ?prefix=NAME in its URL names keys of our own"
            )
        pairs = zip(found[::2], found[1::2], strict=True)
        return dict(sorted((_text(key), _versioned(value)) for key, value in pairs if value is not None))

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        """Take or renew a lease (``Store.lease``), by the server's clock."""
        with self._asking("take a lease in"):
            epoch, until_ms = self._lease(keys=[self._lease_key(name)], args=[_bytes(holder), round(ttl_s * 1000)])
        return Lease(int(epoch), float(until_ms) / 1000) if epoch else None

    def watch(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed* after values under *prefix* change, from a thread of the store's own."""
        with self._lock:
            if self._watching is None and not self._closed.is_set():
                self._watching = threading.Thread(target=self._watch, name="orla-store", daemon=True)
                self._watching.start()
        return self._watchers.add(prefix, changed)

    def close(self) -> None:
        """Let the connections go. Idempotent."""
        self._closed.set()
        if self._watching is not None and self._watching is not threading.current_thread():
            self._watching.join(5)
        self._client.close()

    # How the server is asked

    @contextlib.contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Turn what redis-py raises into what a store raises, and leave a server alone that does not answer."""
        import redis

        if self._closed.is_set():
            raise StoreUnavailable(f"{self._where}: {self.address.text} was closed")
        if (left_s := self._rests_until_s - time.monotonic()) > 0:
            raise StoreUnavailable(
                f"{self._where}: {self.address.text} did not answer just now, and is asked again in {left_s:.2f} s"
            )
        try:
            yield
        except (redis.TimeoutError, redis.ConnectionError, OSError) as error:
            if not isinstance(error, redis.AuthenticationError):
                self._rests_until_s = time.monotonic() + self._rest_s
            raise StoreUnavailable(self._said(what, error)) from error
        except redis.RedisError as error:
            raise StoreUnavailable(self._said(what, error)) from error

    def _said(self, what: str, error: Exception) -> str:
        text = f"{self._where}: cannot {what} {self.address.text}: {' '.join(str(error).split())[:300]}"
        if str(error).startswith("READONLY") or type(error).__name__ == "ReadOnlyError":
            text += "; it is a replica: the URL must name the server that is written to"
        return text

    def _check(self) -> None:
        """Refuse a server that would forget what it was given, or that does not take the password.

        Raises:
            ConfigError, StoreUnavailable: As the class says.
        """
        import redis

        try:
            with self._asking("use"):
                self._client.ping()
        except StoreUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, redis.AuthenticationError) or f"{cause}".startswith(("NOAUTH", "NOPERM")):
                raise ConfigError(
                    f"{error}; user and password stand in its URL, or in the variable that [serve] "
                    "store_password_env names"
                ) from error
            raise
        try:
            kept = self._client.config_get("appendonly").get("appendonly")
        except redis.RedisError:  # a managed server does not say
            return
        if kept == "no":
            log.warning(
                "%s: %s keeps no log (appendonly no): started again it has forgotten keys, limits and which core was "
                "the last; `CONFIG SET appendonly yes`, and the same in its file, mends that",
                self._where, self.address.text,
            )  # fmt: skip

    def _lease_key(self, name: str) -> bytes:
        return self.address.key("lease:").encode() + _bytes(name)

    # Watching

    def _watch(self) -> None:
        """Announce what the server does, and what its version shows to have been missed."""
        import redis

        seen = -1
        while not self._closed.is_set():
            channel = self._client.pubsub()
            try:
                channel.subscribe(self._channel)
                while not self._closed.is_set():
                    version = int(self._client.get(self._version) or 0)
                    if -1 < seen < version:
                        self._watchers.announce(lambda prefix: True)
                    seen = version
                    seen += self._hear(channel, time.monotonic() + self._poll_s)
            except (redis.RedisError, OSError):
                self._closed.wait(self._poll_s)
            finally:
                channel.close()

    def _hear(self, channel: Any, until_s: float) -> int:
        """Announce changes as they come, until then; returns how many came."""
        count = 0
        while (left_s := until_s - time.monotonic()) > 0 and not self._closed.is_set():
            message = channel.get_message(ignore_subscribe_messages=True, timeout=min(left_s, 0.1))
            if message is None:
                continue
            key = _text(message["data"])
            self._watchers.announce(key.startswith)
            count += 1
        return count


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogatepass")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogatepass")


def _versioned(found: bytes) -> Versioned:
    version, value = read_entry(found)
    return Versioned(value, version)
