"""What calls spend, and the accounts that limits are kept by: what is spent, when, and what is promised."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from enum import StrEnum
from operator import attrgetter
from typing import Protocol

from orla_lg.core.boundary.complete import complete
from orla_lg.core.call import CHARS_PER_TOKEN, Assignment, Call, Usage
from orla_lg.core.engine.backend import Cost, price
from orla_lg.core.limits.limits import FIGURES, SECOND_DIGITS, USD_DIGITS, Limit
from orla_lg.errors import BudgetExceeded

SLICES = 60
"""A window slides in so many steps. What is old leaves up to one step late, never early."""


@dataclass(frozen=True, slots=True)
class Amount:
    """What one call uses, or many together.

    Sums are rounded far below any price, so that what is given back is exactly what was taken. They are written out,
    as each call under a limit makes some; a test holds them to ``FIGURES``.
    """

    calls: int = 0
    tokens: int = 0
    """Prompt, with what was cached, and answer."""
    cost_usd: float = 0.0
    wall_s: float = 0.0
    """Seconds that engines worked on it, calls side by side added up."""

    def plus(self, other: Amount) -> Amount:
        """Return the sum."""
        return Amount(
            self.calls + other.calls,
            self.tokens + other.tokens,
            round(self.cost_usd + other.cost_usd, USD_DIGITS),
            round(self.wall_s + other.wall_s, SECOND_DIGITS),
        )

    def minus(self, other: Amount) -> Amount:
        """Return the difference."""
        return self.plus(Amount(-other.calls, -other.tokens, -other.cost_usd, -other.wall_s))


complete(FIGURES, {each.name: each for each in fields(Amount)}, "Amount, by its fields,")

figures_of: Callable[[Amount], tuple[float, ...]] = attrgetter(*FIGURES)
"""Return an amount's numbers, in the order of ``FIGURES`` and of its own fields."""

NOTHING = Amount()

UNKNOWN_SERVICE_S = 1e-6
"""Of a stage that was never served: next to nothing, yet more than is left where all is spent."""


def expected(call: Call, assignment: Assignment, cost: Cost, service_s: float | None) -> Amount:
    """Return what *call* is expected to use where it is assigned, as if nothing of its prompt were cached.

    Args:
        call: Its answer is taken to be as long as its stage's usually are, within its ``max_tokens``.
        assignment: Its parameters may set ``max_tokens``.
        cost: The backend's prices.
        service_s: Seconds that an engine usually works on a call of the stage; ``None`` while that is not known.
    """
    bound = call.ask.given(assignment.parameters).max_tokens
    answer = call.answer_tokens if bound is None else min(call.answer_tokens, bound)
    usage = Usage(call.ask.prompt_chars // CHARS_PER_TOKEN + 1, None, round(answer))
    return used(usage, cost, service_s or UNKNOWN_SERVICE_S)


def used(usage: Usage, cost: Cost, service_s: float) -> Amount:
    """Return what one call used."""
    tokens = usage.prompt_tokens + usage.completion_tokens
    return NOTHING.plus(Amount(calls=1, tokens=tokens, cost_usd=price(usage, cost) or 0.0, wall_s=service_s))


class SliceSpent(Exception):
    """What this core holds of a limit that several cores share does not suffice; more may come.

    Args:
        fault: What the call ends with if no more comes.
        refilled: Done when more has come.
    """

    def __init__(self, fault: BudgetExceeded, refilled: Future[None]) -> None:
        super().__init__(str(fault))
        self.fault, self.refilled = fault, refilled


class AccountSlice(Protocol):
    """What one core may spend of an account whose limit several cores share (``serve.pools.slices``)."""

    def check(self, bound: Bound, asked: Amount, now: float) -> None:
        """Refuse a call that does not fit; called under the lock of the account's book.

        Raises:
            SliceSpent: It may fit soon.
            BudgetExceeded: It will not.
        """
        ...


@dataclass(eq=False, slots=True)
class UsageAccount:
    """One limit's sums. Plain state: the lock of its book guards it.

    ``promised`` is the sum of what ``open`` calls under way may still use. ``spent`` is the sum of ``slices`` where
    there is a window, and what was ever spent where there is none.
    """

    promised: Amount = NOTHING
    open: int = 0
    spent: Amount = NOTHING
    refused: int = 0
    """Calls turned away since the account was opened."""
    per_s: float | None = None
    """The window's length; ``None``: no window."""
    slices: deque[tuple[float, Amount]] = field(default_factory=deque)
    """What calls used that ended from then on, oldest first; each of one step of the window."""
    slice: AccountSlice | None = None
    """``None``: this core alone keeps the limit."""

    @property
    def total(self) -> Amount:
        """Spent and promised."""
        return self.spent.plus(self.promised)

    def look(self, per_s: float | None, now: float) -> None:
        """Let go what the window has left behind; another window than before begins empty."""
        if per_s != self.per_s:
            self.per_s, self.spent = per_s, NOTHING
            self.slices.clear()
        while self.slices and self._leaves_s(self.slices[0][0]) <= now:
            self.spent = self.spent.minus(self.slices.popleft()[1])

    def _leaves_s(self, begun_s: float) -> float:
        """Return when the last that may be in a slice is out of the window."""
        assert self.per_s is not None, "slices belong to a window"
        return begun_s + self.per_s * (1 + 1 / SLICES)

    def promise(self, amount: Amount) -> None:
        """Set *amount* aside for a call."""
        self.promised, self.open = self.promised.plus(amount), self.open + 1

    def settle(self, promised: Amount, spent: Amount, now: float) -> None:
        """Take a promise back, and book what was used in its place."""
        self.promised, self.open = self.promised.minus(promised), self.open - 1
        self.spent = self.spent.plus(spent)
        if self.per_s is None or spent == NOTHING:
            return
        begun_s, amount = self.slices[-1] if self.slices else (now, NOTHING)
        if self.slices and now < begun_s + self.per_s / SLICES:
            self.slices[-1] = (begun_s, amount.plus(spent))
        else:
            self.slices.append((now, spent))

    def room_in_s(self, figure: str, asked: float, bound: float, now: float) -> float | None:
        """Return after how many seconds *asked* will fit; ``None`` if time alone does not make room.

        Args:
            figure: ``calls``, ``tokens``, ``cost_usd`` or ``wall_s``.
            asked: What one more call needs of it.
            bound: The limit.
            now: Monotonic seconds.
        """
        total: float = getattr(self.total, figure)
        for begun_s, amount in self.slices:
            total = round(total - getattr(amount, figure), 12)
            if total + asked <= bound:
                return self._leaves_s(begun_s) - now
        return None

    def check_integrity(self) -> None:
        """Assert the invariants."""
        assert self.open >= 0 and (self.open or self.promised == NOTHING), self
        if self.per_s is not None:
            together = NOTHING
            for _, amount in self.slices:
                together = together.plus(amount)
            assert together == self.spent, self


class Scope(StrEnum):
    """What a limit is for."""

    RUN = "run"
    STAGE = "stage"
    TENANT = "tenant"
    KEY = "key"
    """All calls of a layer together."""


@dataclass(frozen=True, slots=True)
class Bound:
    """One limit that a call is under."""

    scope: Scope
    name: str
    """The run's id, the stage, the tenant, the key's name."""
    limit: Limit
    where: str = ""
    entry: str = ""
    """What the limit is found by, of several stages or tenants."""

    def exceeded(self, figure: str, why: str, retry_after_s: float | None = None) -> BudgetExceeded:
        """Return the error that names the limit that is spent."""
        bound = FIGURES[figure].format(getattr(self.limit, figure))
        window = f" in any {self.limit.per_s:g} s" if self.limit.per_s is not None else ""
        key = figure if self.scope is Scope.KEY else f"{self._key}.{figure}"
        message = f"{self.scope} {self.name!r} may use {bound}{window} (limits.{key}{self.where}): {why}"
        return BudgetExceeded(
            message, scope=str(self.scope), name=self.name, figure=figure, retry_after_s=retry_after_s
        )

    @property
    def _key(self) -> str:
        return "run" if self.scope is Scope.RUN else f"{self.scope}s.{self.entry or self.name}"


@dataclass(frozen=True, slots=True)
class RunDeadline:
    """The end of the time that a call's run has."""

    until_s: float
    """Monotonic seconds."""
    bound: Bound

    def exceeded(self, now: float, doing: str = "") -> BudgetExceeded:
        """Return the error for a call that comes, or still waits, when the time is over."""
        assert self.bound.limit.wall_s is not None
        gone = now - self.until_s + self.bound.limit.wall_s
        return self.bound.exceeded("wall_s", f"it began {gone:.3f} s ago{doing}; raise the limit, or begin a new run")


Key = tuple[Hashable, Scope, str]
"""The layer's key, the scope, and the name in it."""


Accounts = MutableMapping[Key, tuple[Bound, UsageAccount]]
