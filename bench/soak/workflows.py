"""The graph, one run of it, and what each of its calls is to meet."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypedDict

from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph

from orla_lg.testing.faults import Fault

ATTEMPTS = 3
SAMPLES = 3
"""Calls of a node, one after another: LangGraph's own work on a run is more than that of a call."""
PLANS = 2 + 4 * SAMPLES
"""Calls of a run at most."""
FORMS = ("invoke", "ainvoke", "stream", "astream")
TRANSIENT = (
    Fault.RESET, Fault.DEAD_BEFORE_HEADERS, Fault.DEAD_IN_PREFILL, Fault.BUSY, Fault.BUSY_UNTIL, Fault.GARBAGE,
    Fault.HTML_PAGE, Fault.OVERLOADED, Fault.BROKEN,
)  # fmt: skip
"""Before the first token: another attempt may succeed."""
MID_STREAM = (Fault.DEAD_MID_STREAM, Fault.ERROR_EVENT, Fault.NO_DONE, Fault.TRUNCATED_JSON)
HARMLESS = (
    Fault.SLOW_FIRST_TOKEN, Fault.SLOW_TOKENS, Fault.NO_USAGE, Fault.NEGATIVE_TOKENS, Fault.CACHED_ABOVE_PROMPT,
)  # fmt: skip


class Edge(StrEnum):
    """Where a run goes after its first stage."""

    ON = "on"
    OVER = "over"
    """A backend that refuses connections, and another that takes over."""
    GONE = "gone"
    """A backend that refuses connections, and no other."""


@dataclass(frozen=True)
class Plan:
    """What a call meets: a fault, so many times."""

    fault: Fault | None = None
    times: int = 0

    @property
    def doomed(self) -> bool:
        """Whether no attempt of the call can succeed."""
        return self.fault in TRANSIENT and self.times >= ATTEMPTS

    @property
    def may_fail(self) -> bool:
        """Whether a call that fails is matched by this."""
        return self.fault is not None and self.fault not in HARMLESS


SHARES = ((0.90, (), 0), (0.94, HARMLESS, 1), (0.975, TRANSIENT, 1), (0.985, TRANSIENT, ATTEMPTS),
          (1.0, MID_STREAM, ATTEMPTS))  # fmt: skip
"""Up to which draw a call meets one of these faults, so many times."""


def draw_plan(dice: random.Random) -> Plan:
    """Return what a call meets: mostly nothing."""
    drawn = dice.random()
    _, faults, times = next(row for row in SHARES if drawn < row[0])
    return Plan(dice.choice(faults), times) if faults else Plan()


@dataclass(eq=False)
class Run:
    """One run of the graph: what is planned, and what came of it."""

    number: int
    id: str
    form: str
    way: Edge
    thread: str
    plans: tuple[Plan, ...]
    cancel_after_s: float | None = None
    begun: list[Plan] = field(default_factory=list)
    """The plans of the calls that its nodes began."""
    records: int = 0
    error: BaseException | None = None
    cancelled: bool = False
    wrong: str = ""
    ended_s: float | None = None


class State(TypedDict, total=False):
    text: str
    """The last answer."""


class Graphs:
    """The graph; its nodes find their run by the number in the config.

    For the controls that must fail, one call in *hidden* meets a fault that no plan has, and one stream in *hold* is
    kept open; 0: none.
    """

    def __init__(self, url: str, *, hidden: int = 0, hold: int = 0) -> None:
        self.runs: dict[int, Run] = {}
        self.held: list[Any] = []
        self._hidden, self._hold, self._streams = hidden, hold, 0
        self._model = ChatOpenAI(
            base_url=url, model="stub-model", api_key="none", max_retries=ATTEMPTS - 1, timeout=10.0
        )  # type: ignore[call-arg, arg-type]
        inner = StateGraph(State).add_edge(START, "look").add_edge("look", "judge")
        outer = (
            StateGraph(State)
            .add_edge(START, "draft")
            .add_conditional_edges("draft", self._way, {"on": "inner", "over": "over", "gone": "gone"})
        )
        for name, graph in (("look", inner), ("judge", inner), ("draft", outer), ("over", outer), ("gone", outer)):
            graph.add_node(name, self._asking(name))
        outer.add_node("inner", inner.compile())
        outer.add_node("send", RunnableLambda(self._stream, self._astream))
        outer.add_edge("over", "inner").add_edge("gone", "inner").add_edge("inner", "send").add_edge("send", END)
        self.graph = outer.compile(checkpointer=InMemorySaver())

    def _way(self, state: State, config: RunnableConfig) -> str:
        return self._run(config).way.value

    def _run(self, config: RunnableConfig) -> Run:
        return self.runs[config["configurable"]["soak"]]

    def _prompt(self, config: RunnableConfig) -> tuple[Run, str]:
        run = self._run(config)
        position = len(run.begun)
        plan = run.plans[position % len(run.plans)]
        run.begun.append(plan)
        fault, times = plan.fault or "none", plan.times
        if self._hidden and plan.fault is None and hash((run.number, position)) % self._hidden == 0:
            fault, times = Fault.BROKEN, ATTEMPTS
        return run, f"[call {run.number}.{position} {fault} {times}]"

    def _asking(self, name: str) -> Any:
        def ask(state: State, config: RunnableConfig) -> State:
            for _ in range(SAMPLES):
                run, prompt = self._prompt(config)
                state = self._check(run, prompt, self._model.invoke(prompt).content)
            return state

        async def aask(state: State, config: RunnableConfig) -> State:
            for _ in range(SAMPLES):
                run, prompt = self._prompt(config)
                state = self._check(run, prompt, (await self._model.ainvoke(prompt)).content)
            return state

        return RunnableLambda(ask, aask, name=name)

    def _stream(self, state: State, config: RunnableConfig) -> State:
        run, prompt = self._prompt(config)
        chunks = self._model.stream(prompt)
        if self._keeps():
            next(chunks)
            self.held.append(chunks)
            return {"text": ""}
        return self._check(run, prompt, "".join(str(chunk.content) for chunk in chunks))

    async def _astream(self, state: State, config: RunnableConfig) -> State:
        run, prompt = self._prompt(config)
        chunks = self._model.astream(prompt)
        if self._keeps():
            await anext(chunks)
            self.held.append(chunks)
            return {"text": ""}
        return self._check(run, prompt, "".join([str(chunk.content) async for chunk in chunks]))

    def _keeps(self) -> bool:
        self._streams += 1
        return bool(self._hold) and self._streams % self._hold == 0

    @staticmethod
    def _check(run: Run, prompt: str, answer: Any) -> State:
        if prompt not in answer:
            run.wrong = f"asked {prompt!r}, got {answer!r}"
        return {"text": answer}
