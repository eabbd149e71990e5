from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from orla_lg.core.call import Assignment, Call, Hints
from orla_lg.core.engine.backend import Probe
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import pass_by, serve
from orla_lg.core.limits.usage import expected
from orla_lg.core.memory.events import CacheEvent, EventKind
from orla_lg.core.placement.view import BackendView
from orla_lg.core.policies import policies
from orla_lg.core.record import CallEvent, Happening
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Sleep, Wait, WaitForTurn, adrive, drive
from orla_lg.core.workflow import Outcome
from orla_lg.errors import BackendUnavailable, DeadlineExceeded, MappingError, OrlaClosed, QueueFull
from tests.core.fakes import Engine, HandBackground, HandClock, Sender, a_serving, identity, is_quiet, new_call, step


def busy() -> AttemptFailed:
    return AttemptFailed(RuntimeError("busy"))


def gone() -> AttemptFailed:
    return AttemptFailed(ConnectionError("refused"), unreachable=True)


class To:
    """A mapper that always answers the same."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment

    def map(self, call: Call, backends: list[BackendView]) -> Assignment:
        return self.assignment


Run = Callable[[Any], Any]
BOTH = pytest.mark.parametrize("run", [drive, lambda steps: asyncio.run(adrive(steps))], ids=["sync", "async"])


# One call


@pytest.mark.parametrize(
    ("mapped", "asked", "answer"),
    [({}, None, 80.0), ({"max_tokens": 10}, None, 10.0), ({"max_tokens": 10}, 20, 20.0)],
)
def test_a_mappings_bound_on_the_answer_counts_for_limits_and_in_the_queue_alike(
    mapped: dict[str, Any], asked: int | None, answer: float
) -> None:
    serving = a_serving()
    call, scheduler = new_call(serving), serving.schedulers["b"]
    call.call.ask, call.call.answer_tokens = replace(call.call.ask, max_tokens=asked), 80.0
    assignment = Assignment("b", parameters=mapped)
    aside = expected(call.call, assignment, scheduler.backend.cost, None)
    call.enter(scheduler, assignment)
    assert call.call.expected_answer_tokens == answer
    assert call.call.expected_tokens == pytest.approx(aside.tokens, abs=1), "the prompt's part is rounded there"
    call.finish(RuntimeError("left"))


@BOTH
def test_a_call_leaves_a_record_and_nothing_else(run: Run) -> None:
    serving, told = a_serving(), []
    assert run(serve(new_call(serving), Sender("hello"), told.append)) == "hello"
    assert is_quiet(serving)
    (record,) = serving.records.records()
    assert told == [record] and record.asdict()["backend"] == "b"
    assert (record.attempts, record.error, record.model) == (1, None, "m")
    assert serving.statistics().calls == 1


@BOTH
def test_what_a_sender_raises_reaches_the_caller_and_the_grant_comes_back(run: Run) -> None:
    serving = a_serving(max_concurrency=1)
    for error in (ValueError("400"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            run(serve(new_call(serving), Sender(error)))
        assert is_quiet(serving)
    assert [r.error for r in serving.records.records()] == ["ValueError: 400", "KeyboardInterrupt: "]


def test_a_stream_keeps_its_grant_until_it_ends() -> None:
    serving = a_serving(max_concurrency=1)
    (inflight,) = step(serve(new_call(serving), Sender("stream")))
    waiting = serve(new_call(serving), Sender())
    wait = step(waiting)
    assert isinstance(wait, WaitForTurn) and not wait.turn.settled
    inflight.finish()
    assert wait.turn.settled and step(waiting) == ("answer",)
    assert is_quiet(serving)


def test_a_call_from_within_a_stream_does_not_wait_for_it() -> None:
    serving = a_serving(max_concurrency=1)
    outer = drive(serve(new_call(serving), Sender("stream")))
    assert drive(serve(new_call(serving), Sender())) == "answer"
    assert serving.statistics().backends["b"].queue.extra == 1
    outer.finish()
    assert is_quiet(serving)


# Trying again


def test_it_pauses_and_tries_again_holding_no_grant() -> None:
    serving = a_serving(max_concurrency=1)
    steps = serve(new_call(serving), Sender(busy(), max_attempts=2))
    pause = step(steps)
    assert isinstance(pause, Sleep) and 0.125 <= pause.seconds <= 0.25
    assert is_quiet(serving)
    assert step(steps) == ("answer",)
    assert serving.records.records()[0].attempts == 2


def test_a_call_that_comes_back_goes_before_those_that_came_later() -> None:
    serving = a_serving(max_concurrency=1)
    first = serve(new_call(serving), Sender(busy()))
    assert isinstance(step(first), Sleep)
    (stream,) = step(serve(new_call(serving), Sender("stream")))
    later, again = step(serve(new_call(serving), Sender())), step(first)
    stream.finish()
    assert again.turn.settled and not later.turn.settled


def test_the_engines_own_error_comes_out_when_attempts_are_spent() -> None:
    serving = a_serving()
    steps = serve(new_call(serving), Sender(busy(), busy(), max_attempts=2))
    step(steps)
    with pytest.raises(RuntimeError, match="busy"):
        step(steps)
    assert is_quiet(serving)


def test_unreachable_engines_are_named_and_probed_again() -> None:
    serving = a_serving("one", "two")
    background = HandBackground(serving.clock)
    for scheduler in serving.schedulers.values():
        scheduler.health._background = background
    to = To(Assignment("one", alternatives=("two",)))
    sender = Sender(gone(), gone(), max_attempts=1)
    with pytest.raises(BackendUnavailable, match=r"'one' \(http://one/v1\), 'two' \(http://two/v1\) in 2 attempts"):
        step(serve(new_call(serving, mappers=[to]), sender))
    assert sender.sent == [("one", "m"), ("two", "m")] and is_quiet(serving)
    assert not serving.schedulers["one"].health.known
    assert step(serve(new_call(serving, mappers=[to]), Sender())) == ("answer",), "nobody waits for a probe"
    assert len(background.work) == 2
    background.do_all()
    assert serving.schedulers["one"].health.known


def test_rerouting_is_immediate_and_keeps_what_was_decided() -> None:
    serving = a_serving("one", "two")
    call = new_call(serving, mappers=[To(Assignment("one", mapper="mine", reason="so", alternatives=("two",)))])
    assert step(serve(call, Sender(busy()))) == ("answer",)
    (record,) = serving.records.records()
    assert (record.backend, record.mapper, record.attempts) == ("two", "mine", 2)
    assert record.reason == "so; instead of 'one': busy"


# The circuit


def tripped() -> Serving:
    serving = a_serving("one", "two")
    for _ in range(5):
        serving.schedulers["one"].health.failed(BackendUnavailable("down"), unreachable=False)
    return serving


def test_an_open_circuit_sends_calls_elsewhere_at_once() -> None:
    serving, sender = tripped(), Sender()
    to = To(Assignment("one", alternatives=("two",)))
    assert step(serve(new_call(serving, mappers=[to]), sender)) == ("answer",)
    assert sender.sent == [("two", "m")] and serving.records.records()[0].attempts == 1
    assert serving.views()[0].circuit is Circuit.OPEN


def test_an_open_circuit_without_alternative_spends_attempts_without_sending() -> None:
    serving, sender = tripped(), Sender(max_attempts=2)
    steps = serve(new_call(serving, mappers=[To(Assignment("one"))]), sender)
    assert isinstance(step(steps), Sleep)
    with pytest.raises(BackendUnavailable, match=r"circuit of backend 'one' is open .* the last: down"):
        step(steps)
    assert not sender.sent and is_quiet(serving)


def test_while_one_call_tries_the_others_wait_and_go_when_it_has_its_first_token() -> None:
    serving = tripped()
    background = serving.schedulers["one"].health._background = HandBackground(serving.clock)
    serving.clock.now += 1.0
    calls = [new_call(serving, mappers=[To(Assignment("one"))]) for _ in range(3)]
    (trial,) = step(serve(calls[0], Sender("stream")))
    late = calls[2]
    late.call.hints = Hints(deadline_s=2.0)
    waiting, hurried = serve(calls[1], Sender()), serve(late, Sender())
    wait, short = step(waiting), step(hurried)
    assert (wait.timeout_s, short.timeout_s, wait.future) == (10.0, 2.0, short.future)
    serving.clock.now += 2.0
    with pytest.raises(DeadlineExceeded):
        hurried.throw(TimeoutError())
    trial.first_token()
    background.advance(0.0)
    assert wait.future.done() and step(waiting) == ("answer",)
    trial.finish()
    assert is_quiet(serving)


def test_a_stream_that_breaks_counts_against_its_engine() -> None:
    serving = a_serving()
    scheduler = serving.schedulers["b"]
    scheduler.health._background = HandBackground(serving.clock)  # nobody probes the engine behind our back
    (stream,) = step(serve(new_call(serving), Sender("stream")))
    stream.broke(ConnectionError("reset"))
    assert scheduler.health.breaker.failures == 1 and not scheduler.health.known
    assert stream.record.error == "ConnectionError: reset"
    assert step(serve(new_call(serving), Sender())) == ("answer",)
    assert scheduler.health.breaker.failures == 0, "an answer is a sign of life"


@pytest.mark.parametrize(("marks", "failures"), [({"overloaded": True}, 0), ({"elsewhere": True}, 0), ({}, 1)])
def test_an_engine_that_answers_not_now_is_well(marks: dict[str, bool], failures: int) -> None:
    serving = a_serving("one", "two")
    to = To(Assignment("one", alternatives=("two",)))
    step(serve(new_call(serving, mappers=[to]), Sender(AttemptFailed(RuntimeError("429"), **marks))))
    assert serving.schedulers["one"].health.breaker.failures == failures


def test_a_model_that_is_gone_is_not_asked_for_again() -> None:
    serving, sender = a_serving(), Sender(AttemptFailed(RuntimeError("404"), elsewhere=True), max_attempts=5)
    with pytest.raises(RuntimeError, match="404"):
        step(serve(new_call(serving), sender))
    assert len(sender.sent) == 1


# Waiting


def test_a_deadline_ends_the_wait_with_numbers() -> None:
    serving = a_serving(max_concurrency=1)
    step(serve(new_call(serving), Sender("stream")))
    inflight = new_call(serving)
    inflight.call.hints = Hints(deadline_s=2.0)
    steps = serve(inflight, Sender())
    wait = step(steps)
    assert wait.timeout_s == 2.0
    serving.clock.now += 2.0
    with pytest.raises(DeadlineExceeded, match=r"waited 2.000 s for backend 'b', the deadline was 2.0 s; 1 call in"):
        steps.throw(TimeoutError())
    assert serving.schedulers["b"].queue.waiting == 0


def test_a_deadline_that_passed_during_a_pause_sends_nothing_more() -> None:
    serving = a_serving()
    inflight = new_call(serving)
    inflight.call.hints = Hints(deadline_s=0.1)
    sender = Sender(busy())
    steps = serve(inflight, sender)
    step(steps)
    serving.clock.now += 0.2
    with pytest.raises(DeadlineExceeded):
        step(steps)
    assert len(sender.sent) == 1 and is_quiet(serving)


def test_a_full_queue_refuses() -> None:
    serving = a_serving(max_concurrency=1, capacity=0)
    step(serve(new_call(serving), Sender("stream")))
    with pytest.raises(QueueFull):
        step(serve(new_call(serving), Sender()))


@pytest.mark.parametrize("granted_first", [True, False])
def test_cancelled_at_the_moment_of_its_grant(granted_first: bool) -> None:
    serving = a_serving(max_concurrency=1)
    (stream,) = step(serve(new_call(serving), Sender("stream")))
    steps = serve(new_call(serving), Sender())
    wait, after = step(steps), serve(new_call(serving), Sender())
    wait_after = step(after)
    assert isinstance(wait, WaitForTurn)
    if granted_first:
        stream.finish()
        assert wait.turn.settled
    with pytest.raises(asyncio.CancelledError):
        steps.throw(asyncio.CancelledError())
    stream.finish()
    assert wait_after.turn.settled and step(after) == ("answer",)
    assert is_quiet(serving)


def test_dropped_wherever_it_is_it_leaves_nothing() -> None:
    serving = a_serving(max_concurrency=1)
    step(serve(new_call(serving), Sender("stream")))
    for sender in (Sender(), Sender(busy())):
        steps = serve(new_call(serving), sender)
        step(steps)
        steps.close()
    assert serving.schedulers["b"].queue.waiting == 0 and serving.schedulers["b"].queue.in_flight == 1


# The first probe


def unknown(engine: Engine | None = None) -> tuple[Serving, HandBackground]:
    serving = a_serving(known=False, engine=engine)
    background = HandBackground(serving.clock)
    serving.schedulers["b"].health._background = background
    return serving, background


def test_a_first_call_waits_for_its_engine_to_say_what_it_is() -> None:
    serving, background = unknown(Engine(Probe(slots=1)))
    steps = serve(new_call(serving), Sender())
    wait = step(steps)
    assert isinstance(wait, Wait) and wait.timeout_s == 3.0
    background.do_all()
    assert step(steps) == ("answer",)
    assert serving.records.records()[0].cache_action == "claimed"


def test_its_patience_is_bounded() -> None:
    serving, background = unknown()
    steps = serve(new_call(serving), Sender())
    step(steps)
    assert step(steps, TimeoutError()) == ("answer",)
    background.do_all()


def test_closed_while_it_waits_for_a_probe() -> None:
    serving, background = unknown()
    steps = serve(new_call(serving), Sender())
    step(steps)
    serving.close()
    background.do_all()
    with pytest.raises(OrlaClosed):
        step(steps)


async def test_one_cancelled_caller_does_not_end_the_probe_of_others() -> None:
    class Slow(Engine):
        async def probe(self) -> Probe:
            await asyncio.wrap_future(answer)
            return Probe()

    answer: Future[None] = Future()
    serving = a_serving(known=False, engine=Slow())
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        callers = [group.create_task(adrive(serve(new_call(serving), Sender()))) for _ in range(2)]
        await asyncio.sleep(0)
        callers[0].cancel()
        await asyncio.sleep(0)
        answer.set_result(None)
        assert await callers[1] == "answer"
    serving.close()


# Not ours, and the end


def test_unplaced_calls_pass_if_they_may() -> None:
    serving = a_serving()
    assert step(serve(new_call(serving, "gpt-9", may_pass=True), Sender("theirs"))) == ("theirs",)
    assert step(pass_by(new_call(serving, "gpt-9"), Sender("theirs"))) == ("theirs",)
    with pytest.raises(RuntimeError):
        step(pass_by(new_call(serving), Sender(RuntimeError("no"))))
    with pytest.raises(MappingError, match="neither a backend nor served"):
        step(serve(new_call(serving, "gpt-9"), Sender()))
    assert [r.external for r in serving.records.records()] == [True, True, True, False]
    assert serving.statistics().external == 3
    serving.book.lost()
    assert serving.statistics().unidentified == 1


def test_who_passes_us_by_is_warned_of_once_for_each_model(caplog: pytest.LogCaptureFixture) -> None:
    serving = a_serving()
    for model in ("gpt-9", "gpt-9", "gpt-10"):
        step(serve(new_call(serving, model, may_pass=True), Sender("theirs")))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2 and "'gpt-9'" in told[0] and "mapper={'*': 'b'}" in told[0]


def test_after_close_calls_raise_and_those_waiting_too() -> None:
    engine = Engine()
    serving = a_serving(max_concurrency=1, engine=engine)
    (stream,) = step(serve(new_call(serving), Sender("stream")))
    wait = step(serve(new_call(serving), Sender()))
    serving.close()
    serving.close()
    with pytest.raises(OrlaClosed):
        wait.turn.result()
    assert engine.closed
    with pytest.raises(OrlaClosed):
        step(serve(new_call(serving), Sender()))
    stream.finish()


# What the graph tells


class Listening:
    """A memory policy that only listens."""

    def __init__(self) -> None:
        self.heard: list[CacheEvent] = []

    def decide(self, event: CacheEvent) -> tuple[()]:
        self.heard.append(event)
        return ()


def test_runs_calls_and_threads_reach_the_memory_policy() -> None:
    listening = Listening()
    serving = a_serving("one", "two", memory=listening)
    serving.progress.run_started("r", thread="t")
    for backend in ("one", "two", "two"):
        step(serve(new_call(serving, backend, identity("t", run="r")), Sender()))
    serving.progress.run_ended("r", Outcome.DONE)
    serving.progress.run_ended("r", Outcome.DONE)
    serving.progress.thread_deleted("t")
    kinds = [(event.kind, event.backend) for event in listening.heard]
    done = EventKind.CALL_DONE
    assert kinds == [
        (done, "one"), (EventKind.SWITCHED, "one"), (done, "two"), (done, "two"),
        (EventKind.IDLE, None), (EventKind.THREAD_DELETED, None),
    ]  # fmt: skip
    assert all(scheduler.statistics().memory.workflows == 0 for scheduler in serving.schedulers.values()), (
        "final: forgotten anyway"
    )


def test_a_workflow_without_a_thread_leaves_no_cache_behind() -> None:
    serving = a_serving("one", "two", memory="flush_per_request")
    serving.progress.run_started("r", thread=None)
    step(serve(new_call(serving, "one", identity("r", run="r")), Sender()))
    serving.progress.run_ended("r", Outcome.DONE)
    assert serving.schedulers["one"].statistics().memory.effects == {"flush:unsupported": 1}


def test_an_action_for_one_backend_leaves_the_others_alone() -> None:
    serving = a_serving("one", "two")
    serving.progress.run_started("r", thread=None)
    for backend in ("one", "two"):
        inflight = new_call(serving, backend, identity("r", run="r"))
        inflight.call.hints = Hints(cache="preserve")
        step(serve(inflight, Sender()))
    serving.memory.signal([CacheEvent(EventKind.CALL_DONE, "r", "one", "flush")])
    flushed = [
        "flush:unsupported" in scheduler.statistics().memory.effects for scheduler in serving.schedulers.values()
    ]
    assert flushed == [True, False]


def test_prioritize_moves_waiting_calls_and_those_on_their_way() -> None:
    serving = a_serving(max_concurrency=1)
    scheduler = serving.schedulers["b"]
    scheduler.queue.change_policies(policies("one", "priority", "priority"), 0.0)
    serving.progress.run_started("r", thread=None)
    mine = identity("r", run="r")
    early = new_call(serving, who=mine)
    (stream,) = step(serve(new_call(serving), Sender("stream")))
    other, waiting = (step(serve(new_call(serving, who=who), Sender())) for who in (identity(), mine))
    said = new_call(serving, who=mine, said=Hints(priority=-1.0))
    step(serve(said, Sender()))
    assert serving.steering.prioritize("r", 5.0) and not serving.steering.prioritize("unknown", 5.0)
    step(serve(early, Sender()))
    assert (early.call.priority, said.call.priority) == (5.0, -1.0)
    stream.finish()
    assert waiting.turn.settled and not other.turn.settled


def test_listeners_hear_every_turn() -> None:
    serving = a_serving(max_concurrency=1)
    heard: list[CallEvent] = []
    stop = serving.records.subscribe(heard.append)
    serving.progress.run_started("r", thread=None)
    (stream,) = step(serve(new_call(serving), Sender("stream")))
    steps = serve(new_call(serving), Sender())
    step(steps)
    stream.first_token()
    stream.finish()
    step(steps)
    serving.progress.run_ended("r", Outcome.DONE)
    stop()
    serving.progress.run_started("s", thread=None)
    expected = "run_started dispatched queued first_token finished dispatched finished run_ended"
    assert " ".join(event.kind for event in heard) == expected
    assert heard[4].kind is Happening.FINISHED and heard[4].record.id == heard[4].call


# Threads and loops at once


class Counting:
    """A sender that counts who is inside at once; it yields to others while it is."""

    max_attempts = 1

    def __init__(self) -> None:
        self.lock, self.inside, self.most, self.ended = threading.Lock(), 0, 0, 0
        self.pause = threading.Event()

    def count(self, change: int) -> None:
        with self.lock:
            self.inside += change
            self.most = max(self.most, self.inside)
            self.ended += change < 0

    def send(self, inflight: InFlightCall) -> None:
        self.count(+1)
        self.pause.wait(0.001)
        self.count(-1)
        inflight.finish()

    async def asend(self, inflight: InFlightCall) -> None:
        self.count(+1)
        try:
            await asyncio.sleep(0.001)
        finally:
            self.count(-1)
        inflight.finish()


@pytest.mark.parametrize("slots", [None, 3])
def test_threads_and_two_loops_share_one_backend(slots: int | None) -> None:
    serving = a_serving(probe=Probe(slots=slots), clock=time.monotonic, max_concurrency=3)
    sender = Counting()

    def call(n: int) -> Any:
        return serve(new_call(serving, who=identity(f"w{n % 7}", f"s{n % 3}")), sender)

    async def many(first: int) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(adrive(call(first + n))) for n in range(60)]
            for task in tasks[::6]:
                await asyncio.sleep(0)
                task.cancel()

    with ThreadPoolExecutor(12) as pool:
        loops = [pool.submit(asyncio.run, many(n)) for n in range(2)]
        threads = [pool.submit(drive, call(n)) for n in range(80)]
        for future in (*loops, *threads):
            future.result(30)
    assert is_quiet(serving)
    assert sender.most == 3 and sender.inside == 0
    assert len(serving.records.records()) == 200
    serving.close()


def test_a_call_without_identity_of_its_run_keeps_its_hints() -> None:
    serving = a_serving(clock=HandClock())
    call = new_call(serving, who=identity("t", run="gone"))
    assert step(serve(call, Sender())) == ("answer",)
    assert call.call.priority == 0.0
