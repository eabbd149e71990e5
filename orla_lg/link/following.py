"""Where a link may go: to what its user named, and to what was learned since of cores that followed one another.

The link's key is worth what its calls may do, so it does not go wherever some answer points. An address that was
learned is followed only if what gave it is believed, and if it is no weaker than what the user chose:

* a core behind a verified certificate, or on this machine, is believed; so is a store that is reached so. Any other
  one may be whatever answers there: what it names is followed without a key alone.
* an address of this machine is followed only where it comes from this machine: another one's names something else.
* plain HTTP to another machine is followed only where the user named such a URL.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from orla_lg.errors import ConfigError, shown
from orla_lg.link.dialing import ServerAddress, addresses
from orla_lg.link.places import MOST_URLS, CorePlace
from orla_lg.link.whereabouts import here

log = logging.getLogger("orla_lg")


class DirectorySource(Protocol):
    """A store whose directory names the cores."""

    text: str
    """Its URL, without a password."""
    is_believed: bool
    """Whether what answers there is known to be it: by a certificate, or as it is on this machine."""
    is_local: bool
    """Whether it is on this machine."""

    def read(self) -> Sequence[CorePlace]:
        """Return the cores and standbys that stand there.

        Raises:
            OSError: It does not answer.
        """
        ...


class CoreAddresses:
    """The addresses of one link. Any thread may ask.

    Args:
        named: By the user, in order.
        sources: Stores that the user named.
        has_key: Whether a key is sent.
        pool: The pool whose core is wanted; ``None``: that of the first core that is met.
    """

    def __init__(
        self,
        named: Sequence[ServerAddress],
        sources: Sequence[DirectorySource] = (),
        *,
        has_key: bool,
        pool: str | None = None,
    ) -> None:
        self.named, self.sources, self.pool = tuple(named), tuple(sources), pool
        self._has_key = has_key
        self._trusted: Sequence[ServerAddress] = self.named
        self._is_in_plain_text = any(each.is_in_plain_text for each in self.named) or not all(
            each.is_believed for each in self.sources
        )
        self._lock = threading.Lock()
        self._last: ServerAddress | None = None
        """Of the core that was met last."""
        self._learned: tuple[ServerAddress, ...] = ()
        self._refused = set[str]()
        self._tunnels = set[ServerAddress]()
        """Addresses of this machine that lead to another one."""

    def of_pool(self, pool: str) -> CoreAddresses:
        """Return the addresses of another pool's core: those that will be learned from here, with the same trust."""
        other = CoreAddresses((), self.sources, has_key=self._has_key, pool=pool)
        other._trusted, other._is_in_plain_text = self._trusted, self._is_in_plain_text
        other._tunnels = self._tunnels
        return other

    @property
    def text(self) -> str:
        """What the user named."""
        return ", ".join([*(each.text for each in self.sources), *(each.text for each in self.named)])

    def addresses(self) -> list[ServerAddress]:
        """Return where a core may be, the likeliest first."""
        with self._lock:
            last = () if self._last is None else (self._last,)
            return _distinct((*last, *self._learned, *self.named))

    @property
    def has_others(self) -> bool:
        """Whether the core may be elsewhere than where it was met last."""
        return bool(self.sources) or len(self.addresses()) > 1

    def met(self, giver: ServerAddress, pool: str, cores: Mapping[str, Any], host: str = "") -> None:
        """Follow what a core says of itself and of its standbys; what was learned before is over.

        Args:
            giver: Where it was met.
            pool: Its own.
            cores: By pool, URLs.
            host: Where it runs, if it says so (``whereabouts.here``).
        """
        if giver.is_local and host and host != here():
            self._tunnels.add(giver._replace(text=""))
        found = self.believed(cores.get(pool, ()), giver)
        with self._lock:
            self.pool, self._last = pool, giver
            if found:
                self._learned = found

    def hinted(self, giver: ServerAddress, urls: Sequence[str]) -> None:
        """Note where a standby says that the core is."""
        self._add(self.believed(urls, giver))

    def read(self, source: DirectorySource) -> int:
        """Note what a store's directory says; returns how many addresses of this link's pool are in it.

        Raises:
            OSError: It does not answer.
        """
        places = sorted(source.read(), key=lambda place: -place.epoch)
        found = [
            address
            for place in places
            if self.pool is None or place.pool == self.pool
            for address in self._believed(
                place.urls,
                source.is_believed,
                source.text,
                is_here=place.host == here() if place.host else source.is_local,
            )
        ]
        self._add(found)
        return len(found)

    def believed(self, urls: object, giver: ServerAddress) -> tuple[ServerAddress, ...]:
        """Return which of the URLs that a server gives may be followed."""
        is_believed = giver.is_local or giver.scheme == "https"
        is_here = giver.is_local and giver._replace(text="") not in self._tunnels
        return self._believed(urls, is_believed, giver.text, is_here=is_here)

    def forked(self) -> None:
        """Begin afresh in a child, where another thread may have held the lock."""
        self._lock = threading.Lock()

    def _add(self, found: Iterable[ServerAddress]) -> None:
        with self._lock:
            self._learned = tuple(_distinct((*found, *self._learned))[:MOST_URLS])

    def _believed(self, urls: object, is_believed: bool, giver: str, *, is_here: bool) -> tuple[ServerAddress, ...]:
        found = list[ServerAddress]()
        for url in list(urls)[:MOST_URLS] if isinstance(urls, list | tuple) else ():
            try:
                (address,) = addresses(url)
            except (ConfigError, ValueError):
                continue
            if (why := self._fault(address, is_believed, is_here=is_here)) is None:
                found.append(address)
            elif url not in self._refused and len(self._refused) < MOST_URLS:
                self._refused.add(url)
                log.info("%s names %s, which is not followed: %s", giver, shown(url), why)
        return tuple(_distinct(found))

    def _fault(self, address: ServerAddress, is_believed: bool, *, is_here: bool) -> str | None:
        """Return why an address is not followed; ``None``: it is."""
        if any(_same(address, each) for each in self._trusted):
            return None
        if address.is_local:
            return None if is_here else "it is an address of this machine, and comes from another one"
        if self._has_key and not is_believed:
            return "the key goes nowhere on the word of a server without TLS"
        if address.is_in_plain_text and not self._is_in_plain_text:
            return "it is in plain text, and no such URL was given here"
        return None


def _same(one: ServerAddress, other: ServerAddress) -> bool:
    return one._replace(text="") == other._replace(text="")


def _distinct(found: Iterable[ServerAddress]) -> list[ServerAddress]:
    first: dict[ServerAddress, ServerAddress] = {}
    for address in found:
        first.setdefault(address._replace(text=""), address)
    return list(first.values())
