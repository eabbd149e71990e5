"""Limits that hold over pools: each core spends within a share of its own, taken ahead of need in the background.

A call is let in by what its core has in hand; it never asks the store. What a core has in hand is never more than its
share in the store (``shares``): a share is lowered here before it is lowered there, and raised here once a write of
this core's has raised it there. So the sum holds whatever is lost: an answer of the store's, or the core itself.

A core that dies keeps its share. The next core of its pool finds there what it spent at most; what its accounts do
not know of counts as spent, for good or until the window has passed. Other pools take a dead one's share of what
comes back by itself, once it had no core for so long that its replicas have ended their requests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from math import inf
from threading import Lock

from orla_lg.core.limits.usage import Bound, Key, UsageAccount
from orla_lg.serve.pools.directory import Directory
from orla_lg.serve.pools.gone import LEASE, LEASE_S, WITHIN, GonePools
from orla_lg.serve.pools.held import EVERY_S, SHORT_S, Footing, HeldSlice, LookAgain, window_s
from orla_lg.serve.pools.shares import (
    AT_ONCE,
    SLICES,
    UNBOUND,
    Shares,
    Sharing,
    bounds,
    fits,
    least,
    packed,
    total,
    unpacked,
)
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.spent import account_name
from orla_lg.serve.store.store import ABSENT, Conflict, Store, StoreUnavailable

log = logging.getLogger("orla_lg")

COUNT_S = 5.0
"""How often the cores are counted."""

RUN_S = 60.0
"""A run of the core before that has not come here within that is over."""

FORGET_S = 30 * 86_400.0
"""The entry of a run that no core has touched for so long is deleted."""

TRIES = 8


class StoredShares:
    """An account's entry as it was read or written last; without ``shares`` it cannot be read."""

    __slots__ = ("shares", "version")

    def __init__(self, version: int, shares: Shares | None) -> None:
        self.version, self.shares = version, shares


class SliceBook:
    """The slices of one core. Its slices' ``check`` runs in any thread, ``work`` in one at a time.

    Args:
        store: The whole, not the pool's part.
        pool: The core's.
        lock: Of the accounts.
        epoch: Of the core's lease.
        may_take: Whether the core decides, and knows what its replicas hold.
        is_open: Whether a run is open here.
        wake: Called, under the lock, when ``work`` has something to do.
        clock: Monotonic seconds, of the accounts too.
        wall: Seconds since 1970.
        ends_s: After so long without a core all requests of its replicas have ended.
    """

    def __init__(
        self,
        store: Store,
        pool: str,
        *,
        lock: Lock,
        epoch: Callable[[], int],
        may_take: Callable[[], bool] = lambda: True,
        is_open: Callable[[str], bool] = lambda run: True,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        ends_s: float = 15.0,
    ) -> None:
        self.pool, self.wake, self.lock, self.clock = pool, wake, lock, clock
        self.generation = 0
        """Grows when the lease was lost: what is in hand must be confirmed then."""
        self.valid_until_s = -inf
        self.operations = 0
        """Of the store, but for those of ``gone``."""
        self.gone = GonePools(store)
        self._overdrawn = set[str]()
        """Accounts that may exceed their limit because this core stood still, and other pools took its share."""
        self._store, self._epoch, self._ends_s = store, epoch, ends_s
        self._may_take, self._is_open, self._wall = may_take, is_open, wall
        self._active: dict[str, HeldSlice] = {}
        """Those that have something to be looked after, now or at a time."""
        self._entries: dict[str, StoredShares] = {}
        self._runs: dict[str, list[HeldSlice]] = {}
        self._inherited: dict[str, float] | None = None
        """Shares of the core before that this one has not touched, and when they are to be given back."""
        self._cores = 2
        self._lease_epoch = 0
        self._renew_at_s = self._count_at_s = self._runs_at_s = -inf
        self._complained = False

    # From the accounts

    def slice_of(self, run: str, key: Key, bound: Bound, account: UsageAccount) -> HeldSlice | None:
        """Return the slice of a new account; under the lock. ``None`` where other cores have no such account."""
        name = account_name(run, key)
        if name is None or bounds(bound.limit, bound.scope) == UNBOUND:
            return None
        known = self._active.get(name)
        if known is not None:  # its account was forgotten just now
            old, known.account = known.account, account
            account.spent, account.per_s, account.slices = old.spent, old.per_s, old.slices
            account.promised, account.open = old.promised, old.open
            return known
        held = self._active[name] = HeldSlice(self, name, account, is_of_run=bool(run))
        held.under(bound)
        if run:
            self._runs.setdefault(run, []).append(held)
            held.looked_s = self.clock()
            self._entries[name] = StoredShares(ABSENT, {})  # most likely; a write by it fails where that is wrong
        return held

    def want(self, held: HeldSlice, now: float) -> None:
        """Have a slice looked after soon; under the lock."""
        self._active[held.name] = held
        if now >= held.quiet_until_s:
            held.next_s = -inf
            self.wake()

    def may_grant(self) -> bool:
        """Whether calls may go that were let in: not while other pools may have what was promised to them."""
        if self.clock() < self.valid_until_s:
            return not self._overdrawn
        with self.lock:
            return not any(
                held.sharing is not Sharing.FOR_GOOD and held.account.open for held in self._active.values()
            )

    def look_after(self, held: HeldSlice) -> None:
        """Have a slice looked after at the next look; under the lock."""
        self._active[held.name] = held
        held.next_s = -inf

    # In the background

    def work(self) -> None:
        """Look after all slices; waits for the store."""
        if not self._may_take():
            return
        try:
            self._renew()
            self._count()
            self._inherit()
            now = self.clock()
            self._end_runs(now)  # before what they had is given back in vain
            with self.lock:
                due = [held for held in self._active.values() if now >= held.next_s]
            for held in due:
                self._balance(held)
            self._complained = False
        except StoreUnavailable as error:
            if not self._complained:
                self._complained = True
                log.warning("limits over pools go by what is in hand, as the store does not answer: %s", error)

    @property
    def is_busy(self) -> bool:
        """Whether there is something to look after before the lease is to be renewed."""
        return bool(self._active or self._inherited)

    def close(self) -> None:
        """Give back what is free, so that the next core finds its pool's share spent to the last."""
        with self.lock:
            kept = list(self._active.values())
            for held in kept:
                held.used_s = held.wanted_s = held.gained_s = -inf
        try:
            for held in kept if self._may_take() else ():
                self._balance(held)
        except StoreUnavailable as error:  # it counts as spent then
            log.warning("slices of limits cannot be given back: %s", error)
        self.valid_until_s = -inf

    def _renew(self) -> None:
        now = self.clock()
        if now < self._renew_at_s:
            return
        self.operations += 1
        lease = ScopedStore(self._store, self.pool).lease(LEASE, self.pool, LEASE_S)
        if lease is None or (self._lease_epoch and lease.epoch != self._lease_epoch):
            self._begin_anew()
        if lease is not None:
            self._lease_epoch = lease.epoch
            self._renew_at_s, self.valid_until_s = now + LEASE_S / 4, now + LEASE_S * WITHIN

    def _begin_anew(self) -> None:
        """Have everything confirmed: another pool found this one without a core."""
        with self.lock:
            self.generation += 1
            self.valid_until_s = self._renew_at_s = -inf
            self._entries.clear()
            for held in self._active.values():
                held.next_s = -inf
                if held.sharing is not Sharing.FOR_GOOD:
                    self._overdrawn.add(held.name)

    def _count(self) -> None:
        if (now := self.clock()) >= self._count_at_s:
            self.operations += 1
            self._cores = max(2, len(Directory(self._store).cores()))
            self._count_at_s = now + COUNT_S

    # One account

    def _read(self, name: str) -> StoredShares:
        self.operations += 1
        found = self._store.get(SLICES + name)
        return StoredShares(ABSENT, {}) if found is None else StoredShares(found.version, unpacked(name, found.value))

    def _write(self, name: str, shares: Shares | None, entry: StoredShares) -> int:
        self.operations += 1
        return self._store.put(SLICES + name, None if shares is None else packed(shares), expected=entry.version)

    def _footing(self, *, is_fresh: bool) -> Footing:
        return Footing(
            self.pool, self._epoch(), self.generation, self._cores, self.clock(), self._wall(), is_fresh
        )  # fmt: skip

    def _balance(self, held: HeldSlice) -> None:
        """Take what is needed, or give back what is not."""
        with self.lock:
            held.pace(self.clock())
        entry = self._entries.pop(held.name, None)
        for _ in range(TRIES):
            is_fresh = entry is None
            entry = entry or self._read(held.name)
            found = entry.shares
            if found is None:
                with self.lock:  # it may be mended
                    held.next_s = held.quiet_until_s = self.clock() + COUNT_S
                return
            if is_fresh and self._reclaims(held, entry, found):
                entry = None
                continue
            with self.lock:
                try:
                    share = held.next_share(found, self._footing(is_fresh=is_fresh))
                except LookAgain:
                    entry = None
                    continue
                if share is None:
                    self._rest(held, entry, grew=False)
                    return
                held.hand = least(held.hand, share.hand)
                shares = {**found, self.pool: share}
            try:
                version = self._write(held.name, shares, entry)
            except Conflict:
                entry = None
                continue
            with self.lock:
                grew = not fits(share.hand, held.hand)
                held.hand, held.generation, held.wants_since_s = share.hand, self.generation, share.wants_since_s
                held.is_known = True
                self._rest(held, StoredShares(version, shares), grew=grew)
            return

    def _rest(self, held: HeldSlice, entry: StoredShares, *, grew: bool) -> None:
        """Note what a look has come to; under the lock."""
        shares, now = entry.shares or {}, self.clock()
        if held.name in self._overdrawn and (
            not held.account.open or fits(held.bounded(total(each.hand for each in shares.values())), held.limit)
        ):
            self._overdrawn.discard(held.name)
        others = {pool: share for pool, share in shares.items() if pool != self.pool}
        if held.rest(others, now, grew=grew, is_held_back=held.name in self._overdrawn):
            self._active.pop(held.name, None)
        else:
            self._entries[held.name] = entry

    # Runs that end, and what the core before has left

    def _end_runs(self, now: float) -> None:
        if now < self._runs_at_s:
            return
        self._runs_at_s = now + EVERY_S / 2
        with self.lock:
            over = [run for run in self._runs if not self._is_open(run)]
        for run in over:
            for held in self._runs[run]:
                with self.lock:
                    self._active.pop(held.name, None)
                    self._overdrawn.discard(held.name)
                self._end(held.name, self._entries.pop(held.name, None))
            with self.lock:
                del self._runs[run]

    def _end(self, name: str, entry: StoredShares | None = None, *, strikes: bool = False) -> None:
        """Note that a run is over here; the last pool to do so deletes the entry. Or strike the share out."""
        for _ in range(TRIES):
            entry = entry or self._read(name)
            own = None if entry.shares is None else entry.shares.get(self.pool)
            if entry.shares is None or own is None or own.epoch > self._epoch():
                return
            after = dict(entry.shares)
            if strikes:
                del after[self.pool]
            else:
                after[self.pool] = own._replace(at_s=self._wall(), wants_since_s=0.0, is_settled=True, is_over=True)
            try:
                self._write(name, None if all(each.is_over for each in after.values()) else after, entry)
            except Conflict:
                entry = None
                continue
            return

    def _inherit(self) -> None:
        """Give back, when its time has come, what the core before had of accounts that this one has not touched."""
        now = self.clock()
        if self._inherited is None:
            self.operations += 1
            entries = self._store.scan(SLICES)
            self._inherited = {}
            for key, found in entries.items():
                with contextlib.suppress(Conflict):  # another core looks through them too
                    self._find(key.removeprefix(SLICES), unpacked(key, found.value) or {}, found.version, now)
        due = [name for name, due_s in self._inherited.items() if now >= due_s]
        for name in due:
            run, own = _run(name), (self._read(name).shares or {}).get(self.pool)
            with self.lock:
                untouched = own is not None and own.epoch < self._epoch() and name not in self._active
            if untouched and not (run and self._is_open(run)):
                self._end(name, strikes=not run)
            del self._inherited[name]

    def _find(self, name: str, shares: Shares, version: int, now: float) -> None:
        assert self._inherited is not None
        try:
            run, own = _run(name), shares.get(self.pool)
        except (ValueError, TypeError, LookupError):  # of no account that this version knows
            return
        if run and shares and all(self._wall() - each.at_s > FORGET_S for each in shares.values()):
            self._write(name, None, StoredShares(version, shares))
        elif own is not None and own.epoch < self._epoch() and (run or own.back_s >= 0):
            self._inherited[name] = now + (RUN_S if run else window_s(own.back_s))

    # Pools without a core

    def _reclaims(self, held: HeldSlice, entry: StoredShares, shares: Shares) -> bool:
        """Strike out the shares of dead pools, of what comes back by itself; returns whether the entry may differ."""
        now = self.clock()
        if held.sharing is Sharing.FOR_GOOD or now - held.wanted_s >= SHORT_S:
            return False
        # The entry was read before: a core that comes back in between writes it, and then this write fails.
        ends_s = self._ends_s + (0.0 if held.per_s is None else window_s(held.per_s))
        over = [pool for pool in shares if pool != self.pool and self.gone.gone_for_s(pool, now) >= ends_s]
        if not over:
            return False
        try:
            self._write(held.name, {pool: share for pool, share in shares.items() if pool not in over}, entry)
        except Conflict:
            log.debug("a pool that had no core has one again")
        return True


def _run(name: str) -> str:
    """Return the run that an account is of; empty: of none."""
    return "" if name.startswith(AT_ONCE) else str(json.loads(name)[0])
