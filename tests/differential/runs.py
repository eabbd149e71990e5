"""One case's call: bare, in a wrapped graph, and through ``ChatOrla``; and what came of it."""

from __future__ import annotations

import functools
import json
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import httpx2
import openai
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode
from pydantic import BaseModel

from orla_lg.errors import OrlaError
from tests.differential.script import Case
from tests.differential.server import MODEL

TIMEOUT_S = 8.0
WORD = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string"}, "count": {"type": "integer"}},
            "required": ["word", "count"],
        },
    },
}


class Found(BaseModel):
    """What a structured answer is made of."""

    word: str
    count: int


@dataclass(frozen=True)
class Answered:
    """A call that brought something."""

    said: str
    """The content, as JSON."""
    calls: str = "[]"
    finish: str | None = None
    usage: str = "null"
    streamed: str | None = None
    """What the graph's own stream brought piece by piece; ``None`` where the graph was not streamed."""


@dataclass(frozen=True)
class Failed:
    """A call that ended in an error."""

    kind: str
    """What it means; see ``kind_of``."""
    name: str
    """The exception's class, with its module."""
    message: str = field(compare=False)
    born: str = field(default="", compare=False)
    """Where in ``orla_lg`` a raw exception came from; empty for named ones, and for those of others."""


Outcome = Answered | Failed


@dataclass(frozen=True)
class Run:
    """An outcome, and how long it took."""

    outcome: Outcome
    seconds: float
    requests: int = 0
    """How many came of it."""


# The graph, which is the same for all cases


@dataclass(frozen=True)
class Job:
    """What the node is to do."""

    case: Case
    key: str
    model: BaseChatModel

    @property
    def runnable(self) -> Any:
        ask = self.case.ask
        if ask == "plain":
            return self.model
        if ask == "tools":
            return self.model.bind_tools([WORD])
        return self.model.with_structured_output(Found, method=ask)

    @property
    def prompt(self) -> list[Any]:
        return [HumanMessage(f"Answer in JSON. {self.key}.")]

    def do(self) -> Any:
        if self.case.inner == "invoke":
            return self.runnable.invoke(self.prompt)
        found: list[Any] = []
        for piece in self.runnable.stream(self.prompt):
            found.append(piece)
            if self.case.inner == "stop":
                break
        return _sum(found)

    async def ado(self) -> Any:
        if self.case.inner == "invoke":
            return await self.runnable.ainvoke(self.prompt)
        found: list[Any] = []
        async for piece in self.runnable.astream(self.prompt):
            found.append(piece)
            if self.case.inner == "stop":
                break
        return _sum(found)


def _sum(pieces: list[Any]) -> Any:
    if not pieces or not isinstance(pieces[0], AIMessageChunk):
        return pieces[-1] if pieces else None
    return functools.reduce(lambda one, other: one + other, pieces)


class State(TypedDict, total=False):
    """What the graph carries."""

    job: Any
    result: Any


def _node(state: State) -> State:
    return {"result": state["job"].do()}


async def _anode(state: State) -> State:
    return {"result": await state["job"].ado()}


@tool
def look_up(word: str, count: int) -> str:
    """Look a word up."""
    return word * min(count, 3)


@tool
def other(word: str = "") -> str:
    """Look another word up."""
    return word


SAFE = {"look_up": look_up, "other": other}
"""Tools that may start early, where the graph has them; their turn never comes."""


def make_graph(*, with_tools: bool = False) -> Any:
    """Return the graph: one node that makes one call."""
    builder = StateGraph(State).add_node("ask", RunnableLambda(_node, _anode)).add_edge(START, "ask")
    if with_tools:
        builder.add_node("tools", ToolNode(list(SAFE.values()))).add_conditional_edges(
            "ask", lambda _: END, [END, "tools"]
        )
    return builder.compile()


@functools.cache
def bare_model(url: str, key: str, retries: int, stream_usage: bool) -> ChatOpenAI:
    """Return a model as an application makes it."""
    return ChatOpenAI(
        base_url=url, model=MODEL, api_key=key, max_retries=retries, stream_usage=stream_usage, timeout=TIMEOUT_S
    )


# Running


def run(graph: Any, job: Job) -> Run:
    """Run a sync case."""
    begun = time.monotonic()
    pieces: list[Any] = []
    try:
        if job.case.outer == "invoke":
            final = graph.invoke({"job": job})
        else:
            for mode, part in graph.stream({"job": job}, stream_mode=["messages", "values"]):
                final = _take(pieces, mode, part) or {}
        outcome: Outcome = answered(final["result"], None if job.case.outer == "invoke" else pieces)
    except Exception as error:  # what it is, is the test's business
        outcome = failed(error)
    return Run(outcome, time.monotonic() - begun)


async def arun(graph: Any, job: Job) -> Run:
    """Run an async case."""
    begun = time.monotonic()
    pieces: list[Any] = []
    try:
        if job.case.outer == "ainvoke":
            final = await graph.ainvoke({"job": job})
        else:
            async for mode, part in graph.astream({"job": job}, stream_mode=["messages", "values"]):
                final = _take(pieces, mode, part) or {}
        outcome: Outcome = answered(final["result"], None if job.case.outer == "ainvoke" else pieces)
    except Exception as error:  # what it is, is the test's business
        outcome = failed(error)
    return Run(outcome, time.monotonic() - begun)


def _take(pieces: list[Any], mode: str, part: Any) -> Any:
    if mode == "values":
        return part
    pieces.append(part[0].content)
    return None


def answered(result: Any, pieces: list[Any] | None) -> Answered:
    """Return what the node returned, as plain text that compares."""
    streamed = None if pieces is None else json.dumps("".join(str(piece) for piece in pieces))
    if not isinstance(result, AIMessage):
        return Answered(repr(result), streamed=streamed)
    calls = [[call["name"], call["args"], call["id"] or None] for call in result.tool_calls]
    calls += [["invalid", call["name"], call["args"], call["id"] or None] for call in result.invalid_tool_calls]
    return Answered(
        json.dumps([result.content, result.additional_kwargs.get("refusal")]),
        json.dumps(calls),
        result.response_metadata.get("finish_reason"),
        json.dumps(result.usage_metadata, sort_keys=True),
        streamed,
    )


def failed(error: BaseException) -> Failed:
    """Return what an exception says."""
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    named = isinstance(error, openai.OpenAIError | OrlaError | httpx2.HTTPError)
    return Failed(kind_of(error), name, str(error)[:300], "" if named else birthplace(error))


def birthplace(error: BaseException) -> str:
    """Return where an exception was raised if that is in our code, or in what our code called of Python's own."""
    installed = [
        (Path(frame.filename), frame) for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" in frame.filename or "orla_lg" in Path(frame.filename).parts
    ]  # fmt: skip
    path, frame = installed[-1] if installed else (Path(), None)
    return f"{path.name}:{frame.name}" if frame is not None and "orla_lg" in path.parts else ""


def kind_of(error: BaseException) -> str:
    """Return what an error tells its caller: what to do about it, not which words it has.

    ``status X``
        The engine refused with a status; the SDK's class for it.
    ``connection``, ``timeout``
        There was no answer, or it broke off.
    ``answer``
        What came is no answer: as the SDK or LangChain say it, by whatever exception they have.
    ``orla X``
        A named error of ours that stands for none of these.
    """
    if isinstance(error, openai.APIStatusError):
        return f"status {type(error).__name__}"
    if isinstance(error, openai.APITimeoutError | httpx2.TimeoutException):
        return "timeout"
    if isinstance(error, OrlaError):
        return "connection" if isinstance(error, ConnectionError) else f"orla {type(error).__name__}"
    if isinstance(error, openai.APIConnectionError | httpx2.TransportError):
        return "connection"
    return "answer"
