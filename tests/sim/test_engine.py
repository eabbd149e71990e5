"""The simulated engine: what it owes its callers, whatever comes."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg_sim.blocks import chain
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import Event, Kind, SimRequest


def parameters(**more: object) -> EngineParameters:
    """Round numbers: a step takes a second, and a hundredth more for each prefilled token."""
    plain: dict[str, object] = {
        "block_tokens": 4,
        "kv_blocks": 64,
        "context_tokens": 128,
        "max_running": 8,
        "max_batch_tokens": 32,
        "step_s": 1.0,
        "prefill_token_s": 0.01,
        "prefill_attention_s": 0.0,
        "decode_sequence_s": 0.0,
        "decode_context_s": 0.0,
        "request_s": 0.0,
    }
    return EngineParameters(**(plain | more))  # type: ignore[arg-type]


def request(name: str, prompt: int, output: int, tokens: list[int] | None = None, **more: object) -> SimRequest:
    hashes = chain(tokens, 4) if tokens is not None else ()
    return SimRequest(name, prompt, output, hashes, **more)  # type: ignore[arg-type]


def drain(engine: SimEngine) -> list[Event]:
    events = []
    while (at_s := engine.next_event_s()) is not None:
        events += engine.advance(at_s)
    engine.check_integrity()
    return events


def ends(events: list[Event]) -> dict[str, Event]:
    return {event.id: event for event in events if event.kind is Kind.FINISHED}


def firsts(events: list[Event]) -> dict[str, float]:
    return {event.id: event.at_s for event in events if event.kind is Kind.FIRST_TOKEN}


def test_one_call_takes_a_prefill_and_a_step_for_each_further_token() -> None:
    engine = SimEngine(parameters())
    engine.submit(request("a", 10, 3), 0.0)
    events = drain(engine)
    assert [(event.kind, event.at_s, event.tokens) for event in events] == [
        (Kind.FIRST_TOKEN, pytest.approx(1.1), 1),
        (Kind.FINISHED, pytest.approx(3.1), 3),
    ]


def test_a_watched_call_tells_every_token() -> None:
    engine = SimEngine(parameters())
    engine.submit(request("a", 10, 4, watched=True), 0.0)
    told = [(event.kind, event.tokens) for event in drain(engine)]
    assert told == [(Kind.FIRST_TOKEN, 1), (Kind.TOKEN, 2), (Kind.TOKEN, 3), (Kind.TOKEN, 4), (Kind.FINISHED, 4)]


def test_a_prompt_longer_than_a_step_goes_in_chunks_beside_what_decodes() -> None:
    engine = SimEngine(parameters())
    engine.submit(request("a", 4, 9, watched=True), 0.0)
    engine.advance(0.5)
    engine.submit(request("b", 70, 1), 0.5)  # 31 + 31 + 8 tokens: the stream takes one of 32 in each step
    events = drain(engine)
    assert firsts(events)["b"] == pytest.approx(1.04 + 1.31 + 1.31 + 1.08)
    assert [event.at_s for event in events if event.id == "a"][:3] == pytest.approx([1.04, 2.35, 3.66])


def test_cached_tokens_by_hand() -> None:
    engine = SimEngine(parameters())
    tokens = list(range(20))
    engine.submit(request("a", 18, 2, tokens), 0.0)  # 18 + 1 computed: blocks 0 to 3 are full
    drain(engine)
    engine.submit(request("b", 20, 1, tokens), 100.0)  # blocks 0 to 3 are found; a has not computed token 19
    engine.submit(request("c", 16, 1, tokens[:16]), 200.0)  # the last token is always computed: 3 blocks of 4
    engine.submit(request("d", 10, 1, [*tokens[:6], 99, 98, 97, 96]), 300.0)  # equal up to token 6: 1 block
    found = ends(drain(engine))
    assert [found[name].cached_tokens for name in "bcd"] == [16, 12, 4]
    assert engine.state().prefix_queries == 18 + 20 + 16 + 10
    assert engine.state().prefix_hits == 16 + 12 + 4


def test_what_was_generated_is_found_when_it_comes_back() -> None:
    engine = SimEngine(parameters())
    tokens = list(range(40))
    engine.submit(request("a", 10, 11, tokens[:21]), 0.0)
    drain(engine)
    engine.submit(request("b", 30, 1, tokens), 100.0)
    assert ends(drain(engine))["b"].cached_tokens == 20


def test_two_in_the_same_step_share_what_the_first_computes() -> None:
    engine = SimEngine(parameters(max_batch_tokens=64))
    tokens = list(range(16))
    engine.submit(request("a", 16, 1, tokens), 0.0)
    engine.submit(request("b", 16, 1, tokens), 0.0)
    found = drain(engine)
    assert firsts(found)["b"] == pytest.approx(1.0 + 0.16 + 0.04)


def test_nothing_is_found_without_prefix_caching() -> None:
    engine = SimEngine(parameters(prefix_caching=False))
    for at_s in (0.0, 50.0):
        engine.submit(request(f"at {at_s}", 16, 2, list(range(16))), at_s)
    assert all(end.cached_tokens == 0 for end in ends(drain(engine)).values())


def test_lower_numbers_go_first_where_priority_is_heeded() -> None:
    for heeded, order in ((True, ["a", "d", "c", "b"]), (False, ["a", "b", "c", "d"])):
        engine = SimEngine(parameters(max_running=1, priority=heeded))
        for name, urgency in (("a", 0), ("b", 5), ("c", 1), ("d", -1)):
            engine.submit(request(name, 4, 2, priority=urgency), 0.0 if name == "a" else 0.1)
        assert list(ends(drain(engine))) == order


def test_the_least_urgent_loses_its_blocks_and_computes_again() -> None:
    engine = SimEngine(parameters(kv_blocks=8, max_batch_tokens=64))
    engine.submit(request("urgent", 12, 12, list(range(24)), priority=0), 0.0)
    engine.submit(request("patient", 12, 12, list(range(100, 124)), priority=7), 0.0)
    events = drain(engine)
    lost = [event for event in events if event.kind is Kind.PREEMPTED]
    assert lost and {event.id for event in lost} == {"patient"}
    finished = ends(events)
    assert finished["urgent"].at_s < finished["patient"].at_s
    assert finished["patient"].tokens == 12 and finished["patient"].preemptions == len(lost)
    assert finished["patient"].cached_tokens == 0, "what it finds of its own is not the cache's merit"
    assert [event.id for event in events if event.kind is Kind.FIRST_TOKEN].count("patient") == 1


def test_under_first_come_first_served_the_last_to_come_is_preempted() -> None:
    engine = SimEngine(parameters(kv_blocks=8, max_batch_tokens=64, priority=False))
    engine.submit(request("first", 12, 12, priority=7), 0.0)
    engine.submit(request("second", 12, 12, priority=0), 0.0)
    lost = {event.id for event in drain(engine) if event.kind is Kind.PREEMPTED}
    assert lost == {"second"}


def test_a_preempted_call_recomputes_and_that_takes_time() -> None:
    alone = SimEngine(parameters(kv_blocks=64, max_batch_tokens=64))
    tight = SimEngine(parameters(kv_blocks=8, max_batch_tokens=64))
    for engine in (alone, tight):
        for name in ("a", "b"):
            engine.submit(request(name, 12, 12), 0.0)
    assert ends(drain(tight))["b"].at_s > ends(drain(alone))["b"].at_s + 3


def test_the_end_of_a_finished_prompt_is_lost_before_its_beginning() -> None:
    engine = SimEngine(parameters(kv_blocks=8))
    engine.submit(request("a", 17, 1, list(range(17))), 0.0)  # 4 full blocks and a fifth begun
    drain(engine)
    engine.submit(request("b", 20, 1), 50.0)  # 5 blocks: the 4 that hold nothing known, and the last known one
    drain(engine)
    engine.submit(request("c", 17, 1, list(range(17))), 100.0)
    assert ends(drain(engine))["c"].cached_tokens == 12


def test_nobody_is_admitted_in_a_step_that_preempts() -> None:
    limits = parameters(kv_blocks=8, max_batch_tokens=64)
    begun = [request("urgent", 12, 12, priority=0), request("patient", 12, 12, priority=7)]
    engine = SimEngine(limits)
    for call in begun:
        engine.submit(call, 0.0)
    preempts_s = next(event.at_s for event in drain(engine) if event.kind is Kind.PREEMPTED)
    engine = SimEngine(limits)
    for call in begun:
        engine.submit(call, 0.0)
    engine.advance(preempts_s - 0.5)
    engine.submit(request("between", 4, 1, priority=1), preempts_s - 0.5)
    assert firsts(drain(engine))["between"] == pytest.approx(preempts_s + 1.0 + 1.04)


def test_what_is_held_costs_once_however_many_share_it() -> None:
    ended = {}
    for shared in (True, False):
        engine = SimEngine(parameters(max_batch_tokens=64, held_token_s=0.01))
        for number in range(3):
            tokens = list(range(16)) if shared else list(range(number * 100, number * 100 + 16))
            engine.submit(request(str(number), 17, 5, tokens), 0.0)
        ended[shared] = max(event.at_s for event in drain(engine))
    assert ended[False] > ended[True] + 4 * 0.3


def test_a_prompt_that_does_not_fit_holds_up_those_behind_it() -> None:
    engine = SimEngine(parameters(kv_blocks=8))
    engine.submit(request("a", 16, 9), 0.0)
    engine.submit(request("long", 24, 1), 0.1)
    engine.submit(request("short", 4, 1), 0.2)
    finished = ends(drain(engine))
    assert finished["a"].at_s < finished["long"].at_s <= finished["short"].at_s


def test_the_server_takes_one_request_after_another() -> None:
    engine = SimEngine(parameters(request_s=0.5, max_batch_tokens=64))
    for name in ("a", "b", "c"):
        engine.submit(request(name, 10, 1), 0.0)
    # a is ready at 0.5 and runs alone until 1.6; b and c are ready by then
    assert firsts(drain(engine)) == {"a": pytest.approx(1.6), "b": pytest.approx(2.8), "c": pytest.approx(2.8)}


def test_with_asynchronous_scheduling_who_comes_during_a_step_waits_for_the_next_too() -> None:
    seen = {}
    for asynchronous in (False, True):
        engine = SimEngine(parameters(async_scheduling=asynchronous))
        engine.submit(request("a", 4, 20), 0.0)
        engine.advance(0.5)
        engine.submit(request("b", 10, 2), 0.5)
        events = drain(engine)
        seen[asynchronous] = firsts(events)["b"]
        assert ends(events)["a"].tokens == 20
    assert seen == {False: pytest.approx(1.04 + 1.1), True: pytest.approx(1.04 + 1.0 + 1.1)}


def test_an_abort_frees_everything_and_says_nothing_more() -> None:
    engine = SimEngine(parameters(max_running=2, request_s=0.01))
    for name in ("runs", "runs too", "waits"):
        engine.submit(request(name, 8, 50), 0.0)
    engine.advance(5.0)
    engine.submit(request("comes", 8, 50), 5.0)
    for name in ("runs", "waits", "comes"):
        assert engine.abort(name, 5.0)
        engine.check_integrity()
    assert not engine.abort("runs", 5.0)
    assert set(ends(drain(engine))) == {"runs too"}
    assert engine.ownership.pool.held == 0


def test_what_can_never_run_is_refused() -> None:
    engine = SimEngine(parameters(kv_blocks=4))
    with pytest.raises(ValueError, match="17 tokens, the engine takes 16"):
        engine.submit(request("a", 12, 5), 0.0)
    engine.submit(request("a", 12, 4), 0.0)
    with pytest.raises(ValueError, match="already"):
        engine.submit(request("a", 1, 1), 0.0)
    with pytest.raises(ValueError, match="at least one token"):
        request("a", 0, 1)


def test_pins_survive_pressure_and_end_in_time() -> None:
    engine = SimEngine(parameters(kv_blocks=12))
    kept, other = list(range(16)), list(range(100, 148))
    engine.submit(request("a", 16, 1, kept, workflow="w"), 0.0)
    drain(engine)
    engine.ownership.pin_workflow("w", until_s=100.0)
    engine.submit(request("b", 32, 1, other[:32]), 10.0)
    drain(engine)
    assert len(engine.ownership.pool.find(chain(kept, 4))) == 4
    engine.advance(101.0)
    engine.submit(request("c", 44, 1, list(range(200, 244))), 101.0)
    drain(engine)
    assert len(engine.ownership.pool.find(chain(kept, 4))) < 4


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[float, SimRequest, float | None]]:
    """Arrivals, some of which are aborted later; prompts of three families share their beginnings."""
    calls, at_s = [], 0.0
    for number in range(draw(st.integers(1, 14))):
        at_s += draw(st.sampled_from([0.0, 0.3, 1.0, 7.0]))
        prompt, output = draw(st.integers(1, 40)), draw(st.integers(1, 20))
        family = draw(st.integers(0, 2))
        known = draw(st.sampled_from([prompt, prompt + output]))
        abort = draw(st.none() | st.floats(0.0, 10.0))
        call = SimRequest(
            str(number),
            prompt,
            output,
            chain(range(family * 1000, family * 1000 + known), 4),
            priority=draw(st.integers(-1, 1)),
            workflow=draw(st.sampled_from([None, "w", "v"])),
            watched=draw(st.booleans()),
        )
        calls.append((at_s, call, None if abort is None else at_s + abort))
    return calls


def play(engine: SimEngine, calls: list[tuple[float, SimRequest, float | None]]) -> tuple[list[Event], set[str]]:
    moments = [(at_s, 0, call) for at_s, call, _ in calls]
    moments += [(abort_s, 1, call) for _, call, abort_s in calls if abort_s is not None]
    events, aborted = [], set()
    for at_s, kind, call in sorted(moments, key=lambda moment: moment[:2]):
        events += engine.advance(at_s)
        if kind == 0:
            engine.submit(call, at_s)
        elif engine.abort(call.id, at_s):
            aborted.add(call.id)
        engine.check_integrity()
    return events + drain(engine), aborted


@settings(max_examples=150, deadline=None)
@given(traffic(), st.booleans(), st.booleans(), st.sampled_from([16, 24, 64]))
def test_whatever_comes_everybody_ends_once_and_no_block_is_lost(
    calls: list[tuple[float, SimRequest, float | None]], asynchronous: bool, priority: bool, blocks: int
) -> None:
    limits = parameters(async_scheduling=asynchronous, priority=priority, kv_blocks=blocks, jitter=0.1)
    engine = SimEngine(limits)
    events, aborted = play(engine, calls)
    assert sorted(event.id for event in events if event.kind is Kind.FINISHED) == sorted(
        call.id for _, call, _ in calls if call.id not in aborted
    )
    assert [event.at_s for event in events] == sorted(event.at_s for event in events)
    wanted = {call.id: call for _, call, _ in calls}
    for event in events:
        assert event.cached_tokens < wanted[event.id].prompt_tokens
    for end in ends(events).values():
        tokens = [
            event.tokens for event in events if event.id == end.id and event.kind in (Kind.FIRST_TOKEN, Kind.TOKEN)
        ]
        assert end.tokens == wanted[end.id].output_tokens
        assert tokens == (list(range(1, end.tokens + 1)) if wanted[end.id].watched else [1])
    assert engine.ownership.pool.held == 0
    again, _ = play(SimEngine(limits), calls)
    assert again == events, "the same seed and the same calls must give the same"


def arrivals(seconds: float, rate: float) -> list[tuple[float, SimRequest]]:
    dice, at_s, made = random.Random(1), 0.0, []
    shared = [[dice.getrandbits(60) for _ in range(100)] for _ in range(8)]
    while at_s < seconds:
        at_s += dice.expovariate(rate)
        prompt = max(50, min(int(dice.lognormvariate(7.2, 0.5)), 8000))
        hashes = shared[len(made) % 8][: (prompt - 1) // 16]
        made.append((at_s, SimRequest(str(len(made)), prompt, int(dice.expovariate(1 / 150)) + 1, hashes)))
    return made


GPU = EngineParameters(
    block_tokens=16,
    kv_blocks=40_000,
    context_tokens=32_768,
    max_running=256,
    max_batch_tokens=8192,
    step_s=0.015,
    prefill_token_s=2e-5,
    prefill_attention_s=1e-10,
    decode_sequence_s=5e-5,
    decode_context_s=1e-8,
    request_s=0.0005,
)


def test_six_minutes_of_twenty_requests_a_second_take_seconds() -> None:
    engine, calls = SimEngine(GPU), arrivals(360.0, 20.0)
    began_s = time.process_time()
    finished = 0
    for at_s, call in calls:
        engine.submit(call, at_s)
        finished += sum(event.kind is Kind.FINISHED for event in engine.advance(at_s))
    finished += len(ends(drain(engine)))
    assert finished == len(calls) > 7000
    # An hour is ten times as much and must stay within two minutes.
    assert time.process_time() - began_s < 12.0
