"""Pools without a core: found out by a lease that each pool renews, and that is free once no core of it lives."""

from __future__ import annotations

from math import inf

from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.store import Store

LEASE = "slices"
"""A pool's lease in the store, renewed by whichever core decides for it."""

LEASE_S, WITHIN = 10.0, 0.9
"""A core spends what it has in hand within so much of the lease since it was renewed; clocks differ by less."""

ASK_S = 2.0
"""A pool that had a core is asked for again so soon."""

MOMENT_S = 0.001
"""A free lease is taken for so long: its epoch shows later whether a core came back in between."""


FINDER = "a pool that found no core"
"""All of them take it by one name: the epoch grows where a core came back, and not where another pool looked too."""


class GonePools:
    """Which other pools have no core, as far as this one asked.

    Args:
        store: The whole, not a pool's part.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._asked_s: dict[str, float] = {}
        self._gone: dict[str, tuple[float, int]] = {}
        self.operations = 0

    def gone_for_s(self, pool: str, now: float) -> float:
        """Return for how long it has been known, without a break, that a pool has no core; 0: it has one.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        known = self._gone.get(pool)
        if known is None and now - self._asked_s.get(pool, -inf) < ASK_S:
            return 0.0
        self._asked_s[pool] = now
        self.operations += 1
        lease = ScopedStore(self._store, pool).lease(LEASE, FINDER, MOMENT_S)
        if lease is None:
            self._gone.pop(pool, None)
            return 0.0
        if known is None or known[1] != lease.epoch:
            known = self._gone[pool] = now, lease.epoch
        return now - known[0]
