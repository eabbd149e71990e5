"""What keys may spend: their limits as layers of a call, their calls at once, and what was spent, over restarts.

The amounts are the core's own accounts (``core.limits``): set aside when a call is let in, settled when it ends, so
that calls side by side cannot overspend. This module gives them to a call, and keeps them in the store.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from orla_lg.core.limits.book import LimitBook
from orla_lg.core.limits.kept import KeptAccount, restored
from orla_lg.core.limits.limits import NO_LIMITS, Limit, LimitScope
from orla_lg.core.limits.usage import NOTHING, Amount, Key, Scope
from orla_lg.errors import shown
from orla_lg.serve.keys import AccessKey
from orla_lg.serve.store import Store

log = logging.getLogger("orla_lg")

PREFIX = "spent/"

MOST_AT_ONCE = 500
"""So many accounts are written by one ``save``; the others by the next."""


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


class CallSlots:
    """How many calls of each key are in the server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: dict[str, int] = {}

    def take(self, key_id: str, most: int) -> HeldSlot | None:
        """Count a call in; ``None`` where *most* are in."""
        with self._lock:
            taken = self._taken.get(key_id, 0)
            if taken >= most:
                return None
            self._taken[key_id] = taken + 1
        return HeldSlot(lambda: self._left(key_id))

    def _left(self, key_id: str) -> None:
        with self._lock:
            self._taken[key_id] -= 1
            if not self._taken[key_id]:
                del self._taken[key_id]


# What was spent, over restarts


class SpentBook:
    """Keeps in the store what was spent: of keys, tenants and stages, by limits that outlive a run.

    Only the core that has the lease may ``save``: two would overwrite each other. What was spent since the last
    ``save`` is lost with a process that is killed.

    Args:
        store: Where it is kept.
        limits: The accounts.
        clock: Seconds since 1970.
    """

    def __init__(self, store: Store, limits: LimitBook, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._limits, self._clock = store, limits, clock
        self._saved: dict[Key, Amount] = {}
        self._settled = -1

    def load(self) -> None:
        """Let the limits know what was spent before; what is out of every window is removed."""
        found: list[KeptAccount] = []
        for key, value in self._store.scan(PREFIX).items():
            account = _unpack(key, value.value, self._clock())
            if account is None:
                log.warning("%s in the store is no account, and is not heeded", shown(key))
            elif account.is_over:
                self._store.put(key, None, expected=value.version)
            else:
                found.append(account)
        self._limits.restore(found)
        self._saved = {account.key: account.spent for account in found}

    def save(self) -> bool:
        """Write what changed since the last time; returns whether that was all.

        Raises:
            StoreUnavailable: It could not be written; the next ``save`` does.
        """
        settled = self._limits.settled
        if settled == self._settled:
            return True
        now_s, written = self._clock(), 0
        for account in self._limits.kept():
            if self._saved.get(account.key) is account.spent:
                continue
            if written == MOST_AT_ONCE:
                return False
            self._store.put(_name(account.key), _pack(account, now_s))
            self._saved[account.key] = account.spent
            written += 1
        self._settled = settled
        return True


def spent_of(store: Store, key: AccessKey, now_s: float) -> list[dict[str, Any]]:
    """Return what was spent of each of a key's limits, as the store knows it: a running server's is newer."""
    found = []
    for layer in layers_of(key):
        assert layer.whole is not None
        value = store.get(_name((layer.key, Scope.KEY, layer.name)))
        account = None if value is None else _unpack(_name((layer.key, Scope.KEY, layer.name)), value.value, now_s)
        found.append(asdict(NOTHING if account is None else _now(account, layer.whole, now_s)))
    return found


def _now(kept: KeptAccount, limit: Limit, now_s: float) -> Amount:
    account = restored(kept, now_s)
    account.look(limit.per_s, now_s)
    return account.spent


def _name(key: Key) -> str:
    layer, scope, name = key
    return PREFIX + json.dumps([layer, scope, name])


def _pack(account: KeptAccount, now_s: float) -> bytes:
    slices = [[now_s - age_s, *_flat(amount)] for age_s, amount in account.slices]
    return json.dumps({"spent": _flat(account.spent), "per_s": account.per_s, "slices": slices}).encode()


def _flat(amount: Amount) -> list[float]:
    return [amount.calls, amount.tokens, amount.cost_usd, amount.wall_s]


def _unpack(name: str, packed: bytes, now_s: float) -> KeptAccount | None:
    """Return an account; ``None`` where it is none. An age is never below 0, whatever became of the clock."""
    try:
        layer, scope, of = json.loads(name.removeprefix(PREFIX))
        table: Mapping[str, Any] = json.loads(packed)
        slices = tuple((max(0.0, now_s - begun_s), _amount(*flat)) for begun_s, *flat in table["slices"])
        per_s = None if table["per_s"] is None else float(table["per_s"])
        return KeptAccount((str(layer), Scope(scope), str(of)), per_s, _amount(*table["spent"]), slices)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _amount(calls: float, tokens: float, cost_usd: float, wall_s: float) -> Amount:
    return Amount(int(calls), int(tokens), float(cost_usd), float(wall_s))
