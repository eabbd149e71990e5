"""What speaks against a prefetch: what others do on the engine, and what calls did not find there."""

from __future__ import annotations

from math import inf
from types import SimpleNamespace
from typing import Any

import pytest

from orla_lg.core.cache.verification import ExpectedTokens, OrderBook
from orla_lg.core.call import Ask
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.speed import NO_SPEED, Speed, SpeedMeter
from orla_lg.core.prefetch.book import PrefetchBook, SkipReason, WarmUp
from orla_lg.core.prefetch.prompts import Prompt
from orla_lg.core.prefetch.value import PrefetchRequest, PrefetchValue

PROMPT = Prompt("c", "g", "s", Ask("m", []), {}, chars=4000, tokens=1000)
REQUEST = PrefetchRequest("w", None, 1.0, inf)


class Engine:
    """A scheduler as far as prefetches see it: an engine for ten calls, with so much of the prompt believed there."""

    def __init__(self, missing: float, in_flight: int = 0) -> None:
        self.orders = OrderBook()
        self.queue = SimpleNamespace(
            paused=False, may_grant=None, waiting=0, in_flight=in_flight, engine_takes=inf, max_concurrency=10
        )
        self.cache = SimpleNamespace(
            prefetches_alone=False, missing=lambda workflow, ask, tokens: missing, evicts=lambda *about: 0.0
        )
        self.health = SimpleNamespace(
            can=lambda capability: True, state=lambda: Circuit.CLOSED, probe=SimpleNamespace(incarnation="1")
        )
        self.speed_meter = SpeedMeter()
        self.speed_meter.speed = Speed(prefill_tokens_per_s=1000.0)

    def why_not(self, load: EngineStats | None = None, request: PrefetchRequest = REQUEST) -> SkipReason | None:
        fake: Any = self
        return PrefetchValue(fake, lambda: 0.0, WarmUp(), PrefetchBook()).why_not(request, PROMPT, load)


def test_what_calls_did_not_find_is_taken_to_be_gone() -> None:
    engine = Engine(missing=0.0)
    assert engine.why_not() is SkipReason.THERE
    for expected, found in ((1000, 900), (100, 0)):  # by less than blocks explain, or of too little to tell
        engine.orders.judge(ExpectedTokens(expected, 0, None, None), found)
    assert engine.orders.lost_share == 0.0
    engine.orders.judge(ExpectedTokens(1000, 0, None, None), 100)
    assert engine.orders.lost_share == pytest.approx(0.18) and engine.why_not() is SkipReason.THERE
    engine.orders.judge(ExpectedTokens(1000, 0, None, None), 100)
    assert engine.orders.lost_share == pytest.approx(0.324) and engine.why_not() is None
    for _ in range(5):
        engine.orders.judge(ExpectedTokens(1000, 0, None, None), 1000)
    assert engine.why_not() is SkipReason.THERE, "what is found again counts"


def test_calls_of_others_are_held_up_too() -> None:
    assert Engine(missing=1000.0).why_not() is None
    assert Engine(missing=1000.0).why_not(EngineStats(running=0)) is None
    assert Engine(missing=1000.0).why_not(EngineStats(running=4)) is SkipReason.NOT_WORTH
    assert Engine(missing=1000.0, in_flight=2).why_not(EngineStats(running=2)) is None, "these are our own"


def test_a_fast_engine_prefills_split_prompts_in_short_waits_though_it_reports_no_timings() -> None:
    engine, wait = Engine(missing=1000.0), PrefetchRequest("w", ("g", "s"), 1.0, 0.5, next_of="c")
    engine.speed_meter.speed = NO_SPEED
    assert engine.why_not(request=wait) is SkipReason.SHORT_WAIT, "1,000 tokens a second are assumed"
    for fresh, completion in [(800, 60), (1500, 120), (3000, 60), (1500, 60), (4500, 180), (7500, 60)]:
        seconds = fresh / 4000 + completion / 30
        engine.speed_meter.note(service_s=seconds, prefill_s=None, fresh_tokens=fresh, completion_tokens=completion)
    assert engine.why_not(request=wait) is None
