from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.cache.prefix.admission import Admission
from orla_lg.core.cache.prefix.capacity import DECREASE, INCREASE, LEAST, ROUNDING, Capacity
from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Backend
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import arrive
from orla_lg.core.workflow import Outcome
from orla_lg.testing.virtual import VirtualServing
from orla_lg_sim import EngineParameters, SimEngine
from orla_lg_sim.blocks import chain
from orla_lg_sim.request import SimRequest

SIZE = 9_600
"""Of the simulated engine's cache, in tokens."""


def a_capacity(*, caches: bool = True) -> Capacity:
    capacity = Capacity()
    if caches:
        capacity.found(1000.0, 1000, 1000.0)
    return capacity


def lose(capacity: Capacity, enough_tokens: float) -> None:
    capacity.found(1000.0, 0, enough_tokens)


def find(capacity: Capacity, enough_tokens: float) -> None:
    capacity.found(1000.0, 1000, enough_tokens)


def test_nothing_is_known_until_it_is_told_or_lost() -> None:
    capacity = a_capacity()
    find(capacity, 1e9)
    assert capacity.limit == inf
    lose(capacity, 8000.0)
    assert capacity.limit == DECREASE * 8000 and capacity.losses == 1


def test_losses_side_by_side_decrease_it_once() -> None:
    capacity = a_capacity()
    for _ in range(20):
        lose(capacity, 8000.0)
    assert capacity.limit == DECREASE * 8000


def test_it_grows_only_by_what_a_smaller_cache_would_have_lost() -> None:
    capacity = a_capacity()
    lose(capacity, 10_000.0)
    find(capacity, 5000.0)
    assert capacity.limit == 8500
    find(capacity, 7700.0)
    assert capacity.limit == 8500 * (1 + INCREASE)


@pytest.mark.parametrize(
    ("expected", "cached", "lost"),
    [(1000, 760, False), (1000, 740, True), (200, 80, False), (200, 70, True), (0, 0, False)],
)
def test_a_few_blocks_less_are_no_loss(expected: float, cached: int, lost: bool) -> None:
    assert Capacity().lost(expected, cached) is lost


def test_an_engine_that_never_finds_anything_does_not_cache_and_is_not_small() -> None:
    capacity = a_capacity(caches=False)
    for _ in range(100):
        lose(capacity, 500.0)
    assert capacity.limit == inf and capacity.losses == 100


def test_what_is_told_replaces_what_was_learned() -> None:
    capacity = a_capacity()
    lose(capacity, 500.0)
    capacity.tell(None)
    assert capacity.limit == DECREASE * 500, "nothing new"
    capacity.tell(1000)
    assert capacity.limit == capacity.most == 1000 * ROUNDING
    lose(capacity, 900.0)
    learned = capacity.limit
    capacity.tell(1000)
    assert capacity.limit == learned < 1000, "told again, as every half minute"
    capacity.tell(None)
    assert capacity.limit == capacity.most == inf and capacity.least == 0


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=60))
def test_a_told_size_is_never_exceeded_and_keeps_its_floor(answers: list[tuple[bool, float]]) -> None:
    capacity = a_capacity()
    capacity.tell(1000)
    for lost, tokens in answers:
        (lose if lost else find)(capacity, tokens)
        assert LEAST * capacity.most <= capacity.limit <= capacity.most


# Against an engine that does not say its size


def tokens_of(messages: list[dict[str, str]]) -> list[int]:
    """Four characters are a token."""
    return [hash((m["role"], m["content"], n)) for m in messages for n in range(len(m["content"]) // 4)]


@contextmanager
def an_engine_of_unknown_size() -> Iterator[tuple[VirtualServing[SimRequest], dict[str, SimRequest]]]:
    requests: dict[str, SimRequest] = {}
    engine = SimEngine(EngineParameters(kv_blocks=SIZE // 32))
    with VirtualServing({Backend("e", "http://e/v1"): engine}, lambda inflight: named(inflight, requests)) as virtual:
        yield virtual, requests


def named(inflight: InFlightCall, requests: dict[str, SimRequest]) -> SimRequest:
    return requests[inflight.call.id]


class Sessions:
    """Conversations of five calls each, with tools between them, that share what they begin with."""

    def __init__(self, virtual: VirtualServing[SimRequest], requests: dict[str, SimRequest]) -> None:
        self.virtual, self.requests, self.random = virtual, requests, Random(7)
        self.limits: list[float] = []

    @property
    def admission(self) -> Admission:
        return self.virtual.serving.schedulers["e"].cache.admission

    async def at_a_time(self, sessions: int, rounds: int) -> None:
        async def one_after_another(number: int) -> None:
            for nth in range(rounds):
                await self.session(f"{number}/{nth}")

        async with asyncio.TaskGroup() as group:
            for number in range(sessions):
                group.create_task(one_after_another(number))

    async def session(self, name: str) -> None:
        serving = self.virtual.serving
        run = serving.progress.run_started(name, thread=None, graph="g")
        said = [{"role": "system", "content": "policy " * 300}, {"role": "user", "content": f"{name} asks" * 40}]
        for nth in range(5):
            await self.call(name, nth, said)
            await asyncio.sleep(self.random.uniform(0.5, 3))
            said += [{"role": "assistant", "content": f"{name} {nth}".ljust(240, "a")}]
            said += [{"role": "user", "content": f"tool {name} {nth} " * 20}]
            self.limits.append(self.admission.capacity.limit)
        serving.progress.run_ended(run.id, Outcome.DONE)

    async def call(self, name: str, nth: int, said: list[dict[str, str]]) -> None:
        answer = {"role": "assistant", "content": f"{name} {nth}".ljust(240, "a")}
        prompt = tokens_of(said)
        ask = Ask("auto", list(said), stream=True, max_tokens=60)
        inflight = arrive(self.virtual.serving.services, Identity(name, name, "agent"), ask, call_id=f"{name}/{nth}")
        self.requests[inflight.call.id] = SimRequest(
            inflight.call.id, len(prompt), 60, chain([*prompt, *tokens_of([answer])], 32)
        )
        await self.virtual.serve(inflight)


def test_the_size_of_an_engine_that_does_not_say_it_is_found_within_a_third() -> None:
    with an_engine_of_unknown_size() as (virtual, requests):
        sessions = Sessions(virtual, requests)
        virtual.run(sessions.at_a_time(24, rounds=5))
        settled = sorted(sessions.limits[len(sessions.limits) // 3 :])
        assert sessions.limits[0] == inf
        assert statistics.median(settled) == pytest.approx(SIZE, rel=0.3)
        assert statistics.mean(settled) == pytest.approx(SIZE, rel=0.3)
        assert settled[0] > 0.65 * SIZE and settled[-1] < 1.5 * SIZE, "and it neither collapses nor runs away"


def test_a_conversation_that_comes_back_late_does_not_make_the_engine_small() -> None:
    """What nobody counted on is evicted as a matter of course; with little going on, that used to be a collapse."""
    with an_engine_of_unknown_size() as (virtual, requests):
        sessions = Sessions(virtual, requests)
        said: list[Any] = [{"role": "user", "content": "an old story " * 300}]

        async def old(nth: int) -> None:
            await sessions.call("old", nth, said)

        virtual.run(old(0))
        virtual.run(sessions.at_a_time(2, rounds=8))  # little at a time, but more than fits in all
        virtual.run(old(1))
        capacity = sessions.admission.capacity
        assert capacity.losses == 1 and capacity.limit > DECREASE * 0.9 * SIZE


def test_where_all_fits_nothing_is_learned() -> None:
    with an_engine_of_unknown_size() as (virtual, requests):
        sessions = Sessions(virtual, requests)
        virtual.run(sessions.at_a_time(3, rounds=1))
        assert sessions.admission.capacity.limit == inf and sessions.admission.capacity.losses == 0
