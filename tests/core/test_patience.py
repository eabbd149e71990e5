"""Every wait of a call ends at the earliest of its deadline, its run's end, its caller's time-out, and ``close``."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import Future
from typing import Any

import pytest

from orla_lg.core.call import CallerTimeout, Hints
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import serve
from orla_lg.core.limits.patience import left_of
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Pauses, Sleep, Wait, WaitForTurn, adrive, drive
from orla_lg.errors import DeadlineExceeded, OrlaClosed
from tests.core.fakes import Sender, a_call, a_serving, is_quiet, step
from tests.core.test_serving import new_call


class TimedOut(Exception):
    """What the caller's client raises."""


def asked_to_wait(seconds: float) -> AttemptFailed:
    return AttemptFailed(RuntimeError("busy"), overloaded=True, retry_after_s=seconds)


def hurried(serving: Serving, timeout_s: float | None = None, **hints: Any) -> Any:
    timeout = None if timeout_s is None else CallerTimeout(timeout_s, TimedOut)
    return new_call(serving, said=Hints(**hints), timeout=timeout)


@pytest.mark.parametrize(("timeout_s", "hints"), [(2.0, {}), (None, {"deadline_s": 4.0}), (9.0, {"deadline_s": 4.0})])
def test_a_pause_that_an_engine_asks_for_and_that_does_not_fit_is_its_error_at_once(
    timeout_s: float | None, hints: dict[str, Any]
) -> None:
    serving = a_serving()
    with pytest.raises(RuntimeError, match="busy"):
        step(serve(hurried(serving, timeout_s, **hints), Sender(asked_to_wait(5.0), max_attempts=2)))
    assert is_quiet(serving)
    pause = step(serve(hurried(serving, 20.0, deadline_s=20.0), Sender(asked_to_wait(5.0), max_attempts=2)))
    assert isinstance(pause, Sleep) and pause.seconds == 5.0


@pytest.mark.parametrize(
    ("timeout_s", "hints", "waits_s", "error"),
    [
        (None, {"deadline_s": 4.0}, 4.0, DeadlineExceeded), (3.0, {"deadline_s": 4.0}, 3.0, TimedOut),
        (5.0, {"deadline_s": 4.0}, 4.0, DeadlineExceeded), (3.0, {}, 3.0, TimedOut), (None, {}, None, None),
    ],
)  # fmt: skip
def test_the_wait_in_a_queue_ends_at_the_earliest(
    timeout_s: float | None, hints: dict[str, Any], waits_s: float | None, error: type[Exception] | None
) -> None:
    serving = a_serving(max_concurrency=1)
    (stream,) = step(serve(new_call(serving), Sender("stream")))
    steps = serve(hurried(serving, timeout_s, **hints), Sender(max_attempts=1))
    wait = step(steps)
    assert isinstance(wait, WaitForTurn) and wait.timeout_s == waits_s
    if error is not None:
        serving.clock.now += waits_s or 0.0
        with pytest.raises(error, match="waited"):
            step(steps, TimeoutError())
    stream.finish()


def test_the_wait_is_as_long_as_the_client_would_take_for_all_its_attempts() -> None:
    serving = a_serving(max_concurrency=1)
    (stream,) = step(serve(new_call(serving), Sender("stream")))
    wait = step(serve(hurried(serving, 3.0), Sender(max_attempts=3)))
    assert wait.timeout_s == 9.0
    stream.finish()


def within_a_second(wait: Any, turn: Any, in_a_task: bool) -> float:
    """Carry out *wait* in a thread or a task, and end all pauses meanwhile."""
    pauses, took = turn, time.monotonic()

    def steps() -> Any:
        with pauses.one() as one:
            yield wait(one)

    ending = threading.Timer(0.02, lambda: pauses.end(OrlaClosed("closed")))
    ending.start()
    with pytest.raises(OrlaClosed):
        asyncio.run(adrive(steps())) if in_a_task else drive(steps())
    ending.join()
    return time.monotonic() - took


@pytest.mark.parametrize("in_a_task", [False, True])
@pytest.mark.parametrize("wait", [lambda turn: Sleep(60.0, turn), lambda turn: Wait(Future(), 60.0, turn)])
def test_closing_ends_pauses(wait: Any, in_a_task: bool) -> None:
    assert within_a_second(wait, Pauses(), in_a_task) < 5.0


@pytest.mark.parametrize("in_a_task", [False, True])
def test_a_pause_that_nothing_ends_passes_and_leaves_nothing(in_a_task: bool) -> None:
    pauses, done = Pauses(), Future[None]()
    done.set_result(None)

    def steps() -> Any:
        with pauses.one() as turn:
            yield Sleep(0.001, turn)
        with pauses.one() as turn:
            yield Wait(done, 60.0, turn)
        with pauses.one() as turn:
            try:
                yield Wait(Future(), 0.001, turn)
            except TimeoutError:
                return "late"

    assert (asyncio.run(adrive(steps())) if in_a_task else drive(steps())) == "late"
    assert not pauses._turns
    pauses.end(OrlaClosed("closed"))
    with pytest.raises(OrlaClosed):
        drive(steps())


def test_closing_ends_a_pause_and_a_trial_of_calls() -> None:
    serving = a_serving()
    scheduler = serving.schedulers["b"]
    pausing = serve(new_call(serving), Sender(asked_to_wait(60.0), max_attempts=2))
    pause = step(pausing)
    scheduler.health.probe = None
    scheduler.health._clock = serving.clock
    scheduler.health._probed_s = float("-inf")  # not just now
    asked = scheduler.health.connect()
    assert asked is not None
    serving.close()
    assert asked.done(), "the wait for a probe ends too"
    with pytest.raises(OrlaClosed):
        pause.run()
    with pytest.raises(OrlaClosed):
        step(pausing, OrlaClosed("closed"))
    assert is_quiet(serving)


def test_what_is_left_of_a_call() -> None:
    services = a_serving().services
    inflight = InFlightCall(services, a_call(at_s=10.0, deadline_s=5.0))
    assert left_of(inflight, 12.0) == 3.0 and left_of(InFlightCall(services, a_call()), 1.0) == float("inf")
