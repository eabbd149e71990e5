"""Early starts by themselves: taken once, bounded in number and time, and none left; and when arguments are equal."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.tools import tool
from pydantic import BaseModel

from orla_lg.core.background import Background
from orla_lg.graph.tools.early import starts
from orla_lg.graph.tools.early.arguments import apart, are_equal
from orla_lg.graph.tools.early.reasons import DropReason
from orla_lg.graph.tools.early.starts import AskingCall, EarlyStart, EarlyStarts
from tests.tools.conftest import PATIENCE_S


@tool
def look(x: int) -> str:
    """Look at x."""
    return f"seen {x}"


class Timer(Background):
    """Calls what is to be called later when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.later: list[Any] = []

    def call_later(self, delay_s: float, function: Any) -> None:
        self.later.append(function)


def start(run: str = "run", x: int = 1, namespace: str = "model:1") -> EarlyStart:
    return EarlyStart(AskingCall("call", run, "model", namespace, 1), look, ((), {"x": x}), {"x": x}, "tools")


def begun(early: EarlyStarts, *made: EarlyStart, body: Any = lambda: "seen") -> list[bool]:
    return [early.begin(each, body, copy_context(), None, Timer()) for each in made]


@pytest.fixture
def early() -> Any:
    made = EarlyStarts()
    yield made
    made.check_integrity()
    made.close()
    assert made.statistics().waiting == 0
    until_s = time.monotonic() + PATIENCE_S
    while made.statistics().in_threads and time.monotonic() < until_s:
        time.sleep(0.002)
    assert made.statistics().in_threads == 0


def test_each_start_is_taken_once_whoever_asks(early: EarlyStarts) -> None:
    assert begun(early, *(start() for _ in range(20))) == [True] * 20
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: early.take("run", look, ((), {"x": 1})), range(40)))
    found = [each for each in taken if each is not None]
    assert len(found) == len(set(found)) == 20
    assert early.is_idle


def test_another_run_tool_or_argument_takes_nothing(early: EarlyStarts) -> None:
    begun(early, start())
    copied = look.model_copy()
    assert early.take("other", look, ((), {"x": 1})) is None
    assert early.take("run", copied, ((), {"x": 1})) is None
    assert early.take("run", look, ((), {"x": 2})) is None
    assert early.take("run", look, ((), {"x": True})) is None
    assert early.take("run", look, ((), {"x": 1})) is not None


def test_of_equal_calls_its_own_graphs_goes_first(early: EarlyStarts) -> None:
    one, other = start(namespace="a:1|model:1"), start(namespace="a:2|model:1")
    begun(early, one, other)
    assert early.take("run", look, ((), {"x": 1}), "a:2|tools:7") is other
    assert early.take("run", look, ((), {"x": 1}), "a:2|tools:8") is one


def test_a_start_that_finds_no_thread_is_not_made(early: EarlyStarts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "THREADS", 3)
    goes_on = threading.Event()
    assert begun(early, *(start(x=x) for x in range(4)), body=lambda: goes_on.wait(PATIENCE_S)) == [True] * 3 + [
        False
    ]
    early.run_ended("run")
    now = early.statistics()
    assert (now.waiting, now.in_threads, now.no_room, now.dropped) == (0, 3, 1, {"run_ended": 3})
    goes_on.set()


def test_of_too_many_of_a_run_the_oldest_goes_and_of_all_the_newest_is_not_made(
    early: EarlyStarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starts, "MOST_OF_A_RUN", 2)
    monkeypatch.setattr(starts, "MOST", 5)
    assert begun(early, *(start(x=x) for x in range(4))) == [True] * 4
    assert [each.arguments[1]["x"] for each in early.of_run("run")] == [2, 3]
    assert early.statistics().dropped == {"too_many": 2}
    assert begun(early, start("b"), start("b"), start("c"), start("c")) == [True] * 3 + [False]


def test_what_waits_too_long_is_dropped(early: EarlyStarts, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer()
    early.begin(start(), lambda: 1, copy_context(), None, timer)
    early.begin(start(), lambda: 1, copy_context(), None, timer)
    assert len(timer.later) == 1, "one timer for all"
    timer.later.pop()()
    assert early.statistics().waiting == 2 and len(timer.later) == 1
    monkeypatch.setattr(starts, "KEEP_S", -1.0)
    timer.later.pop()()
    assert early.statistics().dropped == {"too_long": 2} and not timer.later
    early.begin(start(), lambda: 1, copy_context(), None, timer)
    assert len(timer.later) == 1


def test_after_the_end_nothing_begins(early: EarlyStarts) -> None:
    begun(early, start())
    early.close()
    assert begun(early, start()) == [False]
    assert early.statistics().dropped == {"closed": 1}


def test_dropping_twice_counts_once(early: EarlyStarts) -> None:
    made = start()
    begun(early, made)
    early.drop([made, made], DropReason.CHANGED)
    early.run_ended("run")
    assert early.statistics().dropped == {"changed": 1}


# Arguments


class Where(BaseModel):
    x: int = 1


class Odd:
    def __eq__(self, other: object) -> bool:
        raise RuntimeError("odd")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"x": 1}, {"x": 1}, True), ({"x": 1}, {"x": 1.0}, False), ({"x": 1}, {"x": True}, False),
        ({"x": [1, {"y": None}]}, {"x": [1, {"y": None}]}, True), ({"x": [1]}, {"x": [True]}, False),
        ({"x": [1]}, {"x": (1,)}, False), ({"x": 1}, {"x": 1, "y": None}, False), ({"x": "a"}, {"x": "b"}, False),
        ({"x": Where()}, {"x": Where()}, True), ({"x": Where()}, {"x": Where(x=2)}, False),
        ({"x": float("nan")}, {"x": float("nan")}, False), ({"x": Odd()}, {"x": Odd()}, False), ({}, {}, True),
    ],
)  # fmt: skip
def test_equal_arguments_are_equal_in_kind_too(one: Any, other: Any, equal: bool) -> None:
    assert are_equal(((), one), ((), other)) is equal


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4))
def test_what_a_body_gets_is_equal_and_shares_nothing_that_changes(arguments: dict[str, Any]) -> None:
    (_, copied), original = apart(((), arguments)), ((), arguments)
    assert are_equal(((), copied), original)

    def mutable(value: Any) -> set[int]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        own = {id(value)} if isinstance(value, dict | list) else set()
        return own.union(*map(mutable, inner))

    assert not mutable(copied) & mutable(arguments)
