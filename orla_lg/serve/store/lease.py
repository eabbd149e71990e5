"""The lease of the one core that decides: taken in the store, renewed, and lost.

Each core that takes the lease after another one has a greater epoch. It grants only while less than half the lease
has passed since its last renewal was asked for, by the monotonic clock and looked at with each grant: a process that
was frozen grants nothing when it goes on, even before it finds out that another core has taken over.

A store that is away renews nothing, so grants end after half a lease. A core that is set to go on (``goes_on``)
grants as long as it asks in vain: from within its lease, without a gap of half a lease in its asking, and until a
replica or the store shows it a greater epoch. No other core takes a lease from a store that is away for all; from one
that is away for this core alone another one does.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from math import inf

from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.store import Fence, Store, StoreUnavailable

log = logging.getLogger("orla_lg")

NAME = "core"
"""Of the lease, in the store."""


class CoreLease:
    """The right to decide, as one core has it or not. Of one thread, except ``holds``.

    Args:
        store: Where it is kept.
        ttl_s: Seconds after which another core may take it that was not renewed.
        clock: Monotonic seconds.
        holder: Of this process; random by default.
        goes_on: Whether it decides on while the store does not answer, for as long as that is. Another core that
            reaches the store takes the lease meanwhile: then each of the two has the whole of each bound.
    """

    def __init__(
        self,
        store: Store,
        ttl_s: float = 1.5,
        *,
        clock: Callable[[], float] = time.monotonic,
        holder: str = "",
        goes_on: bool = False,
    ) -> None:
        self.ttl_s = ttl_s
        self.epoch = 0
        """0 until it was taken."""
        self.deposed = False
        """Another core has it, or had it: this one decides nothing more."""
        self._store = store
        self._clock = clock
        self.holder = holder or secrets.token_hex(8)
        self._until_s = -inf
        """Grants may be given until then, monotonic."""
        self.store_away = False
        """The store did not answer when it was asked last."""
        self.outages = 0
        """How often it began not to."""
        self.goes_on = goes_on
        self._away_since_s = -inf

    def holds(self) -> bool:
        """Whether grants may be given now; any thread may ask."""
        return self._clock() < self._until_s

    def take(self) -> bool:
        """Try to take it; returns whether this core has it now.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        asked_s = self._clock()
        lease = self._store.lease(NAME, self.holder, self.ttl_s)
        if lease is None:
            return False
        self.epoch, self._until_s = lease.epoch, asked_s + self.ttl_s / 2
        return True

    def renew(self) -> bool:
        """Renew it; returns whether it had run out before, so that grants were held back and may be given now.

        A store that does not answer is logged once; grants end by themselves then.
        """
        asked_s = self._clock()
        was_over = asked_s >= self._until_s
        try:
            lease = self._store.lease(NAME, self.holder, self.ttl_s)
        except StoreUnavailable as error:
            self._is_not_renewed(asked_s, was_over, error)
            return False
        if self.store_away:
            self.store_away = False
            log.warning("the store answers again, after %.1f s", self._clock() - self._away_since_s)
        if lease is None or lease.epoch != self.epoch:
            self.deposed, self._until_s = True, -inf
            return False
        self._until_s = asked_s + self.ttl_s / 2
        return was_over

    def _is_not_renewed(self, asked_s: float, was_over: bool, error: StoreUnavailable) -> None:
        goes_on = self.goes_on and not was_over  # one that stood still may have been replaced
        if not self.store_away:
            self.store_away, self._away_since_s = True, asked_s
            self.outages += 1
            follows = "calls go on without it (on_store_lost)" if goes_on else "without it nothing is granted"
            log.warning("the core's lease cannot be renewed, and %s: %s", follows, error)
        if goes_on:
            self._until_s = max(self._until_s, asked_s + self.ttl_s / 2)

    def met(self, epoch: int) -> None:
        """Note the epoch of a core that a replica knows: behind a greater one this core does not go on."""
        if self.goes_on and self.store_away and self.epoch < epoch and self.holds():
            self._until_s = -inf
            log.error("a replica knows a core of epoch %d; this one of %d goes on no longer", epoch, self.epoch)

    def release(self, holder: str) -> None:
        """Give the lease back for a holder whose process is known to have ended.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self._store.lease(NAME, holder, 0.0)

    def give_up(self) -> None:
        """Let the next core take it at once. Idempotent."""
        if self.epoch and not self.deposed:
            self.deposed, self._until_s = True, -inf
            try:
                self._store.lease(NAME, self.holder, 0.0)
            except StoreUnavailable as error:  # it runs out by itself
                log.warning("the core's lease cannot be given back: %s", error)


class FencedStore(ScopedStore):
    """A store as the core that holds a lease writes to it: not once another one has taken the lease.

    Args:
        store: In which the lease is, too.
        lease: Of the writer.
    """

    def __init__(self, store: Store, lease: CoreLease) -> None:
        super().__init__(store, "")
        self._held = lease

    def put(
        self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None
    ) -> int:
        """Write or delete a value, and return its version (``Store.put``)."""
        return super().put(key, value, expected=expected, fence=fence or Fence(NAME, self._held.epoch))
