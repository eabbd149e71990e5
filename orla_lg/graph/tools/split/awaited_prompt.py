"""A prompt that is to come after an answer with tool calls, and how far it is known."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orla_lg.core.call import Ask


class Differs(StrEnum):
    """Why a stage's next prompts are not what they should be."""

    BEGINNING = "its prompts do not begin with the one before: messages are trimmed, summarised or changed"
    ANSWER = "the model's answer is written otherwise in the next prompt"
    RESULT = "a tool's result is written otherwise, or stands elsewhere, in the next prompt"
    PART = "a tool's result does not begin with what the tool handed over as final"


@dataclass(eq=False, slots=True)
class ToolRun:
    """A tool call of an answer, and its execution."""

    id: str
    name: str
    arguments: Any
    run: Any = None
    """The id of its LangChain run; ``None``: it did not start yet."""
    since_s: float = 0.0
    """When it started; monotonic."""
    ended: bool = False
    result: dict[str, Any] | None = None
    """As the next prompt has it; ``None`` also where that cannot be known."""
    written: list[str] = field(default_factory=list)
    """Of its result, what it wrote since ``part``."""
    written_chars: int = 0
    part: str = ""
    """What is there of its result, and stays."""


@dataclass(eq=False, slots=True)
class AwaitedPrompt:
    """A prompt that is to come after an answer with tool calls."""

    call: str
    run: str
    place: tuple[str, str, str]
    """Run, the execution of the graph that the node is in, and stage."""
    stage: tuple[str, str]
    """Graph and stage."""
    workflow: str
    backend: str
    sent: tuple[int, ...]
    """The messages of the call as chained hashes."""
    answer: dict[str, Any] = field(repr=False)
    tools: list[ToolRun] = field(repr=False)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held while what is certain is passed on, so that less never follows on more."""
    kept: bool | None = None
    """Whether the core keeps it; ``None``: it does not know of it yet."""
    passed: tuple[int, int] = (0, 0)
    """How many results were passed on, and how many characters of the one after them."""

    def results(self) -> Iterator[dict[str, Any]]:
        """Yield the results that are there, up to the first that is not."""
        for tool in self.tools:
            if tool.result is None:
                return
            yield tool.result

    @property
    def has_results(self) -> bool:
        """Whether the first result is there."""
        return self.tools[0].result is not None

    def running(self, now: float) -> list[tuple[str, float]]:
        """Return the tools that did not end, by name and for how long they run; those to come run for 0 s."""
        return [(each.name, 0.0 if each.run is None else now - each.since_s) for each in self.tools if not each.ended]

    def differs(self, ask: Ask) -> Differs | None:
        """Return in what a prompt is not the one that was awaited."""
        prefix, sent = ask.within("").prefix, len(self.sent)
        if prefix[:sent] != self.sent:
            return Differs.BEGINNING
        came = list(ask.messages[sent : sent + 1 + len(self.tools)])
        if came[:1] != [self.answer]:
            return Differs.ANSWER
        results = list(self.results())
        if came[1 : 1 + len(results)] != results:
            return Differs.RESULT
        for tool, message in zip(self.tools, came[1:], strict=False):
            if tool.part and not str(message.get("content")).startswith(tool.part):
                return Differs.PART
        return None

    def is_in(self, ask: Ask) -> bool:
        """Whether a prompt has results of the answer's calls, wherever."""
        ids = {tool.id for tool in self.tools}
        return any(isinstance(each, Mapping) and each.get("tool_call_id") in ids for each in ask.messages)

    def named(self, ask: Ask) -> str | None:
        """Return the name that the answer has in a prompt, if it differs from what was awaited in that only."""
        came = ask.messages[len(self.sent)] if len(ask.messages) > len(self.sent) else None
        name = came.get("name") if isinstance(came, Mapping) else None
        alike = isinstance(name, str) and came == {**self.answer, "name": name}
        return name if alike else None


def tools_of(answer: Mapping[str, Any] | None) -> list[ToolRun]:
    """Return the tool calls of an answer; none where they cannot be told apart."""
    tools = []
    for asked in () if answer is None else answer.get("tool_calls") or ():
        function = asked["function"]
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            arguments = None
        tools.append(ToolRun(asked["id"] or "", function["name"], arguments))
    return tools if all(tool.id for tool in tools) and len({tool.id for tool in tools}) == len(tools) else []
