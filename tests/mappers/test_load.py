from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.call import Ask, Assignment
from orla_lg.core.engine.backend import Capability, Probe, Support
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.load import FRESH_S, INTEREST_S, LoadWatch
from orla_lg.core.engine.speed import USUAL, Speed
from orla_lg.core.placement.view import BackendView, view_of
from orla_lg.errors import BackendUnavailable, ConfigError
from orla_lg.mappers.load import LoadAware, expect, saturated
from orla_lg.mappers.table import ExplicitMapper
from tests.core.fakes import Engine, HandBackground, HandClock, a_call, a_serving, a_view, decide

SPEED = Speed(service_s=2.0, prefill_tokens_per_s=1000.0, decode_tokens_per_s=50.0, completion_tokens=100.0)
MAPPER = LoadAware(ExplicitMapper({"*": ["home", "away"]}))


def home(**said: Any) -> BackendView:
    return a_view("home", **{"max_concurrency": 4, "speed": SPEED, **said})


def away(**said: Any) -> BackendView:
    return a_view("away", **{"max_concurrency": 4, "speed": SPEED, **said})


def to(*views: BackendView, chars: int = 4000) -> Assignment:
    return decide(MAPPER, a_call(chars=chars), views)


def test_a_call_stays_where_there_is_room_and_nothing_is_weighed() -> None:
    chosen = to(home(in_flight=3), away())
    assert (chosen.backend, chosen.mapper, chosen.considered) == ("home", "explicit", ())


@pytest.mark.parametrize(
    "busy",
    [
        {"in_flight": 4},
        {"waiting": 1},
        {"load": EngineStats(running=8, waiting=3)},
        {"circuit": Circuit.OPEN},
    ],
)
def test_a_call_leaves_a_saturated_backend_for_an_idle_one(busy: dict[str, Any]) -> None:
    chosen = to(home(**busy), away())
    assert (chosen.backend, chosen.alternatives, chosen.mapper) == ("away", ("home",), "load+explicit")
    numbers = {each.backend: each.numbers for each in chosen.considered}
    assert numbers["away"]["expected_s"] == pytest.approx(1.0 + 2.0), "1000 tokens to prefill, 100 to decode"
    if "circuit" in busy:
        assert "expected_s" not in numbers["home"] and chosen.considered[0].verdict == "circuit open"
    else:
        assert numbers["home"]["expected_s"] > numbers["away"]["expected_s"]


def test_moving_costs_the_cache() -> None:
    busy = {"in_flight": 4, "waiting": 1}  # one second to wait
    assert to(home(**busy), away(), chars=8000).backend == "away"
    assert to(home(**busy, resident_tokens=2000), away(), chars=8000).backend == "home", "two seconds to prefill"
    assert to(home(in_flight=4, waiting=9, resident_tokens=2000), away(), chars=8000).backend == "away"


def test_a_call_follows_its_prefix_where_that_is_clearly_sooner() -> None:
    there = away(resident_tokens=1000)
    assert to(home(), there).backend == "away", "a second of prefill in three is saved"
    assert to(home(), there, chars=400).backend == "home", "what is saved is more than the prompt: nothing to gain"
    assert to(home(), away(resident_tokens=191)).considered == (), "too little to look further"
    assert to(home(resident_tokens=900), there).considered == ()
    assert to(home(), away(resident_tokens=1000, in_flight=4)).backend == "away", "half a second to wait"
    assert to(home(), away(resident_tokens=1000, in_flight=4, waiting=2)).backend == "home"


def test_who_waits_for_a_prefix_takes_nobodys_place() -> None:
    assert to(home(waiting=7, waiting_for_prefix=7, in_flight=1), away()).considered == ()
    chosen = to(home(waiting=8, waiting_for_prefix=7, in_flight=4, resident_tokens=1000), away())
    assert chosen.considered[0].numbers["wait_s"] == 1.0, "one waits for a place, and the call itself"
    assert chosen.backend == "home"


def test_caches_are_looked_at_only_where_there_is_a_choice() -> None:
    def looked() -> int:
        raise AssertionError("nobody had to know")

    alone = LoadAware(ExplicitMapper({"*": "home"}))
    assert decide(alone, a_call(), [replace(home(), resident=looked), replace(away(), resident=looked)]) is not None


def test_a_call_moves_only_if_that_is_clearly_better() -> None:
    busy = home(in_flight=4)  # waits 0.5 s, then takes 3 s
    slower = away(speed=replace(SPEED, decode_tokens_per_s=100 / 2.3))
    assert to(busy, slower).backend == "home" and "nothing is clearly sooner" in to(busy, slower).reason
    assert decide(LoadAware(MAPPER.inner, margin=1.0), a_call(chars=4000), [busy, slower]).backend == "away"
    for wrong in (0.0, 1.1):
        with pytest.raises(ConfigError, match="margin"):
            LoadAware(MAPPER.inner, wrong)


def test_who_cannot_is_not_moved_to() -> None:
    unable = away(probe=Probe(context_tokens=10))
    chosen = to(home(in_flight=4), unable)
    assert chosen.backend == "home" and "its context holds 10" in chosen.considered[1].verdict


def test_if_all_circuits_are_open_the_call_stays_and_the_record_is_json() -> None:
    chosen = to(home(circuit=Circuit.OPEN), away(circuit=Circuit.OPEN))
    assert chosen.backend == "home"
    json.dumps([dict(each.numbers) for each in chosen.considered], allow_nan=False)


def test_without_an_answer_or_an_alternative_there_is_nothing_to_weigh() -> None:
    assert decide(LoadAware(ExplicitMapper({"x": "home"})), a_call(), [home()]) is None
    alone = decide(LoadAware(ExplicitMapper({"*": "home"})), a_call(), [home(waiting=5), away()])
    assert (alone.backend, alone.mapper) == ("home", "explicit")
    assert decide(LoadAware(ExplicitMapper({"*": ["gone", "away"]})), a_call(), [away()]).backend == "gone"


def test_what_a_backend_never_told_is_taken_from_the_others() -> None:
    new = a_view("new")
    ask = Ask("auto", [{"role": "user", "content": "x" * 4000}])
    assert expect(ask, new, [home(), new]) == expect(ask, away(), [home(), away()])
    alone = expect(ask, new, [new])
    assert alone.decode_s == USUAL.completion_tokens / USUAL.decode_tokens_per_s
    assert expect(Ask("auto", ask.messages, max_tokens=10), home(), [home()]).decode_s == pytest.approx(0.2)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 20_000))
def test_it_never_moves_to_where_it_expects_to_take_longer(
    at_home: int, elsewhere: int, cached: int, cached_elsewhere: int, chars: int
) -> None:
    views = [
        home(waiting=at_home, in_flight=4, resident_tokens=cached),
        away(waiting=elsewhere, in_flight=min(elsewhere, 4), resident_tokens=cached_elsewhere),
    ]
    chosen = to(*views, chars=chars)
    expected = {each.backend: each.numbers["expected_s"] for each in chosen.considered}
    assert expected[chosen.backend] == min(expected.values()) or chosen.backend == "home"
    if chosen.backend == "away":
        assert expected["away"] <= 0.9 * expected["home"] + 1e-6


# What the engine says of its load


class Busy(Engine):
    def __init__(self, said: Any = None) -> None:
        super().__init__()
        self.said, self.asked = said or EngineStats(running=1, waiting=7), 0

    async def stats(self) -> EngineStats:
        self.asked += 1
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


CAN = Probe(capabilities={Capability.STATS: Support.NATIVE})


def a_watch(engine: Busy) -> tuple[LoadWatch, HandBackground]:
    background = HandBackground(HandClock())
    return LoadWatch(engine, background, background.clock), background


def finish(background: HandBackground) -> None:
    background.do_all()


def test_the_load_is_asked_once_a_second_while_somebody_wants_it() -> None:
    engine = Busy()
    watch, background = a_watch(engine)
    assert watch.wanted(CAN) is None and watch.wanted(CAN) is None
    finish(background)
    assert watch.wanted(CAN) == EngineStats(running=1, waiting=7) and engine.asked == 1
    for _ in range(5):
        background.advance(0.5)
        finish(background)
        watch.wanted(CAN)
    assert engine.asked == 3, "after 1 s and 2 s"
    for _ in range(40):
        background.advance(1.0)
        finish(background)
    assert engine.asked <= 4 + INTEREST_S and not background.timers, "nobody asked: it ended"
    assert watch.wanted(CAN) is None, "what it said is old"
    finish(background)
    assert watch.wanted(CAN) is not None


def test_an_engine_that_does_not_say_it_can_is_never_asked() -> None:
    watch, background = a_watch(Busy())
    for probe in (None, Probe(), Probe(capabilities={Capability.STATS: Support.FLAG})):
        assert watch.wanted(probe) is None
    assert not background.work


def test_a_watch_that_fails_is_silent_and_goes_on() -> None:
    engine = Busy(BackendUnavailable("gone"))
    watch, background = a_watch(engine)
    watch.wanted(CAN)
    finish(background)
    engine.said = EngineStats(waiting=1)
    background.advance(1.0)
    finish(background)
    assert watch.wanted(CAN) == EngineStats(waiting=1)
    background.closed = True
    background.advance(FRESH_S + 9.0)
    assert watch.wanted(CAN) is None, "closed: nothing is raised on the request path"


def test_a_desk_shows_the_load_it_was_told() -> None:
    engine = Busy()
    serving = a_serving(engine=engine, probe=CAN)
    serving.background = HandBackground(serving.clock)
    scheduler = serving.schedulers["b"]
    scheduler.load = LoadWatch(engine, serving.background, serving.clock)
    assert view_of(scheduler).load is None
    finish(serving.background)
    assert view_of(scheduler).load == EngineStats(running=1, waiting=7) and saturated(view_of(scheduler))
