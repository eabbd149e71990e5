"""Orders to an engine's cache, their effects, and whether the next call verified them.

The effect that an engine reports is verified by ``cached_tokens`` of the workflow's next call alone: after a flush it
should find only what other workflows share, after a pin or a restore all that was expected to be there. So every call
of a workflow opens an ``OrderLog`` on its backend: the orders that follow it, and then the verification by the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf
from typing import NamedTuple

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.boundary.complete import complete
from orla_lg.core.engine.backend import Effect
from orla_lg.core.memory.events import Verb
from orla_lg.core.memory.verbs import VERBS

KEEP_TRAILS = 20_000
"""Workflows with a last call remembered on a backend; the next call of a forgotten one is not verified."""

KEEP_ORDERS = 8
"""So many orders are kept in one log, the newest."""

SLACK_TOKENS = 160
SLACK = 0.1
"""Engines cache whole blocks (of 16 to 128 tokens) and compute the last token anyway: so much contradicts nothing.
``HitCheck`` allows one block only, since it corrects what is believed of each piece; a refuted effect is reported to
users, and must be sure."""

LATELY = 0.2
"""Weight of the newest prompt in ``lost_share``."""

WHOLE = 0.5
"""Less than this part of the tokens expected in a slot or a file is a loss and no wrong estimate: they are estimates
where the engine did not count, and after calls that broke off."""


class Finds(Enum):
    """What the next call should find of what was believed to be there when it was asked for."""

    ALL = "all"
    SHARED = "shared"
    """Only what other workflows have too."""
    ANY = "any"
    """Some, or nothing: the engine is free to take it."""
    AS_BEFORE = "as before"
    """The effect says nothing of it; the one before still does."""


_AFTER: Mapping[Effect, Finds] = complete(
    Effect,
    {
        Effect.FREED: Finds.SHARED,
        Effect.DEMOTED: Finds.ANY,
        Effect.PINNED: Finds.ALL,
        Effect.SAVED: Finds.ALL,
        Effect.RESTORED: Finds.ALL,
        Effect.WARMED: Finds.ALL,
        Effect.DEFERRED: Finds.AS_BEFORE,
        Effect.FAILED: Finds.AS_BEFORE,
        Effect.UNSUPPORTED: Finds.AS_BEFORE,
        Effect.UNKNOWN: Finds.AS_BEFORE,
    },
    "_AFTER in orla_lg.core.cache.verification",
)
"""By effect; a new one gets an entry here."""

_FINDS: Mapping[Effect | None, Finds] = dict([(None, Finds.ALL), *_AFTER.items()])
"""Where nothing was asked, all should just be there."""


@dataclass(frozen=True, slots=True)
class Order:
    """One order to an engine, and its effect."""

    verb: Verb
    effect: Effect
    until_s: float = inf
    """Monotonic seconds after which the effect promises nothing more: a pin ends by itself."""

    def __str__(self) -> str:
        return _NAMES[self.verb, self.effect]


_NAMES = {(verb, effect): f"{verb}:{effect}" for verb in Verb for effect in Effect}


@dataclass(eq=False, slots=True)
class OrderLog:
    """What followed a workflow's last call on one backend."""

    call_id: str
    orders: list[Order] = field(default_factory=list)
    last_verb: Verb | None = None
    """The last order; it is not repeated while nothing happened since."""
    waits: int = 0
    """Orders on their way to the engine."""


class ExpectedTokens(NamedTuple):
    """What a call should find when it goes."""

    tokens: int
    """So much of its prompt is believed to be in the cache."""
    shared_tokens: int
    """So many of ``tokens`` other workflows have too: no flush of this one takes them away."""
    after: str | None
    """The call before, after which the orders came."""
    effect: Effect | None
    """The last effect reported; ``None`` where nothing was asked, so that it should just be there."""


class Verification(NamedTuple):
    """What a call's ``cached_tokens`` say of the tokens expected."""

    expected: ExpectedTokens
    cached_tokens: int | None
    """``None`` where the engine did not count."""
    borne_out: bool | None
    """``None`` where nothing was promised, too little to tell, or nothing counted."""


@dataclass(frozen=True, slots=True)
class VerificationCounts:
    """Expected against verified tokens, at one moment."""

    claimed_tokens: int
    """Of all prompts that engines count, what was expected to be in the cache."""
    verified_tokens: int
    """How many of ``claimed_tokens`` the engines found."""
    borne_out: dict[str, int]
    """By effect (``kept`` where nothing was asked), how often the next call found what was promised."""
    refuted: dict[str, int]
    """By effect, how often it did not."""


def judge(expected: ExpectedTokens, cached_tokens: int | None) -> Verification:
    """Compare the tokens expected with what a call found."""
    if cached_tokens is None:
        return Verification(expected, None, None)
    slack = max(SLACK_TOKENS, SLACK * expected.tokens)
    borne_out: bool | None = None
    finds = _FINDS[expected.effect]
    if finds is Finds.SHARED:
        borne_out = cached_tokens <= expected.shared_tokens + slack
    elif finds is Finds.ALL and expected.tokens > slack:  # of less, nothing at all could be missing
        borne_out = cached_tokens >= expected.tokens - slack
    return Verification(expected, cached_tokens, borne_out)


def recomputed(expected_tokens: int, cached_tokens: int) -> bool:
    """Whether a call found so little of what its slot was expected to hold that its prompt was computed again."""
    return cached_tokens == 0 or cached_tokens < WHOLE * expected_tokens


class OrderBook:
    """The order logs of one backend. Under the backend's lock."""

    def __init__(self) -> None:
        self.order_logs = BoundedDict[str, OrderLog](KEEP_TRAILS)
        self.counts: Counter[str] = Counter()
        """Per ``verb:effect``, and ``linger:effect``, how often."""
        self.news: list[tuple[str, Order]] = []
        """Orders with their calls that the records do not have yet; taken under the lock."""
        self.lost_share = 0.0
        """Which part of what was expected prompts did not find lately: others may use the engine too."""
        self._claimed_tokens = 0
        self._verified_tokens = 0
        self._borne_out: Counter[str] = Counter()
        self._refuted: Counter[str] = Counter()

    def called(self, workflow: str, call_id: str) -> None:
        """Note that a call of a workflow reached the engine: what follows is in its log."""
        self.order_logs.set(workflow, OrderLog(call_id))

    def asks(self, workflow: str, verb: Verb) -> OrderLog | None:
        """Open an order; ``None`` if the engine has seen nothing of the workflow, or the last order was the same."""
        order_log = self.order_logs.get(workflow)
        if order_log is None or (order_log.last_verb is verb and not VERBS[verb].repeats):
            return None
        order_log.last_verb = verb
        order_log.waits += 1
        return order_log

    def answered(self, order_log: OrderLog, order: Order) -> None:
        """Note what came of an order that was on its way."""
        order_log.waits -= 1
        self.note(order, order_log)

    def note(self, order: Order, order_log: OrderLog | None = None) -> None:
        """Count an order's effect, and keep it in the log of the call that it followed."""
        self.counts[str(order)] += 1
        if order_log is not None:
            order_log.orders = [*order_log.orders[-KEEP_ORDERS + 1 :], order]
            self.news.append((order_log.call_id, order))

    def take_news(self) -> list[tuple[str, Order]]:
        """Return the orders that the records do not have yet, once."""
        news, self.news = self.news, []
        return news

    def lingers(self, effect: Effect) -> None:
        """Count the effect of an order on how long a model stays, which says nothing of a cache."""
        self.counts[f"linger:{effect}"] += 1

    def claim(self, workflow: str, tokens: int, shared_tokens: int, now: float) -> ExpectedTokens:
        """Return what a call that goes now should find."""
        order_log = self.order_logs.get(workflow)
        if order_log is None:
            return ExpectedTokens(tokens, shared_tokens, None, None)
        effects = [
            order.effect
            for order in order_log.orders
            if now < order.until_s and _FINDS[order.effect] is not Finds.AS_BEFORE
        ]
        return ExpectedTokens(tokens, shared_tokens, order_log.call_id, effects[-1] if effects else None)

    def judge(self, expected: ExpectedTokens, cached_tokens: int | None) -> Verification:
        """Compare the tokens expected with what the call found, and count the outcome."""
        verdict = judge(expected, cached_tokens)
        if cached_tokens is not None and _FINDS[expected.effect] is not Finds.SHARED:
            self._claimed_tokens += expected.tokens
            self._verified_tokens += min(expected.tokens, cached_tokens)
        if verdict.borne_out is not None:
            if cached_tokens is not None and _FINDS[expected.effect] is not Finds.SHARED:
                self.found(expected.tokens, cached_tokens)
            counter = self._borne_out if verdict.borne_out else self._refuted
            counter["kept" if expected.effect is None else str(expected.effect)] += 1
        return verdict

    def found(self, expected_tokens: float, cached_tokens: int) -> None:
        """Note what a prompt found of what was expected of it in the cache."""
        missed = expected_tokens - cached_tokens
        lost = missed / expected_tokens if missed > max(SLACK_TOKENS, SLACK * expected_tokens) else 0.0
        self.lost_share += LATELY * (lost - self.lost_share)

    def forget(self, workflow: str) -> OrderLog | None:
        """Forget a workflow that will not come back; returns its log, to which orders may still be added."""
        return self.order_logs.pop(workflow)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        assert len(self.order_logs) <= KEEP_TRAILS
        for order_log in self.order_logs.values():
            assert len(order_log.orders) <= KEEP_ORDERS and order_log.waits >= 0, order_log
            assert order_log.last_verb is not None or not order_log.waits, (
                f"nothing was asked, and yet waits: {order_log}"
            )
        assert 0 <= self._verified_tokens <= self._claimed_tokens

    def truth(self) -> VerificationCounts:
        """Return a snapshot."""
        return VerificationCounts(
            self._claimed_tokens, self._verified_tokens, dict(self._borne_out), dict(self._refuted)
        )
