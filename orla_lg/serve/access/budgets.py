"""What keys may spend: their limits as layers of a call, and their calls at once.

The amounts are the core's own accounts (``core.limits``): set aside when a call is let in, settled when it ends, so
that calls side by side cannot overspend. ``spent`` keeps them over restarts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from types import TracebackType
from typing import Any, Protocol, Self

from orla_lg.core.limits.limits import NO_LIMITS, LimitScope
from orla_lg.core.limits.usage import NOTHING, Scope
from orla_lg.serve.access.keys import AccessKey
from orla_lg.serve.pools.directory import Directory
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.spent import spent_under
from orla_lg.serve.store.store import Store


def layers_of(key: AccessKey) -> tuple[LimitScope, ...]:
    """Return a key's limits, each as a layer that holds for all of its calls together."""
    return tuple(
        LimitScope(NO_LIMITS, f"key/{key.id}/{number}", f" of key {key.id}", whole=limit, name=key.name)
        for number, limit in enumerate(key.limits)
    )


# Calls at once


class HeldSlot:
    """One of the calls that a key may have in the server at once; given back once, by ``release`` or ``with``."""

    __slots__ = ("_give_back",)

    def __init__(self, give_back: Callable[[], None] | None = None) -> None:
        self._give_back = give_back

    def release(self) -> None:
        """Give it back. Idempotent."""
        give_back, self._give_back = self._give_back, None
        if give_back is not None:
            give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


class AtOnce(Protocol):
    """How many calls of each key are in: in this server, or in those of all pools (``pools.slices``)."""

    def take(self, key_id: str, most: int, refuses: bool = True) -> HeldSlot | None:
        """Count a call in; ``None`` where *most* are in, and one more is to be refused."""
        ...

    def pending(self, key_id: str, most: int) -> Future[None] | None:
        """Return what a call should wait for before it is counted in; ``None``: nothing."""
        ...


class CallSlots:
    """How many calls of each key are in the server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[str, int] = {}

    def take(self, key_id: str, most: float, refuses: bool = True) -> HeldSlot | None:
        """Count a call in; ``None`` where *most* are in, and one more is to be refused."""
        with self._lock:
            taken = self._taken.get(key_id, 0)
            if refuses and taken >= most:
                return None
            self._taken[key_id] = taken + 1
        return HeldSlot(lambda: self._left(key_id))

    def pending(self, key_id: str, most: int) -> Future[None] | None:
        """Return ``None``: nothing is to be waited for."""
        return None

    def _left(self, key_id: str) -> None:
        with self._lock:
            self._taken[key_id] -= 1
            if not self._taken[key_id]:
                del self._taken[key_id]


# What was spent


def spent_of(store: Store, key: AccessKey, now_s: float) -> list[dict[str, Any]]:
    """Return what was spent of each of a key's limits in all pools, as the store knows it, a second late."""
    pools = [ScopedStore(store, pool) for pool in {"": None, **Directory(store).cores()}]
    found = []
    for layer in layers_of(key):
        assert layer.whole is not None
        spent = NOTHING
        for pool in pools:
            account = spent_under(pool, (layer.key, Scope.KEY, layer.name), now_s)
            if account is not None:
                account.look(layer.whole.per_s, now_s)
                spent = spent.plus(account.spent)
        found.append(asdict(spent))
    return found
