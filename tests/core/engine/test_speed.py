"""How fast a backend is, from what its calls showed."""

from __future__ import annotations

from concurrent.futures import Future
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.core.call import Assignment, Usage
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.engine.speed import SpeedMeter
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import _prepare, serve
from tests.core.fakes import Sender, a_serving, new_call, step


class Told(Sender):
    """Brings an answer in one piece, a second after it was sent."""

    def __init__(self, usage: Usage) -> None:
        super().__init__()
        self.usage = usage

    def send(self, inflight: InFlightCall) -> Any:
        inflight.saw(self.usage)
        inflight.services.clock.now += 1.0  # type: ignore[attr-defined]
        return super().send(inflight)


def test_streams_show_prefill_and_decoding() -> None:
    speed_meter = SpeedMeter()
    speed_meter.note(service_s=3.0, prefill_s=1.0, fresh_tokens=500, completion_tokens=21)
    speed = speed_meter.speed
    assert (speed.service_s, speed.prefill_tokens_per_s, speed.decode_tokens_per_s) == (3.0, 500.0, 10.0)


def test_an_engines_own_word_shows_them_too() -> None:
    serving = a_serving()
    steps = serve(new_call(serving), Told(Usage(500, 100, 21, prefill_s=0.5)))
    assert step(steps) == ("answer",)
    speed = serving.schedulers["b"].speed_meter.speed
    assert (speed.prefill_tokens_per_s, speed.decode_tokens_per_s) == (800.0, 40.0)


def test_an_answer_in_one_piece_shows_what_a_token_took_in_all() -> None:
    speed_meter = SpeedMeter()
    speed_meter.note(service_s=0.5, prefill_s=None, fresh_tokens=500, completion_tokens=20)
    assert (speed_meter.speed.prefill_tokens_per_s, speed_meter.speed.decode_tokens_per_s) == (None, 40.0)
    speed_meter.note(service_s=0.5, prefill_s=None, fresh_tokens=None, completion_tokens=None)
    assert speed_meter.speed.decode_tokens_per_s == 40.0


class AfterSwap(Told):
    """Streams an answer: a swap of four seconds, a second of prefill, a second of decoding."""

    def send(self, inflight: InFlightCall) -> Any:
        clock: Any = inflight.services.clock
        clock.now += 4.0
        inflight.swap_s = 4.0
        clock.now += 1.0
        inflight.first_token()
        return super().send(inflight)


@pytest.mark.parametrize("said_s", [None, 1.0])
def test_the_swap_of_a_slot_is_no_prefill(said_s: float | None) -> None:
    serving = a_serving()
    assert step(serve(new_call(serving), AfterSwap(Usage(1000, 0, 31, prefill_s=said_s)))) == ("answer",)
    speed = serving.schedulers["b"].speed_meter.speed
    assert (speed.prefill_tokens_per_s, speed.decode_tokens_per_s, speed.service_s) == (1000.0, 30.0, 2.0)
    (record,) = serving.records.records()
    assert record.ttft_s == 5.0, "counted from the grant, as its reader waited"


def test_how_long_a_swap_took_is_noted() -> None:
    serving = a_serving()
    inflight, fake = new_call(serving), SimpleNamespace(swap=SimpleNamespace(ended=Future[None]()))
    inflight.enter(serving.schedulers["b"], Assignment("b"))
    inflight.depart()
    inflight.slot_lease = fake  # type: ignore[assignment]
    steps = _prepare(inflight, serving.schedulers["b"])
    next(steps)
    serving.services.clock.now += 4.0  # type: ignore[attr-defined]
    assert next(steps, None) is None and inflight.swap_s == 4.0
    inflight.missed(AttemptFailed(RuntimeError("busy")))
    assert inflight.swap_s == 0.0, "the next attempt has one of its own, or none"


# The pace of prefill from answers in one piece

PREFILL, DECODE = 4000.0, 30.0


def noted(*calls: tuple[int, int], noise: float = 0.0, prefill: float = PREFILL) -> SpeedMeter:
    """Return what was learned of calls with so many fresh and completion tokens, on an engine that is that fast."""
    speed_meter, dice = SpeedMeter(), Random(1)
    for fresh, completion in calls:
        seconds = (fresh / prefill + completion / DECODE) * (1 + dice.uniform(-noise, noise))
        speed_meter.note(service_s=seconds, prefill_s=None, fresh_tokens=fresh, completion_tokens=completion)
    return speed_meter


MIXED = [(800, 60), (1500, 120), (3000, 60), (1500, 60), (4500, 180), (7500, 60)]


def test_answers_in_one_piece_show_the_pace_of_prefill_where_their_tokens_differ() -> None:
    speed_meter = noted(*MIXED)
    assert speed_meter.prefill_tokens_per_s == pytest.approx(PREFILL)
    assert speed_meter.speed.prefill_tokens_per_s is None, "what decides where calls go is measured or unknown"


@pytest.mark.parametrize(
    ("calls", "noise"),
    [
        (MIXED[:3], 0.0),
        ([(1500, 60)] * 30, 0.0),
        ([(1500, 60), (3000, 120), (750, 30)] * 10, 0.0),
        (MIXED * 6, 0.9),
        ([], 0.0),
    ],
    ids=["too few", "all alike", "one ratio", "under a varying load", "none"],
)
def test_where_they_do_not_tell_it_stays_unknown(calls: list[tuple[int, int]], noise: float) -> None:
    assert noted(*calls, noise=noise).prefill_tokens_per_s is None


def test_a_measured_pace_goes_before_a_learned_one() -> None:
    speed_meter = noted(*MIXED)
    speed_meter.note(service_s=3.0, prefill_s=1.0, fresh_tokens=500, completion_tokens=21)
    assert speed_meter.prefill_tokens_per_s == 500.0


def test_an_engine_that_became_slower_is_learned_again() -> None:
    speed_meter = noted(*MIXED * 5)
    for fresh, completion in MIXED * 25:
        seconds = fresh / 500 + completion / DECODE
        speed_meter.note(service_s=seconds, prefill_s=None, fresh_tokens=fresh, completion_tokens=completion)
    assert speed_meter.prefill_tokens_per_s == pytest.approx(500.0, rel=0.02)


@settings(max_examples=200, deadline=None)
@given(
    calls=st.lists(st.tuples(st.integers(0, 50_000), st.integers(1, 4_000)), max_size=40),
    prefill=st.floats(50, 50_000), noise=st.floats(0, 0.05),
)  # fmt: skip
def test_what_is_learned_is_near_or_unknown(calls: list[tuple[int, int]], prefill: float, noise: float) -> None:
    found = noted(*calls, noise=noise, prefill=prefill).prefill_tokens_per_s
    assert found is None or prefill / 2 < found < prefill * 2
