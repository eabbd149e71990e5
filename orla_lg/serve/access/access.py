"""What a caller may do: found out from the key that it sends, once for each request and each link.

Without any key a server on a loopback address is open to this machine. Once a key exists, everything but health needs
one. What a key says of tenant, tags, backends and stages holds; a caller may narrow it, never widen.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

from orla_lg.core.call import Assignment
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.limits.patience import SLICE_WAIT_S
from orla_lg.core.steps import Wait, Waiter
from orla_lg.errors import AccessDenied, OrlaError, shown
from orla_lg.serve.access.budgets import AtOnce, CallSlots, HeldSlot, layers_of
from orla_lg.serve.access.keys import AccessKey, KeyScope, allows

Headers = Iterable[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""

REALM = b'Bearer realm="orla-lg"'
"""Basic is taken, and not offered: a browser would keep it, and send it along with other sites' requests."""

BUSY_RETRY_S = 1.0
"""What a caller is asked to wait whose key has as many calls in the server as it may."""

NO_TAGS: Mapping[str, str] = MappingProxyType({})

Scope = KeyScope


class Denied(OrlaError):
    """A request is refused before anything is done for it.

    Args:
        status: Of the HTTP answer.
        message: What was wrong, and what would be right; never a key.
        code: A word for programs.
        retry_after_s: When the same may be let in.
    """

    def __init__(self, status: int, message: str, code: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after_s = status, message, code, retry_after_s

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that go with it."""
        found = [(b"www-authenticate", REALM)] if self.status == 401 else []
        if self.retry_after_s is not None:
            found.append((b"retry-after", b"%d" % max(1, math.ceil(self.retry_after_s))))
        return found


@dataclass(frozen=True, slots=True)
class Caller:
    """What a request, or a link, may do."""

    key_id: str | None
    """``None``: there are no keys, and it comes from this machine."""
    name: str
    """The key's, for people."""
    tenants: tuple[str, ...] | None = None
    """Whose calls it makes; none: no tenant's; ``None``: any."""
    tags: Mapping[str, str] = field(default_factory=lambda: NO_TAGS)
    backends: tuple[str, ...] | None = None
    """Patterns of those that its calls may go to; ``None``: all."""
    stages: tuple[str, ...] | None = None
    """Patterns of those that its calls may be of; ``None``: all."""
    scopes: frozenset[KeyScope] = frozenset(KeyScope)

    def tenant_of(self, claimed: str | None) -> str | None:
        """Return whose call it is, of which its sender says that it is *claimed*'s.

        Raises:
            Denied: The key is not that tenant's; or it is of several, and none is named.
        """
        if self.tenants is None:
            return claimed or None
        if claimed:
            if claimed not in self.tenants:
                right = "it has none" if not self.tenants else f"it is for {', '.join(map(shown, self.tenants))}"
                raise _forbidden(f"key {self.name!r} makes no calls of tenant {shown(claimed)}: {right}")
            return claimed
        if len(self.tenants) > 1:
            raise _forbidden(
                f"key {self.name!r} is for several tenants; name one of {', '.join(map(shown, self.tenants))}"
            )
        return self.tenants[0] if self.tenants else None

    def tags_with(self, claimed: Mapping[str, str]) -> Mapping[str, str]:
        """Return a call's tags, of which its sender says *claimed*.

        Raises:
            Denied: One of them contradicts the key's.
        """
        if not claimed or not self.tags:
            return claimed or self.tags
        for tag, value in self.tags.items():
            if claimed.get(tag, value) != value:
                raise _forbidden(f"tag {shown(tag)} of key {self.name!r} is {shown(value)}, and stays so")
        return {**claimed, **self.tags}

    def check_stage(self, stage: str) -> None:
        """Refuse a call of a stage that the key does not allow.

        Raises:
            Denied: It is none of them.
        """
        if not allows(self.stages, stage):
            raise _forbidden(f"key {self.name!r} makes no calls of stage {shown(stage)}")

    def may_use(self, backend: str) -> bool:
        """Whether the key allows a backend."""
        return allows(self.backends, backend)

    def check_backend(self, backend: str) -> None:
        """Refuse a backend that the key does not allow.

        Raises:
            Denied: It is none of them.
        """
        if not allows(self.backends, backend):
            raise _forbidden(f"key {self.name!r} may not use backend {shown(backend)}")

    def narrow(self, assignment: Assignment) -> Assignment:
        """Return an assignment with the backends that the key allows alone (``InFlightCall.fit``).

        Raises:
            Denied: There are none.
        """
        if self.backends is None:
            return assignment
        named = (assignment.backend, *assignment.alternatives)
        allowed = [backend for backend in named if allows(self.backends, backend)]
        if not allowed:
            raise _forbidden(
                f"key {self.name!r} may not use backend {shown(assignment.backend)}, where the call goes"
            )
        if allowed[0] == assignment.backend:
            return replace(assignment, alternatives=tuple(allowed[1:]))
        reason = f"{assignment.reason}; the caller's key does not allow {assignment.backend!r}"
        return replace(assignment, backend=allowed[0], alternatives=tuple(allowed[1:]), reason=reason)


def _forbidden(message: str) -> Denied:
    return Denied(403, message, "permission_denied")


OPEN = Caller(None, "this machine")


class KnownKeys(Protocol):
    """The keys, as far as they are known here (``keys.Keyring``)."""

    clock: Callable[[], float]
    """Seconds since 1970."""
    any: bool
    """Whether a key exists."""

    def find(self, secret: str) -> AccessKey | None:
        """Return what is known of a key."""
        ...

    def of_digest(self, sha256: str) -> AccessKey | None:
        """Return what is known of the key of a hash."""
        ...

    def by_id(self, key_id: str) -> AccessKey | None:
        """Return what is known of a key that was found before."""
        ...


class Access:
    """What may come in, by the keys as they are now. Any thread may ask.

    Args:
        keyring: The keys.
    """

    def __init__(self, keyring: KnownKeys) -> None:
        self._keyring = keyring
        self.slots: AtOnce = CallSlots()
        self._callers: dict[str, tuple[AccessKey, Caller, tuple[LimitScope, ...]]] = {}
        """By key id; made again when the key is read again."""

    @property
    def is_open(self) -> bool:
        """Whether there are no keys, so that this machine needs none."""
        return not self._keyring.any

    def admit(self, headers: Headers, *, scope: KeyScope, loopback: bool, signed_in: str | None = None) -> Caller:
        """Return what the sender of a request may do.

        Args:
            headers: Of the request.
            scope: What it wants to do.
            loopback: Whether it comes from this machine, not through a proxy.
            signed_in: The id of the key by which a browser signed in; counts where no key is sent.

        Raises:
            Denied: It sends no key that allows it.
        """
        if self.is_open:
            if loopback:
                return OPEN
            raise Denied(401, "there is no key yet, so only this machine is served: `orla-lg keys create`", NO_KEY)
        presented = list(dict.fromkeys(credentials(headers)))
        if not presented and signed_in is not None:
            return self._allowed(self._keyring.by_id(signed_in), scope)
        if not presented:
            raise Denied(
                401,
                "a key is needed: `Authorization: Bearer KEY`, `x-api-key: KEY`, or the password of Basic",
                NO_KEY,
            )
        found = {key.id: key for secret in presented if (key := self._keyring.find(secret)) is not None}
        if len(found) != 1:
            raise Denied(401, "several keys are sent; send one" if found else "there is no such key", INVALID_KEY)
        (key,) = found.values()
        return self._allowed(key, scope)

    def _allowed(self, key: AccessKey | None, scope: KeyScope) -> Caller:
        """Return what a key allows, if the scope is part of it."""
        if key is None:
            raise Denied(401, "the key that this browser signed in with is gone", INVALID_KEY)
        if (fault := key.fault(self._keyring.clock())) is not None:
            raise Denied(401, f"key {key.name!r} ({key.id}) {fault}", INVALID_KEY)
        if not key.has(scope):
            has = ", ".join(key.scopes)
            raise _forbidden(f"key {key.name!r} has the scope {has}; {KeyScope(scope).value} is needed here")
        return self._caller(key)[0]

    def still(self, caller: Caller, scope: KeyScope) -> bool:
        """Whether the caller would be let in again: for links, which last."""
        if caller.key_id is None:
            return self.is_open
        key = self._keyring.by_id(caller.key_id)
        return key is not None and key.fault(self._keyring.clock()) is None and key.has(scope)

    # For gateways, whose links make calls in the names of other keys

    def told(self, sha256: str) -> dict[str, Any]:
        """Return what a gateway must know of the key of that hash, and whether there are keys at all."""
        key = self._keyring.of_digest(sha256)
        if key is None:
            return {"any": self._keyring.any, "key": None}
        said = {name: getattr(key, name) for name in ("id", "name", "expires_s", "revoked_s")}
        lists = {name: getattr(key, name) for name in ("scopes", "tenants", "backends", "stages")}
        said |= {name: None if each is None else [str(one) for one in each] for name, each in lists.items()}
        return {"any": True, "key": {**said, "tags": dict(key.tags)}}

    def caller_of(self, key_id: str) -> Caller:
        """Return what a call may do that a gateway makes in the name of a key.

        Raises:
            AccessDenied: The key does not hold, or not for calls.
        """
        key = self._keyring.by_id(key_id)
        if key is None:
            raise AccessDenied(f"key {shown(key_id)} is gone")
        if (fault := key.fault(self._keyring.clock())) is not None:
            raise AccessDenied(f"key {key.name!r} ({key.id}) {fault}")
        if not key.has(KeyScope.USE):
            raise AccessDenied(f"key {key.name!r} has the scope {', '.join(key.scopes)}; use is needed here")
        return self._caller(key)[0]

    def layers(self, caller: Caller) -> Sequence[LimitScope]:
        """Return the key's limits as layers of a call."""
        if caller.key_id is None or (key := self._keyring.by_id(caller.key_id)) is None:
            return ()
        return self._caller(key)[1]

    def enter(self, caller: Caller, refuses: bool = True) -> HeldSlot:
        """Count a call in, until ``release``; one that runs already is not refused.

        Raises:
            Denied: As many of the key's calls are in the server as may be at once.
        """
        key = None if caller.key_id is None else self._keyring.by_id(caller.key_id)
        if key is None or key.concurrency is None:
            return HeldSlot()
        slot = self.slots.take(key.id, key.concurrency, refuses)
        if slot is None:
            raise Denied(
                429, f"{key.concurrency} calls of key {key.name!r} are in the server, as many as may be at once",
                "concurrency_limit_exceeded", BUSY_RETRY_S,
            )  # fmt: skip
        return slot

    at_once = enter

    def pending(self, key_id: str | None) -> Future[None] | None:
        """Return what a key's call should wait for before it enters, as other pools give way; ``None``: nothing."""
        key = None if key_id is None else self._keyring.by_id(key_id)
        return None if key is None or key.concurrency is None else self.slots.pending(key.id, key.concurrency)

    async def entered(self, caller: Caller) -> HeldSlot:
        """Count a call in as ``enter`` does, once other pools' cores had time to give way."""
        until_s = time.monotonic() + SLICE_WAIT_S
        while (pending := self.pending(caller.key_id)) is not None and (left_s := until_s - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                await Wait(pending, left_s, Waiter()).arun()
        return self.enter(caller)

    def _caller(self, key: AccessKey) -> tuple[Caller, tuple[LimitScope, ...]]:
        known = self._callers.get(key.id)
        if known is None or known[0] is not key:
            # A gateway's sessions are of all tenants; each of its calls has the tenants of the key that makes it.
            tenants = None if KeyScope.GATEWAY in key.scopes and not key.tenants else key.tenants
            caller = Caller(
                key.id, key.name, tenants, MappingProxyType(dict(key.tags)), key.backends, key.stages,
                frozenset(key.scopes),
            )  # fmt: skip
            known = self._callers[key.id] = key, caller, layers_of(key)
        return known[1], known[2]


NO_KEY, INVALID_KEY = "missing_api_key", "invalid_api_key"


def credentials(headers: Headers) -> Iterable[str]:
    """Yield the keys in a request's headers: as Bearer, as ``x-api-key``, as the password (or the name) of Basic."""
    for name, value in headers:
        if name == b"authorization":
            kind, _, rest = value.strip().partition(b" ")
            rest = rest.strip()
            if kind.lower() == b"bearer" and rest:
                yield rest.decode("latin-1")
            elif kind.lower() == b"basic" and (found := _of_basic(rest)):
                yield found
        elif name == b"x-api-key" and (given := value.strip()):
            yield given.decode("latin-1")


def _of_basic(encoded: bytes) -> str:
    try:
        name, _, password = base64.b64decode(encoded, validate=True).decode("latin-1").partition(":")
    except (binascii.Error, ValueError):
        return ""
    return password or name
