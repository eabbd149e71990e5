"""What the tests of tools that start early share: an engine that answers as planned, and a count of what ran."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from langchain_openai import ChatOpenAI

from orla_lg import Backend, Orla
from tests.tools.planned_engine import MODEL, Answer, PlannedEngine

PATIENCE_S = 30.0
"""A guard only: what is waited for comes at once where the machine is idle."""


class Lab:
    """One test: its engine, its ``Orla``, and how often each tool ran.

    With ``awaits`` the engine pauses after the last call of an answer until so many tools began early.
    """

    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()
        self.plan: Sequence[Answer] = ()
        self.awaits = 0
        self.hidden: dict[str, Any] = {}
        """Tools that no code shows."""
        self.orla: Orla | None = None
        self.engine = PlannedEngine(self._answer)

    def _answer(self, body: Any) -> Answer:
        nth = sum(1 for message in body["messages"] if message.get("tool_calls"))
        answer = self.plan[nth] if nth < len(self.plan) else Answer(text="done")
        if not answer.calls or answer.after:
            return answer
        return Answer(answer.calls, answer.text, {len(answer.calls) - 1: self.wait_for_starts}, answer.breaks_after)

    def wait_for_starts(self, count: int | None = None) -> None:
        """Wait until so many tools began early, and their bodies too; at once where none may."""
        if self.orla is None:
            return
        until_s, wanted = time.monotonic() + PATIENCE_S, self.awaits if count is None else count
        while not (self.early.started >= wanted and self._all_run()) and time.monotonic() < until_s:
            time.sleep(0.001)

    def _all_run(self) -> bool:
        """Whether no body of a start still waits for its thread: its call's turn might come first."""
        assert self.orla is not None
        return all(start.began_s or start.outcome.done() for start in self.orla.core.early._all())

    def ran(self, name: str) -> None:
        self.runs[name] += 1

    @property
    def early(self) -> Any:
        assert self.orla is not None
        return self.orla.statistics().early_tools

    def model(self, **settings: Any) -> ChatOpenAI:
        return ChatOpenAI(base_url=self.engine.url, model=MODEL, api_key="none", **{"max_retries": 0, **settings})

    def backend(self, name: str = "main", **settings: Any) -> Backend:
        return Backend(name, self.engine.url, **{"model": MODEL, "assemble": True, **settings})


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    with made.engine:
        yield made


@pytest.fixture
def served(lab: Lab, make_orla: Callable[..., Orla]) -> Callable[..., Any]:
    """Return what wraps a graph by an ``Orla`` at the lab's engine."""

    def wrap(graph: Any, *, backend: dict[str, Any] | None = None, **how: Any) -> Any:
        if lab.orla is None:
            lab.orla = make_orla(lab.backend(**(backend or {})), mapper={"*": "main"})
        return lab.orla.wrap(graph, **how)

    return wrap


def shown(state: Any) -> list[Any]:
    """Return the messages of a final state, without what differs from run to run."""
    return [
        (
            message.type, message.content, getattr(message, "status", None), getattr(message, "artifact", None),
            [(call["name"], call["args"]) for call in getattr(message, "tool_calls", None) or ()],
            message.name,
        )
        for message in state["messages"]
    ]  # fmt: skip
