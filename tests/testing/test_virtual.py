"""Virtual time: events in order, hours in seconds, the same each time, and deadlocks by name."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from orla_lg import Backend, Hints, Record
from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Capability, Probe, Support
from orla_lg.core.identity import Identity
from orla_lg.errors import DeadlineExceeded, OrlaClosed
from orla_lg.mappers.table import ExplicitMapper
from orla_lg.testing.virtual import (
    Deadlock,
    StillAdapter,
    VirtualClock,
    VirtualServing,
    in_virtual_time,
    run,
)
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest

HOUR_S = 3600.0


# The clock ------------------------------------------------------------------------------------------------


def test_timers_fire_in_order_and_at_their_time() -> None:
    clock, fired = VirtualClock(100.0), list[tuple[str, float]]()

    def note(name: str) -> Any:
        return lambda: fired.append((name, clock()))

    clock.call_at(103.0, note("late"))
    clock.call_later(1.0, note("first of two"))
    clock.call_later(1.0, note("second of two"))
    clock.call_at(50.0, note("past"))
    clock.call_at(102.0, note("cancelled")).cancel()
    clock.call_at(101.0, lambda: clock.call_at(101.5, note("set on the way")) and None)
    clock.run_until(102.5)
    assert fired == [
        ("past", 100.0), ("first of two", 101.0), ("second of two", 101.0), ("set on the way", 101.5),
    ]  # fmt: skip
    assert clock() == 102.5
    clock.run()
    assert fired[-1] == ("late", 103.0) and clock() == 103.0
    clock.run_until(5.0)
    assert clock() == 103.0, "time does not go back"


# The loop -------------------------------------------------------------------------------------------------


def test_hours_take_no_time() -> None:
    async def main() -> list[str]:
        order: list[str] = []

        async def sleeper(name: str, hours: float) -> None:
            await asyncio.sleep(hours * HOUR_S)
            order.append(f"{name} {asyncio.get_running_loop().time() / HOUR_S:g}")

        async with asyncio.TaskGroup() as group:
            group.create_task(sleeper("b", 2))
            group.create_task(sleeper("a", 1))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5 * HOUR_S):
                    await asyncio.Event().wait()
            order.append("timeout")
        return order

    began = time.perf_counter()
    assert run(main()) == ["a 1", "timeout", "b 2"]
    assert time.perf_counter() - began < 60


async def wait_for_each_other() -> None:
    one, other = asyncio.Lock(), asyncio.Lock()

    async def takes(first: asyncio.Lock, second: asyncio.Lock) -> None:
        async with first:
            await asyncio.sleep(1)
            async with second:
                pass

    async with asyncio.TaskGroup() as group:
        group.create_task(takes(one, other), name="left")
        group.create_task(takes(other, one), name="right")


def test_a_deadlock_is_an_error_that_says_who_waits_where() -> None:
    with pytest.raises(Deadlock, match=r"(?s)at 1\.000 s every task waits.*left at .*test_virtual\.py:\d+.*right at"):
        run(wait_for_each_other())


def test_waiting_for_a_timer_is_no_deadlock() -> None:
    async def main() -> str:
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        loop.call_later(60, event.set)
        await event.wait()
        return "woken"

    assert run(main()) == "woken"


def test_what_is_meant_for_threads_runs_at_once() -> None:
    async def main() -> list[Any]:
        done = [await asyncio.to_thread(lambda: 7)]
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 / 0)
        return done

    assert run(main()) == [7]


@pytest.mark.parametrize("hours", [1, 1000])
@in_virtual_time
async def test_as_a_decorator(hours: int) -> None:
    await asyncio.sleep(hours * HOUR_S)
    assert asyncio.get_running_loop().time() == pytest.approx(hours * HOUR_S)


# The core -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    id: str
    seconds: float


@dataclass(frozen=True)
class Event:
    kind: str
    id: str
    at_s: float
    tokens: int = 5
    cached_tokens: int = 0


class Metronome:
    """An engine that works on everything at once, each request as long as it says; one second to the first token."""

    def __init__(self) -> None:
        self.coming: list[Event] = []
        self.submitted: list[str] = []
        self.aborted: list[str] = []
        self.peak = 0

    def submit(self, request: Request, now: float) -> None:
        self.submitted.append(request.id)
        self.coming.append(Event("first_token", request.id, now + 1))
        self.coming.append(Event("finished", request.id, now + request.seconds))
        self.coming.sort(key=lambda event: event.at_s)
        self.peak = max(self.peak, len({event.id for event in self.coming}))

    def abort(self, id: str, now: float) -> bool:
        self.aborted.append(id)
        self.coming = [event for event in self.coming if event.id != id]
        return True

    def next_event_s(self) -> float | None:
        return self.coming[0].at_s if self.coming else None

    def advance(self, now: float) -> Sequence[Event]:
        due = [event for event in self.coming if event.at_s <= now]
        self.coming = self.coming[len(due) :]
        return due


def ask(chars: int = 40) -> Ask:
    return Ask("auto", [{"role": "user", "content": "x" * chars}])


def who(n: int, stage: str = "node") -> Identity:
    return Identity(f"w{n}", stage=stage)


def ten_seconds(inflight: Any) -> Request:
    return Request(inflight.call.id, 10.0)


def test_calls_wait_for_their_turn_and_records_tell_virtual_seconds() -> None:
    engine = Metronome()
    with VirtualServing({Backend("a", "http://a/v1", max_concurrency=2): engine}, ten_seconds) as virtual:

        async def five() -> list[Record]:
            async with asyncio.TaskGroup() as group:
                calls = [group.create_task(virtual.call(ask(), who(n))) for n in range(5)]
            return [call.result() for call in calls]

        records = virtual.run(five())
        virtual.serving.check_integrity()
    assert [record.queue_wait_s for record in records] == [0, 0, 10, 10, 20]
    assert {record.ttft_s for record in records} == {1.0}
    assert [record.duration_s for record in records] == [10, 10, 20, 20, 30]
    assert {(record.prompt_tokens, record.completion_tokens) for record in records} == {(11, 5)}
    assert engine.peak == 2


def test_a_call_that_is_cancelled_leaves_queue_and_engine() -> None:
    engine = Metronome()
    with VirtualServing({Backend("a", "http://a/v1", max_concurrency=1): engine}, ten_seconds) as virtual:

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                running, waiting = (group.create_task(virtual.call(ask(), who(n))) for n in (1, 2))
                await asyncio.sleep(3)
                waiting.cancel()
                running.cancel()

        virtual.run(main())
        queue = virtual.serving.statistics().backends["a"].queue
    assert (queue.in_flight, queue.waiting) == (0, 0)
    assert engine.aborted == engine.submitted and len(engine.aborted) == 1


def test_a_deadline_passes_in_virtual_time() -> None:
    with VirtualServing({Backend("a", "http://a/v1", max_concurrency=1): Metronome()}, ten_seconds) as virtual:

        async def main() -> float:
            async with asyncio.TaskGroup() as group:
                group.create_task(virtual.call(ask(), who(1)))
                await asyncio.sleep(1)
                with pytest.raises(DeadlineExceeded, match=r"waited 4\.000 s"):
                    await virtual.call(ask(), who(2), Hints(deadline_s=4))
                return virtual.clock()

        assert virtual.run(main()) == pytest.approx(5.0)


def test_slots_and_their_background_work_run_in_virtual_time() -> None:
    slots = Probe(capabilities={**dict.fromkeys(Capability, Support.UNSUPPORTED)}, slots=2)
    adapters = {"a": StillAdapter(slots)}
    seen: list[Any] = []

    def request_of(inflight: Any) -> Request:
        seen.append(inflight.request_fields()["told"].slot)
        return ten_seconds(inflight)

    with VirtualServing({Backend("a", "http://a/v1"): Metronome()}, request_of, adapters=adapters) as virtual:

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                for n in range(6):
                    group.create_task(virtual.call(ask(), who(n)))

        virtual.run(main())
    assert sorted(seen) == [0, 0, 0, 1, 1, 1]


def test_background_work_and_its_timers_are_the_loops() -> None:
    with VirtualServing({Backend("a", "http://a/v1"): Metronome()}, ten_seconds) as virtual:
        background, fired = virtual.serving.background, list[float]()

        async def work() -> float:
            await asyncio.sleep(5)
            return virtual.clock()

        assert background.submit(work()).result(0) == 5, "while the loop stands still, it is done at once"

        async def main() -> float:
            background.call_later(60, lambda: fired.append(virtual.clock()))
            return await asyncio.wrap_future(background.submit(work()))

        assert virtual.run(main()) == 10
        assert not fired
        virtual.clock.run()
        assert fired == [65]
    background.call_later(1, lambda: fired.append(0))
    virtual.clock.run()
    assert fired == [65]
    with pytest.raises(OrlaClosed):
        background.submit(work())


def test_an_engine_that_never_ends_is_a_deadlock() -> None:
    class Stuck(Metronome):
        def next_event_s(self) -> float | None:
            return None

    with VirtualServing({Backend("a", "http://a/v1"): Stuck()}, ten_seconds) as virtual:
        with pytest.raises(Deadlock, match="every task waits"):
            virtual.run(virtual.call(ask(), who(1)))


def test_after_its_end_it_takes_no_calls() -> None:
    virtual = VirtualServing({Backend("a", "http://a/v1"): Metronome()}, ten_seconds)
    began = time.perf_counter()
    virtual.close()
    virtual.close()
    assert time.perf_counter() - began < 60, "closing waits for nothing"
    with pytest.raises(OrlaClosed):
        run(virtual.call(ask(), who(1)))


def an_hour(seed: int, stage_policy: str) -> tuple[list[Record], float]:
    """An hour of calls of two stages at two simulated engines; the draft of each workflow comes before its answer."""
    draw = random.Random(seed)
    backends = {Backend(name, f"http://{name}/v1", max_concurrency=16): SimEngine(PARAMETERS) for name in ("a", "b")}

    def request_of(inflight: Any) -> SimRequest:
        hashes = [hash((inflight.call.identity.workflow, block)) for block in range(20)]
        return SimRequest(inflight.call.id, prompt_tokens=400, output_tokens=60, hashes=hashes)

    mapper = ExplicitMapper({"draft": "a", "answer": "b"})
    with VirtualServing(backends, request_of, mapper=mapper, stage_policy=stage_policy) as virtual:

        async def workflow(n: int) -> None:
            await virtual.call(ask(1600), who(n, "draft"))
            await virtual.call(ask(1600), who(n, "answer"), Hints(priority=float(n % 3)))

        async def main() -> float:
            async with asyncio.TaskGroup() as group:
                n = 0
                while virtual.clock() < HOUR_S:
                    await asyncio.sleep(draw.expovariate(0.8))
                    group.create_task(workflow(n := n + 1))
            return virtual.clock()

        ended_s = virtual.run(main())
        virtual.serving.check_integrity()
        return virtual.serving.records.records(), ended_s


PARAMETERS = EngineParameters()


def told(records: list[Record]) -> list[Any]:
    return [replace(record, id="") for record in records]


def test_an_hour_of_two_simulated_engines_in_seconds_and_the_same_again() -> None:
    began = time.perf_counter()
    records, ended_s = an_hour(1, "priority")
    took_s = time.perf_counter() - began
    again, _ = an_hour(1, "priority")
    other, _ = an_hour(2, "priority")
    assert ended_s > HOUR_S > 20 * took_s
    assert len(records) > 5000 and all(record.error is None for record in records)
    assert told(records) == told(again)
    assert told(records) != told(other)
