"""A store as one pool has it: what is the pool's own stands under the pool's name, what is common beside it.

Cores of several pools share one store. Keys and what was posted are common to them; the lease, the roster, labels and
what was spent are a pool's own. The pool without a name is the only one of a server that has no pools, and its
entries stand where they always stood.
"""

from __future__ import annotations

from collections.abc import Callable

from orla_lg.serve.store.store import Fence, Lease, Store, Versioned

POOLS = "pool/"


class ScopedStore:
    """A part of a store (``store.Store``).

    Args:
        store: The whole.
        pool: Of the part; empty: the whole, unchanged.
    """

    def __init__(self, store: Store, pool: str) -> None:
        self._store = store
        self._prefix = f"{POOLS}{pool}/" if pool else ""

    def get(self, key: str) -> Versioned | None:
        """Return a value; ``None`` where there is none."""
        return self._store.get(self._prefix + key)

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        """Write or delete a value, and return its version (``Store.put``)."""
        if fence is not None:
            fence = Fence(self._prefix + fence.lease, fence.epoch)
        return self._store.put(self._prefix + key, value, expected=expected, fence=fence)

    def scan(self, prefix: str) -> dict[str, Versioned]:
        """Return all values whose keys begin with *prefix*, sorted by key."""
        found, length = self._store.scan(self._prefix + prefix), len(self._prefix)
        return {key[length:]: value for key, value in found.items()}

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        """Take or renew a lease (``Store.lease``)."""
        return self._store.lease(self._prefix + name, holder, ttl_s)

    def watch(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed* after values under *prefix* change (``Store.watch``)."""
        return self._store.watch(self._prefix + prefix, changed)
