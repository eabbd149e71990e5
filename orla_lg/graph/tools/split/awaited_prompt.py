"""A prompt that is to come after an answer with tool calls, and how far it is known."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orla_lg.core.call import Ask
from orla_lg.graph.tools.early.arguments import are_said_alike
from orla_lg.graph.tools.early.starts import EarlyStart


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
    early: EarlyStart | None = None
    """Its start before its turn, where there is one."""

    def ran_s(self, now: float) -> float | None:
        """Return for how many seconds it runs, 0 if it is to begin; ``None``: its result is there."""
        if self.ended:
            return None
        in_place_s = 0.0 if self.run is None else now - self.since_s
        if self.early is None or self.early.came_to_nothing:
            return in_place_s
        return None if self.early.ended_s else max(in_place_s, self.early.ran_s)


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
    at_once: int = 1
    """How many of the tools were seen to run beside each other in their places; before that, how many of the stage's
    answers before."""
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
        return [(each.name, ran_s) for each in self.tools if (ran_s := each.ran_s(now)) is not None]

    def started(self) -> None:
        """Note that one of the tools started."""
        self.at_once = max(self.at_once, sum(each.run is not None and not each.ended for each in self.tools))

    def began_early(self, starts: Iterable[EarlyStart]) -> None:
        """Note which of the tools began before their turn."""
        for start in starts:
            for tool in self.tools:
                alike = tool.name == start.tool.name and are_said_alike(start.said, tool.arguments)
                if alike and tool.early is None:
                    tool.early = start
                    break

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
