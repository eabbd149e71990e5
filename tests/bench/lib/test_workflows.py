"""Sessions on a stub engine: their prompts grow by what the engine answers, and every call is timed from its node."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.lib.calls import CallSeen, JobSeen, Turn, common, makespan_s, recomputed, ttfts_s
from bench.lib.client import connected, model_at
from bench.lib.kept import beside_others
from bench.lib.workflows import Session, agent, play
from orla_lg import Backend
from orla_lg.testing.faults import Reply
from tests.stub_engine import MODEL, StubEngine


def test_a_session_says_asks_and_waits_until_all_was_said() -> None:
    sessions = [Session(0.0, ("one", "two", "three"), (0.0, 0.02)), Session(0.05, ("four",), ())]
    waited: list[tuple[int, float]] = []
    ticks: list[int] = []

    async def tool(number: int, wait_s: float) -> None:
        waited.append((number, wait_s))

    async def played(url: str) -> tuple[list[CallSeen], list[JobSeen]]:
        async with model_at(url, MODEL) as model:
            graph: Any = agent(sessions, model, system="Be kind.", tool=tool, tick=lambda: ticks.append(1)).compile()
            return await play(graph, sessions)

    with StubEngine() as stub:
        calls, jobs = asyncio.run(played(stub.url))
        asked = [seen.body["messages"] for seen in stub.requests if seen.body]
    assert sorted((call.session, call.number) for call in calls) == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert (waited, len(ticks)) == ([(0, 0.0), (0, 0.02)], 4)
    assert all(0 <= call.called_s <= call.first_s <= call.ended_s for call in calls)
    assert {job.session: job.arrived_s >= 0.05 for job in jobs} == {0: False, 1: True}
    longest = max(asked, key=len)
    assert [each["role"] for each in longest] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [each["content"] for each in longest if each["role"] == "user"] == ["one", "two", "three"]


def test_a_call_that_waits_to_be_let_in_counts_from_its_arrival() -> None:
    sessions = [Session(0.0, ("one",), ()) for _ in range(2)]

    async def played(url: str) -> list[CallSeen]:
        async with model_at(url, MODEL) as model:
            graph: Any = agent(sessions, model).compile()
            return (await play(graph, sessions, door=asyncio.Semaphore(1)))[0]

    with StubEngine(rule=lambda seen: Reply(before_s=0.05)) as stub:
        first, second = sorted(asyncio.run(played(stub.url)), key=lambda call: call.ended_s)
    assert second.first_s > first.ended_s > second.called_s


def test_an_arm_that_is_not_wrapped_has_no_orla() -> None:
    with StubEngine() as stub:
        backend = Backend("engine", stub.url, MODEL)
        with connected([backend], wrapped=False) as none, connected([backend]) as orla:
            assert none is None and orla is not None and orla.statistics().calls == 0


def test_what_calls_and_jobs_show() -> None:
    calls = [CallSeen(0, 0, 1.0, 3.0, 4.0, 100, 40, 5), CallSeen(0, 1, 5.0, 5.5, 6.0, 120, 120, 5)]
    assert (ttfts_s(calls), recomputed(calls)) == ([2.0, 0.5], 60)
    assert makespan_s([JobSeen(0, 1.0, 4.0), JobSeen(1, 2.0, 9.0)]) == 8.0
    assert common([[1, 2, 3], [1, 2, 4], [1, 2]]) == 2


async def test_other_processes_are_looked_at_where_the_engine_is_near() -> None:
    async def turn() -> Turn:
        return Turn("bare", 0, 0, [], [])

    assert (await beside_others("http://far.example/v1", turn())).others == 0.0
    with StubEngine() as stub:
        assert 0.0 <= (await beside_others(stub.url, turn())).others <= 1.0
