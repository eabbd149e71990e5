"""Step 3, admit: whether a run, a stage and a tenant may still use what a call is expected to.

What counts is what was spent and what was *promised*: a call that is let in has its expected use set aside until it
ends, so that many calls at once cannot all slip through the last gap. When it ends, what it used takes the place of
what was promised. Every limit that applies must hold: those of the ``Orla``, of the graph, and of the run itself.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol

from orla_lg.core.call import Call
from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.limits.limits import FIGURES, NO_LIMITS, SHARED, Limit, Limits, LimitScope, checked
from orla_lg.core.limits.usage import (
    NOTHING,
    Accounts,
    AccountSlice,
    Amount,
    Bound,
    Key,
    RunDeadline,
    Scope,
    UsageAccount,
)
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.errors import BudgetExceeded

KEEP_ACCOUNTS = 10_000
"""Of stages and tenants; the one not touched longest is forgotten, unless a call of it is under way."""

LOOKS = 8
"""So many accounts are looked at for one to forget; those with calls under way move out of the way."""


@dataclass(eq=False, slots=True)
class BudgetReservation:
    """What was set aside for one call; settled once."""

    amount: Amount
    accounts: tuple[UsageAccount, ...]
    wall: RunDeadline | None = None
    """The tightest of its run's."""
    open: bool = True


@dataclass(frozen=True, slots=True)
class LimitStatistics:
    """One limit at one moment."""

    scope: str
    name: str
    limit: Limit
    where: str
    """Empty for the limits of the ``Orla``."""
    spent: Amount
    promised: Amount
    """To calls under way."""
    refused: int
    """Calls turned away."""


class LimitedRun(Protocol):
    """What limits need of a run (``workflow.RunState``)."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def standing(self) -> RunShare:
        """When it began."""
        ...

    @property
    def accounts(self) -> Accounts:
        """What its own limits are kept by."""
        ...


class LimitBook:
    """All accounts of one ``Orla``, but for those of runs, which the runs themselves keep."""

    def __init__(self, limits: Limits, clock: Callable[[], float], keep: int = KEEP_ACCOUNTS) -> None:
        self._clock = clock
        self._keep = keep
        self._lock = threading.Lock()
        self._shared = LimitScope(checked(limits), SHARED)
        self.concern_all = limits is not NO_LIMITS
        """Whether a call without limits of its own may be under any."""
        self._accounts: OrderedDict[Key, tuple[Bound, UsageAccount]] = OrderedDict()
        self._whole: dict[Key, tuple[Bound, UsageAccount]] = {}
        """Of layers that limit all their calls together; there are as many as keys, and none is forgotten."""
        self.brought = dict[tuple[str, Key], UsageAccount]()
        """By run (empty: none) and key, accounts of a process before this one; the first call under each finds it."""
        self.sliced: Callable[[str, Key, Bound, UsageAccount], AccountSlice | None] | None = None
        """Gives a new account, of a run or of none, its slice of a limit that several cores share; under ``lock``."""

    @property
    def lock(self) -> threading.Lock:
        """Guards all accounts."""
        return self._lock

    @property
    def shared(self) -> Limits:
        """The limits of the ``Orla``; other ones hold for the calls to come, and what is spent stays spent."""
        return self._shared.limits

    @shared.setter
    def shared(self, limits: Limits) -> None:
        self._shared = replace(self._shared, limits=checked(limits))
        self.concern_all = self._shared.limits is not NO_LIMITS

    def promise(
        self,
        call: Call,
        layers: Sequence[LimitScope],
        run: LimitedRun | None,
        asked: Amount,
        held: BudgetReservation | None = None,
        *,
        refuses: bool = True,
    ) -> BudgetReservation:
        """Set *asked* aside under every limit that the call is under, or under none.

        Args:
            call: The call.
            layers: Limits of its graph and its run.
            run: Its run; ``None`` outside any.
            asked: What it is expected to use.
            held: What it was promised for an attempt before; given back first.
            refuses: Whether a limit that is spent turns it away; not a call that is at an engine already.

        Raises:
            BudgetExceeded: A limit does not leave so much; what was held is given back then.
            SliceSpent: This core's slice of a limit does not; it may be tried again.
        """
        with self._lock:
            now = self._clock()
            if held is not None:
                self._settle(held, NOTHING, now)
            due = list(self._due(call, layers, run))
            for bound, account in due if refuses else ():
                if (fault := _fault(bound, account, run, asked, now)) is not None:
                    account.refused += 1
                    raise fault
                if account.slice is not None:
                    account.slice.check(bound, asked, now)
            for _, account in due:
                account.promise(asked)
            walls = [wall for bound, _ in due if (wall := _wall(bound, run)) is not None]
            tightest = min(walls, key=lambda wall: wall.until_s, default=None)
            return BudgetReservation(asked, tuple(account for _, account in due), tightest)

    def settle(self, promise: BudgetReservation, spent: Amount) -> None:
        """Book what a call really used in place of what it was promised. Idempotent."""
        with self._lock:
            self._settle(promise, spent, self._clock())

    def _settle(self, promise: BudgetReservation, spent: Amount, now: float) -> None:
        if promise.open:
            promise.open = False
            for account in promise.accounts:
                account.settle(promise.amount, spent, now)

    def _due(
        self, call: Call, layers: Sequence[LimitScope], run: LimitedRun | None
    ) -> Iterator[tuple[Bound, UsageAccount]]:
        identity, tenant = call.identity, call.hints.tenant
        for layer in (self._shared, *layers):
            if (limit := layer.whole) is not None:
                yield self._account(layer, Bound(Scope.KEY, layer.name, limit, layer.where), self._whole)
            if run is not None and (limit := layer.limits.run) is not None:
                yield self._account(layer, Bound(Scope.RUN, run.id, limit, layer.where), run.accounts, run)
            home = run.accounts if layer.of_run and run is not None else self._accounts
            if (ruling := layer.limits.of_stage(identity.stage)) is not None:
                bound = Bound(Scope.STAGE, ruling.place, ruling.entry, layer.where, ruling.name)
                yield self._account(layer, bound, home, run)
            if tenant and (limit := layer.limits.of_tenant(tenant)) is not None:
                entry = tenant if tenant in layer.limits.tenants else ANY_STAGE
                yield self._account(layer, Bound(Scope.TENANT, tenant, limit, layer.where, entry), home, run)

    def _account(
        self, layer: LimitScope, bound: Bound, home: Accounts, run: LimitedRun | None = None
    ) -> tuple[Bound, UsageAccount]:
        key = (layer.key, bound.scope, bound.name)
        known = home.get(key)
        if known is None and self.brought:
            brought = self.brought.pop(("" if home is self._accounts or run is None else run.id, key), None)
            known = None if brought is None else (bound, brought)
        account = UsageAccount() if known is None else known[1]
        if self.sliced is not None and account.slice is None:
            account.slice = self.sliced("" if home is self._accounts or run is None else run.id, key, bound, account)
        home[key] = (bound, account)
        if home is self._accounts:
            self._accounts.move_to_end(key)
            if len(self._accounts) > self._keep:
                self._forget_one()
        return bound, account

    def _forget_one(self) -> None:
        for key in list(islice(self._accounts, LOOKS)):
            if not self._accounts[key][1].open:
                del self._accounts[key]
                return
            self._accounts.move_to_end(key)

    def spent(self, runs: Sequence[LimitedRun] = ()) -> Iterator[tuple[str, Key, UsageAccount]]:
        """Yield all accounts that something was booked in, with the ids of their runs (empty: none)."""
        with self._lock:
            kept = (*self._accounts.items(), *self._whole.items())
            found = [("", key, account) for key, (_, account) in kept]
            found += [(run.id, key, account) for run in runs for key, (_, account) in list(run.accounts.items())]
        return (each for each in found if each[2].spent != NOTHING or each[2].slices)

    def statistics(self, runs: Sequence[LimitedRun] = ()) -> list[LimitStatistics]:
        """Return how far each limit is used up: of stages and tenants seen lately, and of open *runs*."""
        with self._lock:
            now = self._clock()
            kept = [self._shown(*entry, None, now) for entry in (*self._accounts.items(), *self._whole.items())]
            kept += [self._shown(*entry, run, now) for run in runs for entry in run.accounts.items()]
            return [each for each in kept if each is not None]

    def _shown(
        self, key: Key, entry: tuple[Bound, UsageAccount], run: LimitedRun | None, now: float
    ) -> LimitStatistics | None:
        (bound, account), limit = entry, self._limit_now(key, entry[0])
        if limit is None:
            return None
        account.look(limit.per_s, now)
        spent = account.spent
        if run is not None and bound.scope is Scope.RUN:
            spent = replace(spent, wall_s=now - run.standing.arrived_s)
        return LimitStatistics(
            str(bound.scope), bound.name, limit, bound.where, spent, account.promised, account.refused
        )

    def _limit_now(self, key: Key, last: Bound) -> Limit | None:
        """Return the limit that holds now for an account; those of a layer never change, but for the shared ones."""
        limits = self._shared.limits
        if key[0] != SHARED:
            return last.limit
        if last.scope is Scope.RUN:
            return limits.run
        if last.scope is Scope.TENANT:
            return limits.of_tenant(last.name)
        ruling = limits.of_stage(last.name)
        return None if ruling is None or ruling.place != last.name else ruling.entry

    def check_integrity(self, runs: Sequence[LimitedRun] = ()) -> None:
        """Assert the invariants of all accounts."""
        with self._lock:
            for accounts in (self._accounts, self._whole, *(run.accounts for run in runs)):
                for _, account in accounts.values():
                    account.check_integrity()


def _wall(bound: Bound, run: LimitedRun | None) -> RunDeadline | None:
    if run is None or bound.scope is not Scope.RUN or bound.limit.wall_s is None:
        return None
    return RunDeadline(run.standing.arrived_s + bound.limit.wall_s, bound)


def _fault(
    bound: Bound, account: UsageAccount, run: LimitedRun | None, asked: Amount, now: float
) -> BudgetExceeded | None:
    """Return why *asked* does not fit; ``None`` where it does."""
    account.look(bound.limit.per_s, now)
    if (wall := _wall(bound, run)) is not None and now >= wall.until_s:
        return wall.exceeded(now)
    after = account.total.plus(asked)
    for figure in FIGURES:
        limit: float | None = getattr(bound.limit, figure)
        of_clock = figure == "wall_s" and bound.scope is Scope.RUN
        if limit is not None and not of_clock and getattr(after, figure) > limit:
            return _too_much(bound, account, figure, asked, now)
    return None


def _too_much(bound: Bound, account: UsageAccount, figure: str, asked: Amount, now: float) -> BudgetExceeded:
    limit: float = getattr(bound.limit, figure)
    needs: float = getattr(asked, figure)
    room_in_s = account.room_in_s(figure, needs, limit, now)

    def shown(amount: float) -> str:
        return FIGURES[figure].format(amount)

    why = f"{shown(getattr(account.spent, figure))} spent"
    if account.open:
        why += f", {shown(getattr(account.promised, figure))} promised to {account.open} calls under way"
    if figure != "calls":
        why += f", this call is expected to need {shown(needs)}"
    if room_in_s is not None:
        right = f"there is room in {room_in_s:.1f} s, or raise the limit"
    elif needs > limit:
        right = "bound its answer by max_tokens, or raise the limit" if figure != "calls" else "raise the limit"
    elif bound.scope is Scope.RUN:
        right = "raise the limit, or begin a new run"
    else:
        right = "raise the limit, or give it a window (per_s)" if bound.limit.per_s is None else "try again later"
    return bound.exceeded(figure, f"{why}; {right}", room_in_s)
