from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from orla_lg.core.steps import Sleep, Step, Steps, Wait, adrive, drive

BOTH = pytest.mark.parametrize("run", [drive, lambda steps: asyncio.run(adrive(steps))], ids=["sync", "async"])


def waits(*effects: Step) -> Steps:
    for effect in effects:
        try:
            yield effect
        except TimeoutError:
            return "late"
    return "done"


def done(value: object) -> Future[object]:
    future: Future[object] = Future()
    future.set_result(value)
    return future


@BOTH
def test_effects_take_time_and_then_the_steps_go_on(run: Callable[[Steps], Any]) -> None:
    assert run(waits(Sleep(0.0), Wait(done(1), None))) == "done"
    assert run(waits()) == "done"


@BOTH
def test_a_wait_is_bounded(run: Callable[[Steps], Any]) -> None:
    assert run(waits(Wait(Future(), 0.0))) == "late"


@BOTH
def test_what_a_future_brings_is_raised_in_the_steps(run: Callable[[Steps], Any]) -> None:
    broken: Future[object] = Future()
    broken.set_exception(ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        run(waits(Wait(broken, 1.0)))
