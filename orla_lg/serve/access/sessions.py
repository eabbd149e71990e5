"""Browsers that signed in with a key: the server's own tokens, in memory; a cookie holds one, and never the key.

A token is 256 random bits, of which the SHA-256 is kept. It ends with its key, with its age, when its browser signs
out, when many others came after it, and with the server.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

AGE_S = 12 * 3600.0
MOST_OF_ALL, MOST_OF_A_KEY = 1_000, 20
"""A further sign-in ends the oldest."""

COOKIE = b"orla-session"
OF_THIS_HOST = b"__Host-"
"""Before a cookie's name: browsers take it over TLS alone, for every path, and from no other host."""


@dataclass(frozen=True, slots=True)
class SignIn:
    """One browser that is signed in."""

    digest: str
    """Of its token."""
    key_id: str
    ends_s: float


class SignIns:
    """Who is signed in. Of the event loop.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[str, SignIn] = {}
        """By digest, the oldest first."""

    def __len__(self) -> int:
        return len(self._known)

    def begin(self, key_id: str) -> str:
        """Sign a browser in, and return its token."""
        self._forget_old()
        token = secrets.token_urlsafe(32)
        made = SignIn(_digest(token.encode()), key_id, self._clock() + AGE_S)
        self._known[made.digest] = made
        of_key = [each for each in self._known.values() if each.key_id == key_id]
        too_many = [*of_key[: max(0, len(of_key) - MOST_OF_A_KEY)], *list(self._known.values())[: self._excess()]]
        for each in too_many:
            self._known.pop(each.digest, None)
        return token

    def _excess(self) -> int:
        return max(0, len(self._known) - MOST_OF_ALL)

    def find(self, cookies: Iterable[bytes]) -> SignIn | None:
        """Return the sign-in that one of a request's cookies names; they are shared by all ports of a host."""
        for token in tokens(cookies):
            found = self._known.get(_digest(token))
            if found is not None and self.holds(found.digest):
                return found
        return None

    def holds(self, digest: str) -> bool:
        """Whether a sign-in is still one; its key is another matter."""
        known = self._known.get(digest)
        return known is not None and known.ends_s > self._clock()

    def end(self, digest: str) -> None:
        """Sign a browser out. Idempotent."""
        self._known.pop(digest, None)

    def _forget_old(self) -> None:
        now = self._clock()
        for each in [known for known in self._known.values() if known.ends_s <= now]:
            del self._known[each.digest]


def tokens(cookies: Iterable[bytes]) -> Iterable[bytes]:
    """Yield what a request's ``Cookie`` headers hold under our names."""
    for header in cookies:
        for pair in header.split(b";"):
            name, _, value = pair.strip().partition(b"=")
            if name.removeprefix(OF_THIS_HOST).startswith(COOKIE) and value:
                yield value


def cookie_name(port: int | None, *, secure: bool) -> str:
    """Return the name of a server's cookie; its port is in it, since servers of one host share their cookies."""
    name = COOKIE.decode() + (f"-{port}" if port else "")
    return OF_THIS_HOST.decode() + name if secure else name


def _digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()
