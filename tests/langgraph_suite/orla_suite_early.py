"""Tools start early where models are fakes: the watch of a wrapped graph hears their answers as it would an engine's.

A fake answers in one piece, so what passes while an engine decodes is played at the end of its answer: the watch is
made when the fake is asked, hears each tool call, then the whole message; then the tools have a moment to run.
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage, convert_to_openai_messages

from orla_lg import Orla
from orla_lg.graph.context import Core, identify, origin
from orla_lg.graph.tools.declared import DeclaredTools
from orla_lg.graph.tools.early.watch import watch_for
from orla_lg.wires.chat import ask_of
from orla_lg.wires.watching import AnswerWatch, HeardToolCall

MOMENT_S = 0.02
"""So long the tools of an answer may run before it ends; an engine would decode meanwhile."""

GRAPH = "fakes"
"""The name of all graphs, as far as prompts are split."""

Calls = Sequence[tuple[str, Mapping[str, Any]]]
"""Tools by name, and what they are called with."""


class Hearing:
    """One answer of a fake model in a wrapped graph, as its watch hears it.

    Args:
        core: What serves the graph.
        messages: What the model is asked.
    """

    def __init__(self, core: Core, messages: Sequence[BaseMessage] = ()) -> None:
        self._core = core
        self._run: str | None = None
        self._watch: AnswerWatch | None = None
        come_from = origin()
        if come_from is None or come_from.binding is None or come_from.binding.core is not core:
            return
        safe = come_from.binding.tools
        if safe is None:
            return
        call_id = core.serving.new_id()
        identity, _ = identify(come_from, core, call_id)
        self._run = identity.run
        offered = [{"type": "function", "function": {"name": name}} for name in safe.names]
        body = {"model": "fake", "messages": _asked(messages), "tools": offered}
        call = SimpleNamespace(id=call_id, identity=identity, ask=ask_of(body), standing=SimpleNamespace(graph=GRAPH))
        inflight: Any = SimpleNamespace(call=call, backend=next(iter(core.serving.schedulers)), external=False)
        self._watch = watch_for(core, come_from, inflight, body)
        if self._watch is not None:
            self._watch.begins()

    def calls(self, calls: Calls) -> None:
        """Let the watch hear tool calls; an engine may still change them."""
        if self._watch is not None:
            for at, (name, arguments) in enumerate(calls):
                self._watch.tool_call(HeardToolCall(at, f"heard-{at}", name, json.dumps(arguments)))

    def breaks(self) -> None:
        """Let the answer break off, and another attempt begin."""
        if self._watch is not None:
            self._watch.ends(None)
            self._watch.begins()

    def fails(self) -> None:
        """Let the answer break off for good."""
        if self._watch is not None:
            self._watch.ends(None)

    def ends(self, message: Any) -> None:
        """Let the answer end with *message*."""
        if self._watch is not None and isinstance(message, AIMessage):
            self._watch.ends(_as_sent(message))

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs that was started early for its run."""
        if self._run is None:
            return True
        return all(start.outcome.done() for start in self._core.early.of_run(self._run))


def _asked(messages: Sequence[BaseMessage]) -> list[Any]:
    try:
        return list(convert_to_openai_messages(list(messages)))
    except (TypeError, ValueError):  # what no engine is ever asked
        return []


def _as_sent(message: AIMessage) -> dict[str, Any]:
    calls = [
        {
            "id": call["id"],
            "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["args"], default=str)},
        }
        for call in message.tool_calls
    ]
    return {"role": "assistant", "content": message.text, **({"tool_calls": calls} if calls else {})}


def _heard(hearing: Hearing, message: Any) -> Iterator[None]:
    """Let an answer be heard; yields while its tools may run."""
    if isinstance(message, AIMessage):
        hearing.calls([(call["name"], call["args"]) for call in message.tool_calls])
        until_s = time.monotonic() + MOMENT_S
        while not hearing.is_idle and time.monotonic() < until_s:
            yield
        hearing.ends(message)


def _hear(hearing: Hearing, message: Any) -> None:
    for _ in _heard(hearing, message):
        if asyncio._get_running_loop() is not None:  # a loop that is held up could not run them
            break
        time.sleep(0.0005)
    else:
        return
    hearing.ends(message)


async def _ahear(hearing: Hearing, message: Any) -> None:
    for _ in _heard(hearing, message):
        await asyncio.sleep(0.0005)


def _message_of(result: Any) -> Any:
    return result.generations[0].message if result.generations else None


def _message_in(pieces: list[Any]) -> Any:
    return functools.reduce(lambda one, other: one + other, pieces) if pieces else None


def hear_fakes(patch: pytest.MonkeyPatch, core: Core) -> None:
    """Let the watches of *core* hear every answer of a chat model."""
    generate, agenerate = BaseChatModel._generate_with_cache, BaseChatModel._agenerate_with_cache
    stream, astream = BaseChatModel.stream, BaseChatModel.astream

    @functools.wraps(generate)
    def generated(self: Any, *args: Any, **kwargs: Any) -> Any:
        hearing = Hearing(core, args[0])
        result = generate(self, *args, **kwargs)
        _hear(hearing, _message_of(result))
        return result

    @functools.wraps(agenerate)
    async def agenerated(self: Any, *args: Any, **kwargs: Any) -> Any:
        hearing = Hearing(core, args[0])
        result = await agenerate(self, *args, **kwargs)
        await _ahear(hearing, _message_of(result))
        return result

    @functools.wraps(stream)
    def streamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._should_stream(async_api=False, **{**kwargs, "stream": True}):
            yield from stream(self, *args, **kwargs)  # which generates
            return
        hearing, pieces = Hearing(core), []
        for piece in stream(self, *args, **kwargs):
            pieces.append(piece)
            yield piece
        _hear(hearing, _message_in(pieces))

    @functools.wraps(astream)
    async def astreamed(self: Any, *args: Any, **kwargs: Any) -> Any:
        streams = self._should_stream(async_api=True, **{**kwargs, "stream": True})
        hearing, pieces = Hearing(core) if streams else None, []
        async for piece in astream(self, *args, **kwargs):
            pieces.append(piece)
            yield piece
        if hearing is not None:
            await _ahear(hearing, _message_in(pieces))

    for name, ours in (
        ("_generate_with_cache", generated), ("_agenerate_with_cache", agenerated),
        ("stream", streamed), ("astream", astreamed),
    ):  # fmt: skip
        patch.setattr(BaseChatModel, name, ours)


def declare_all(patch: pytest.MonkeyPatch) -> None:
    """Let every tool be declared safe, also those of which a graph shows nothing before it runs."""
    patch.setattr(DeclaredTools, "safe", lambda self, tool: True)


def wait_for_nothing(orla: Orla, timeout_s: float, is_left: Callable[[Any], bool]) -> bool:
    """Wait until *is_left* says no of the account of early starts; returns whether it did."""
    until_s = time.monotonic() + timeout_s
    while is_left(orla.statistics().early_tools):
        if time.monotonic() > until_s:
            return False
        time.sleep(0.002)
    return True


def account(orla: Orla) -> dict[str, int]:
    """Return what became of early starts, as the runner tells it."""
    told = orla.statistics().early_tools
    figures = {"started": told.started, "taken in their place": told.used, "raised, and ran again there": told.failed}
    return {**figures, **{f"dropped ({why})": count for why, count in told.dropped.items()}}
