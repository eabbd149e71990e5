"""What one core has in hand of one account, and how much of it the core is to have next."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from orla_lg.core.limits.limits import FIGURES, Limit
from orla_lg.core.limits.usage import SLICES as STEPS
from orla_lg.core.limits.usage import Amount, Bound, SliceSpent, UsageAccount, figures_of
from orla_lg.errors import BudgetExceeded
from orla_lg.serve.pools.shares import (
    NONE,
    UNBOUND,
    Figures,
    Share,
    Shares,
    Sharing,
    bounds,
    fits,
    free_of,
    least,
    minus,
    most,
    plus,
    times,
    total,
)

EVERY_S = 0.2
"""How often a slice is looked after that is in use, or wanted."""

IDLE_S = 0.3
"""What was not used for so long is given back."""

TURN_S = 0.5
"""What was taken is kept so long at least, although another pool wants it."""

SHORT_S = 1.0
"""A limit of which nothing could be had for so long counts as spent."""

LOOK_S = 1.0
"""How often is seen what other pools want, and how much this one uses."""

SAY_AGAIN_S = 1.0
"""How often a pool says again that it wants more."""

RUN_CALLS, RUN_CORES = 8, 2
"""Of a run: it has few calls, mostly in one pool, so its first slice is to last."""

MOST_CALLS = 1 << 20


@dataclass(frozen=True, slots=True)
class Footing:
    """What a core stands on when it looks after a slice."""

    pool: str
    epoch: int
    generation: int
    cores: int
    now: float
    """Monotonic."""
    wall_s: float
    is_fresh: bool
    """The entry was read for this look."""


class SliceKeeping(Protocol):
    """What a slice needs of its book (``slices.SliceBook``)."""

    generation: int
    valid_until_s: float

    def want(self, held: HeldSlice, now: float) -> None:
        """Have a slice looked after soon."""
        ...


class LookAgain(Exception):
    """The entry is to be read before anything is decided by it."""


@dataclass(eq=False)
class HeldSlice:
    """A slice of one account. The lock of the accounts' book guards it.

    ``hand`` is at most what the pool's share says in the store; spent, promised and ``lost`` are within it, but for
    answers that turned out longer than was expected.
    """

    book: SliceKeeping
    name: str
    account: UsageAccount
    is_at_once: bool = False
    is_of_run: bool = False
    limit: Figures = UNBOUND
    per_s: float | None = None
    hand: Figures = NONE
    lost: Figures = NONE
    """What a core before this one may have spent that its accounts do not know of."""
    lost_until_s: float = inf
    cap: Figures | None = None
    """No more is promised while another pool waits for its turn."""
    worth: Figures = NONE
    """What one call needs, the most since the last look."""
    calls: int = 1
    """So many calls' worth is taken at once."""
    count: int = 0
    """Calls let in since the last look."""
    waiting: int = 0
    """Calls that found too little since the last was taken."""
    generation: int = -1
    """In which the share was confirmed in the store; another one than the book's: not yet."""
    is_known: bool = False
    is_low: bool = False
    used_s: float = -inf
    wanted_s: float = -inf
    gained_s: float = -inf
    looked_s: float = -inf
    short_since_s: float = inf
    dry_until_s: float = -inf
    """Until then calls are refused at once."""
    quiet_until_s: float = -inf
    """Until then another look would find what the last one has found."""
    next_s: float = -inf
    """When to look again."""
    wants_since_s: float = 0.0
    """By the wall clock; 0: it wants nothing."""
    refilled: Future[None] = field(default_factory=Future)
    _limit: Limit | None = None

    def __post_init__(self) -> None:
        if self.is_of_run:
            self.calls = RUN_CALLS

    def under(self, bound: Bound) -> None:
        """Take note of the limit."""
        if bound.limit is not self._limit:
            self._limit, self.limit, self.per_s = bound.limit, bounds(bound.limit, bound.scope), bound.limit.per_s

    @property
    def sharing(self) -> Sharing:
        """What becomes of what is used."""
        if self.is_at_once:
            return Sharing.AT_ONCE
        return Sharing.FOR_GOOD if self.per_s is None else Sharing.WINDOW

    @property
    def base(self) -> Figures:
        """Return what is spent and promised here, and what may be."""
        return self.bounded(plus(figures_of(self.account.total), self.lost))

    def bounded(self, found: Figures) -> Figures:
        """Return figures without those that are not limited."""
        return tuple(0.0 if bound == inf else each for each, bound in zip(found, self.limit, strict=True))

    def has(self, after: Figures, now: float) -> bool:
        """Whether so much in all is in hand: for good, or for as long as no other pool can have taken it back."""
        is_kept = now < self.book.valid_until_s or self.sharing is Sharing.FOR_GOOD
        if self.generation != self.book.generation or not is_kept:
            return False
        after = self.bounded(after)
        return fits(after, self.hand) and (self.cap is None or fits(after, self.cap))

    def check(self, bound: Bound, asked: Amount, now: float) -> None:
        """Refuse a call that is not in hand (``usage.AccountSlice``).

        Raises:
            SliceSpent: It may be soon.
            BudgetExceeded: It will not.
        """
        self.under(bound)
        if self.limit == UNBOUND:
            return
        need, self.used_s = figures_of(asked), now
        after = plus(plus(figures_of(self.account.total), self.lost), need)
        self.worth = most(self.worth, need)
        if self.has(after, now):
            self.count += 1
            if not self.has(plus(after, times(self.worth, (self.calls + 1) // 2)), now):
                self.is_low = True
                self.book.want(self, now)
            elif self.next_s > now + LOOK_S:
                self.next_s = now + LOOK_S
            return
        self.wanted_s, self.waiting = now, self.waiting + 1
        self.book.want(self, now)
        fault = self._fault(bound, after)
        if now < self.dry_until_s:
            self.account.refused += 1
            raise fault
        raise SliceSpent(fault, self.refilled)

    def _fault(self, bound: Bound, after: Figures) -> BudgetExceeded:
        lacks = [a > h for a, h in zip(self.bounded(after), self.hand, strict=True)]
        figure = next((name for name, each in zip(FIGURES, lacks, strict=True) if each), "calls")
        here = FIGURES[figure].format(getattr(self.account.total, figure))
        waits = self.sharing is not Sharing.FOR_GOOD
        right = "try again in a second" if waits else "raise the limit, or give it a window (per_s)"
        why = f"{here} spent and promised in this pool, and what is left is with other pools' cores; {right}"
        return bound.exceeded(figure, why, SHORT_S if waits else None)

    def notify(self) -> None:
        """Let the calls look again that wait for a slice."""
        refilled, self.refilled, self.waiting = self.refilled, Future(), 0
        refilled.set_result(None)

    # What it is to have

    def pace(self, now: float) -> None:
        """Take more at once where the last slice did not last."""
        if self.is_short(now) and now - self.gained_s < LOOK_S:
            self.calls = min(MOST_CALLS, self.calls * 2)

    def is_wanted(self, now: float) -> bool:
        """Whether a call found too little just now."""
        return now - self.wanted_s < SHORT_S

    def is_short(self, now: float) -> bool:
        """Whether there is too little in hand, or soon will be."""
        return self.is_low or self.is_wanted(now)

    def next_share(self, shares: Shares, footing: Footing) -> Share | None:
        """Return the share that this pool is to have; ``None``: as it is.

        Raises:
            LookAgain: What the entry says may be out of date, and matters.
        """
        now, own = footing.now, shares.get(footing.pool)
        if own is not None and own.epoch > footing.epoch:  # another core decides for the pool
            return None
        self.account.look(self.per_s, now)
        self._inherit(own, footing)
        base = self.base
        others = [share for pool, share in shares.items() if pool != footing.pool]
        taken = self.bounded(total(each.hand for each in others))
        in_use, wanted = now - self.used_s < IDLE_S or now - self.gained_s < TURN_S, self.is_wanted(now)
        if in_use and now - self.looked_s >= LOOK_S:
            self._look(footing)
        ahead = [
            each.wants for each in others
            if each.is_wanting(footing.wall_s) and each.wants_since_s < (self.wants_since_s or inf)
        ]  # fmt: skip
        room, theirs = minus(minus(self.limit, taken), base), self.bounded(total(ahead))
        yields = bool(ahead) and now - self.gained_s >= TURN_S
        self.cap = None
        if yields and self.sharing is not Sharing.FOR_GOOD:
            self.cap = most(NONE, minus(minus(self.limit, taken), theirs))
        free, worth = NONE, self.bounded(self.worth)
        if in_use or wanted:
            cores = RUN_CORES if self.is_of_run else footing.cores
            free = free_of(minus(room, theirs), worth, max(self.calls, self.waiting), cores)
            if not yields:
                free = most(free, self.bounded(least(minus(self.hand, base), room)))
            if self.is_short(now) and not fits(worth, free) and not footing.is_fresh:
                raise LookAgain
        hand = self.bounded(plus(base, most(NONE, free)))
        return self._changed(own, hand, footing, keeps=in_use and not yields and not self.is_short(now))

    def _look(self, footing: Footing) -> None:
        if not footing.is_fresh:
            raise LookAgain
        self.looked_s = footing.now
        if not self.is_short(footing.now):
            self.calls = max(RUN_CALLS if self.is_of_run else 1, min(self.calls, 2 * self.count))
            self.worth = NONE
        self.count = 0

    def _inherit(self, own: Share | None, footing: Footing) -> None:
        """Count as spent what the pool's share says and the account does not know of."""
        now = footing.now
        if not self.is_known and (footing.is_fresh or own is not None):
            self.is_known = True
            if own is not None and not self.is_at_once:
                self.lost = most(NONE, minus(self.bounded(own.hand), self.base))
                self.lost_until_s = inf if self.per_s is None else now + window_s(self.per_s)
        if now >= self.lost_until_s:
            self.lost, self.lost_until_s = NONE, inf

    def _changed(self, own: Share | None, hand: Figures, footing: Footing, *, keeps: bool) -> Share | None:
        """Return a share with so much in hand, if that is worth a write."""
        base, worth = self.base, self.bounded(self.worth)
        lacks = self.is_wanted(footing.now) and not fits(plus(base, worth), hand)
        since_s = (self.wants_since_s or footing.wall_s) if lacks else 0.0
        settled = self.sharing is Sharing.FOR_GOOD and not self.account.open and hand == base
        back_s = 0.0 if self.is_at_once else -1.0 if self.per_s is None else self.per_s
        share = Share(
            footing.epoch, hand, worth if lacks else NONE, since_s, footing.wall_s, settled, back_s=back_s
        )  # fmt: skip
        if own is None:
            return share if hand != NONE or lacks else None
        if self.generation != footing.generation or own.epoch != footing.epoch or own.hand != self.hand:
            return share  # not confirmed
        if bool(own.wants_since_s) != lacks or (lacks and footing.wall_s - own.at_s >= SAY_AGAIN_S):
            return share
        if keeps and fits(base, own.hand):
            return None
        return None if (own.hand, own.is_settled) == (hand, settled) else share

    # When to look again

    def rest(self, others: Shares, now: float, *, grew: bool, is_held_back: bool) -> bool:
        """Note what a look has come to; returns whether there is nothing to look after any more."""
        self.is_low = False
        if grew:
            self.gained_s = now
        ready = self.has(plus(self.base, self.worth), now)
        wanted = self.is_wanted(now)
        self.quiet_until_s = -inf
        if ready:
            self.short_since_s, self.dry_until_s = inf, -inf
            if wanted:
                self.wanted_s = -inf
                self.notify()
            if now - self.gained_s >= EVERY_S:
                self.quiet_until_s = now + EVERY_S / 2
        elif wanted:
            self.short_since_s, self.quiet_until_s = min(self.short_since_s, now), now + EVERY_S
            spent = self.sharing is Sharing.FOR_GOOD and all(each.is_settled for each in others.values())
            if spent or now - self.short_since_s >= SHORT_S:
                self.dry_until_s = now + 2 * EVERY_S
                self.notify()
        else:
            self.short_since_s, self.waiting = inf, 0
        if wanted or is_held_back or now - self.used_s < IDLE_S or self.hand != self.base or self.wants_since_s:
            self.next_s = now + EVERY_S
            return False
        self.next_s = now + LOOK_S if self.account.open else self.lost_until_s
        if self.per_s is not None and self.account.slices:
            self.next_s = min(self.next_s, self.account.slices[0][0] + window_s(self.per_s))
        return self.next_s == inf


def window_s(per_s: float) -> float:
    """Return after how many seconds what was used is out of a window."""
    return per_s * (1 + 1 / STEPS) + 1e-6
