"""A store on Redis or Valkey, as far as servers and replicas must agree on it: its URL, and where what stands.

All keys begin with one prefix. Its braces make them one slot of a cluster, so that one script may touch several.

==================  =========================================================================================
``{orla}:values``   a hash: each key of the store, with its version, a space, and the value
``{orla}:names``    a sorted set of the same keys, all of one score: their order is that of their bytes
``{orla}:version``  the version that was given last
==================  =========================================================================================

redis-py is imported when a connection is made, and not before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from orla_lg.errors import ConfigError, shown
from orla_lg.link.dialing import is_this_machine

SCHEMES = ("redis://", "rediss://", "redis+unix://")

EXTRA = "pip install 'orla-lg[redis]'"

PREFIX = "orla"

ANSWER_S = 1.0
"""How long the store may take for each step of an answer."""

PREFIX_CHARS = 100


def is_shared(where: str | None) -> TypeGuard[str]:
    """Whether a store is one that several machines reach: a URL, and no file."""
    return where is not None and where.startswith(SCHEMES)


class RedisAddress(NamedTuple):
    """Where a store is."""

    url: str
    """As redis-py takes it."""
    text: str
    """The same without what is secret."""
    prefix: str
    """Of all keys."""
    is_local: bool
    """Whether it is on this machine."""
    is_believed: bool
    """Whether what answers is known to be it: by a verified certificate, or as it is on this machine."""

    def __repr__(self) -> str:
        """Return what may be shown."""
        return f"RedisAddress({self.text!r}, prefix={self.prefix!r})"

    @classmethod
    def parse(cls, url: str, where: str) -> RedisAddress:
        """Read ``redis://[[USER]:PASSWORD@]HOST:PORT/DB``, ``rediss://…`` or ``redis+unix:///PATH``.

        ``?prefix=NAME`` names another prefix than ``orla``; whatever else stands there is redis-py's.

        Raises:
            ConfigError: It is none; *where* is what the message begins with.
        """
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:  # whose message may be part of a password
            raise ConfigError(
                f"{where}: the URL of the store is none: its port must be a number up to 65535, and /, ?, #, [ and ] "
                "in a password are written %2F, %3F, %23, %5B and %5D"
            ) from None
        is_unix = parts.scheme == "redis+unix"
        if not url.startswith(SCHEMES) or not (parts.path if is_unix else host) or any(map(str.isspace, url)):
            raise ConfigError(f"{where}: the URL of the store must be redis://HOST:PORT/DB, rediss:// for TLS")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        prefix = query.pop("prefix", PREFIX)
        is_short = prefix.isascii() and prefix.isprintable() and 0 < len(prefix) <= PREFIX_CHARS
        if not is_short or set(prefix) & set("{} "):
            raise ConfigError(f"{where}: prefix={shown(prefix)} must be a short name without braces and spaces")
        is_local = is_unix or is_this_machine(host or "")
        if parts.scheme == "rediss":
            query.setdefault("ssl_check_hostname", "true")
        verifies = query.get("ssl_cert_reqs", "required") == "required" and query.get("ssl_check_hostname") == "true"
        more = f"?{urlencode(query)}" if query else ""
        return cls(
            f"{'unix' if is_unix else parts.scheme}://{parts.netloc}{parts.path}{more}",
            f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}", prefix, is_local,
            is_local or (parts.scheme == "rediss" and verifies),
        )  # fmt: skip

    def key(self, name: str) -> str:
        """Return one of the keys named above."""
        return f"{{{self.prefix}}}:{name}"

    def connect(self, **settings: Any) -> Any:
        """Return a client of redis-py.

        Raises:
            ConfigError: It is not installed, or does not take the URL.
        """
        if importlib.util.find_spec("redis") is None:
            raise ConfigError(f"{self.text} needs the package redis, which a plain install leaves out: {EXTRA}")
        import redis

        timing = {"socket_timeout": ANSWER_S, "socket_connect_timeout": ANSWER_S}
        try:
            return redis.Redis.from_url(self.url, **{**timing, **settings})
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{self.text}: redis-py does not take this URL: {error}") from None


def with_password(url: str, password: str) -> str:
    """Return the URL of a store with a password, if it has none."""
    parts = urlsplit(url)
    if parts.password is not None:
        return url
    user, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{place}").geturl()


def entry(version: int, value: bytes) -> bytes:
    """Return a value as it stands in the hash."""
    return b"%d %b" % (version, value)


def read_entry(found: bytes) -> tuple[int, bytes]:
    """Return the version of what stands in the hash, and its value."""
    version, _, value = found.partition(b" ")
    return int(version), value


def lexical_range(prefix: str) -> tuple[bytes, bytes]:
    """Return the bounds, as ``ZRANGEBYLEX`` takes them, of what begins with *prefix*: no byte of UTF-8 is 255."""
    begins = prefix.encode("utf-8", "surrogatepass")
    return b"[" + begins, b"(" + begins + b"\xff"


def entries(client: Any, address: RedisAddress, prefix: str) -> Mapping[str, bytes]:
    """Return the values whose keys begin with *prefix*, for what only reads: they need not be of one moment."""
    names = client.zrangebylex(address.key("names"), *lexical_range(prefix))
    found = client.hmget(address.key("values"), names) if names else []
    return {
        name.decode("utf-8", "surrogatepass"): read_entry(each)[1]
        for name, each in zip(names, found, strict=True)
        if each is not None
    }
