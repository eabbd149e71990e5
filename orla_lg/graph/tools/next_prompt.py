"""What is certain of a run's next prompt while its tools still run, so that it can be prefilled meanwhile.

A node of an agent sends the messages that it sent before, then the model's answer as LangChain writes it, then the
results of the tools in the order of the calls. So the beginning of its next prompt is certain as far as results are
there without a gap: a slow first tool blocks those after it, and nothing is cut before the first result, since most
templates render an answer without results in another way. Each prediction is compared with the prompt that comes. A
stage whose prompts differ (its graph trims, summarises or rewrites messages) is left alone from then on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.call import Ask
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.memory.events import SplitPrompt
from orla_lg.core.prefetch.prompts import SplitStatistics
from orla_lg.core.serving import Serving
from orla_lg.graph.tools.as_written import answer_message, result_message

KEEP_AWAITED = 2_000
"""Next prompts that are awaited at once; of more the oldest is given up."""

KEEP_STAGES = 1_000

AGAIN_AFTER = 64
"""A stage whose prompts differed is tried again after so many answers with tool calls."""

MOST_STRANGERS = 4
"""So many prompts that have nothing of the answer before stop a stage."""

MOST_CALLS = 128
"""An answer with more tool calls is left alone."""

PART_CHARS = 2_000
"""A result that is there in part is passed on when so much was added to it."""


MOST_PART_CHARS = 1_000_000
"""What a tool writes beyond is not noted."""

WORD_CHARS = 64
"""A word that is longer is cut anywhere."""


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


@dataclass(eq=False, slots=True)
class StageRecord:
    """How a stage's predictions went."""

    differs: Differs | None = None
    """Why it is left alone, or was."""
    left_alone: int = 0
    """Answers that are passed over before it is tried again."""
    name: str | None = None
    """That its graph gives to its answers (``create_agent(name=...)``)."""
    strangers: int = 0
    """Prompts since the last one that was awaited which were not, and did not seem to be."""

    def leave_alone(self, differs: Differs) -> None:
        """Await none of its prompts for a while."""
        self.differs, self.left_alone, self.name, self.strangers = differs, AGAIN_AFTER, None, 0


class NextPrompts:
    """The next prompts that are awaited in all graphs of one ``Orla``. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._awaited: dict[str, AwaitedPrompt] = {}
        """By call, the oldest first."""
        self._by_run: dict[str, dict[str, AwaitedPrompt]] = {}
        """By run, and by call."""
        self._tools: dict[Any, tuple[AwaitedPrompt, ToolRun]] = {}
        """Tools under way, by the id of their run."""
        self._stages = BoundedDict[tuple[str, str], StageRecord](KEEP_STAGES)
        self._predicted = self._held = 0

    # Calls

    def answered(self, serving: Serving, inflight: InFlightCall, message: Mapping[str, Any] | None) -> None:
        """Note how a call was answered: compare its prompt with what was awaited, and await the next one.

        Args:
            serving: Serves it.
            inflight: The call, of a graph whose prompts are split.
            message: As in ``AnswerWatch.ends``.
        """
        call = inflight.call
        run, stage = call.identity.run, (call.standing.graph, call.identity.stage)
        if message is None or run is None:
            return
        place = run, call.identity.namespace.rpartition(NAMESPACE_SEPARATOR)[0], call.identity.stage
        if run in self._by_run:
            self._compare(place, call.ask)
        asked = message.get("tool_calls")
        if not asked or len(asked) > MOST_CALLS or inflight.backend is None or inflight.external:
            return
        with self._lock:
            record = self._stages.get(stage)
            if record is not None and record.left_alone:
                record.left_alone -= 1
                return
        answer = answer_message(message, None if record is None else record.name)
        tools = tools_of(answer)
        if answer is None or not tools:
            return
        sent = call.ask.within("").prefix
        awaited = AwaitedPrompt(
            call.id, run, place, stage, call.identity.workflow, inflight.backend, sent, answer, tools
        )
        with self._lock:
            self._awaited[call.id] = self._by_run.setdefault(run, {})[call.id] = awaited
            while len(self._awaited) > KEEP_AWAITED:
                self._drop(next(iter(self._awaited.values())))
        if serving.book.run(run) is None:  # it ended meanwhile
            self.run_ended(run)

    def _compare(self, place: tuple[str, str, str], ask: Ask) -> None:
        """Hold a prompt against the one that was awaited at its place; of several, branches may have sent it."""
        with self._lock:
            here = [each for each in self._by_run.get(place[0], {}).values() if each.place == place]
        found = {each: each.differs(ask) for each in here}
        held = [each for each, differs in found.items() if differs is None]
        if not held and len(here) > 1:
            return
        with self._lock:
            for awaited in held[-1:] or here:
                differs, is_known = found[awaited], awaited.passed > (0, 0) or awaited.has_results
                if differs is Differs.BEGINNING and not awaited.is_in(ask):
                    if is_known:
                        self._meet_stranger(awaited.stage)
                    continue
                self._drop(awaited)
                if is_known:
                    self._judge(awaited, differs, ask)

    def _meet_stranger(self, stage: tuple[str, str]) -> None:
        """Note a prompt that is none of those awaited, as a branch has; if all are, they come in another shape."""
        record = self._record(stage)
        record.strangers += 1
        if record.strangers >= MOST_STRANGERS:
            record.leave_alone(Differs.BEGINNING)

    def _record(self, stage: tuple[str, str]) -> StageRecord:
        record = self._stages.get(stage)
        if record is None:
            self._stages.set(stage, record := StageRecord())
        return record

    def _judge(self, awaited: AwaitedPrompt, differs: Differs | None, ask: Ask) -> None:
        record = self._record(awaited.stage)
        self._predicted += 1
        if differs is None:
            self._held += 1
            record.strangers = 0
        elif differs is Differs.ANSWER and record.name is None and (name := awaited.named(ask)) is not None:
            record.name = name
        else:
            record.leave_alone(differs)

    # Tools

    def tool_started(
        self, serving: Serving, run: str, tool_run: Any, name: str, call_id: str | None, inputs: Any
    ) -> None:
        """Note that a tool of a run starts.

        Args:
            serving: Serves the run.
            run: The root run.
            tool_run: The id of the tool's own run.
            name: The tool's.
            call_id: That of its tool call; where a node calls its tool without one, name and inputs tell.
            inputs: Its arguments, without what is injected.
        """
        with self._lock:
            for awaited in reversed(self._by_run.get(run, {}).values()):
                for tool in awaited.tools:
                    alike = tool.id == call_id if call_id else (tool.name, tool.arguments) == (name, inputs)
                    if alike and (tool.run is None or (tool.ended and tool.result is None)):
                        tool.run, tool.since_s, tool.ended = tool_run, serving.clock(), False
                        self._tools[tool_run] = awaited, tool
                        break
                else:
                    continue
                break
            else:
                return
        if awaited.kept is None:
            self._pass_on(serving, awaited)

    def tool_ended(self, serving: Serving, tool_run: Any, output: Any = None) -> None:
        """Note that a tool ended, with its *output*, or without any."""
        if (known := self._tools.pop(tool_run, None)) is None:
            return
        awaited, tool = known
        tool.result = result_message(output, tool.id)
        tool.ended = True
        self._pass_on(serving, awaited)

    def awaits(self, tool_run: Any) -> bool:
        """Whether the result of a tool's run belongs to a prompt that is awaited."""
        return tool_run in self._tools

    def tool_wrote(self, serving: Serving, tool_run: Any, text: str) -> None:
        """Note what a tool has of its result, the beginning of which is final."""
        if (known := self._tools.get(tool_run)) is None:
            return
        awaited, tool = known
        with awaited.lock:
            tool.written.append(text)
            tool.written_chars += len(text)
            if tool.written_chars < PART_CHARS or len(tool.part) > MOST_PART_CHARS:
                return
            tool.part = "".join([tool.part, *tool.written])
            tool.written, tool.written_chars = [], 0
        self._pass_on(serving, awaited)

    def _pass_on(self, serving: Serving, awaited: AwaitedPrompt) -> None:
        """Have the core keep what is certain, where that is more than before; it decides what is prefilled."""
        with awaited.lock:
            run = serving.book.run(awaited.run)
            if run is None or awaited.kept is False:
                return
            results = list(awaited.results())
            running = awaited.running(serving.clock())
            part = self._part(awaited, len(results))
            certain = len(results), len(part)
            if awaited.kept is not None and (not running or certain <= awaited.passed):
                return
            messages = [awaited.answer, *results]
            if part:
                going_on = result_message(part, awaited.tools[len(results)].id)
                messages += [going_on] if going_on is not None else []
            awaited.passed = certain
            awaited.kept = serving.progress.prompt_split(
                run,
                SplitPrompt(
                    awaited.call, awaited.workflow, awaited.backend, awaited.stage, messages, len(messages) - 1,
                    running, partly=bool(part),
                ),
            )  # fmt: skip

    @staticmethod
    def _part(awaited: AwaitedPrompt, results: int) -> str:
        """Return what is certain of the first result that is not there, cut where a word ends."""
        if results >= len(awaited.tools):
            return ""
        part = awaited.tools[results].part
        last = len(part) - 1
        at = max(part.rfind(" "), part.rfind("\n"))
        return part[: at if at > last - WORD_CHARS else max(0, last)].rstrip()

    # Ends

    def run_ended(self, run: str) -> None:
        """Drop what is awaited of a root run."""
        if run not in self._by_run:
            return
        with self._lock:
            for awaited in list(self._by_run.get(run, {}).values()):
                self._drop(awaited)

    def _drop(self, awaited: AwaitedPrompt) -> None:
        self._awaited.pop(awaited.call, None)
        of_run = self._by_run.get(awaited.run, {})
        of_run.pop(awaited.call, None)
        if not of_run:
            self._by_run.pop(awaited.run, None)
        for tool in awaited.tools:
            self._tools.pop(tool.run, None)

    def __len__(self) -> int:
        return len(self._awaited)

    def statistics(self) -> SplitStatistics:
        """Return a snapshot."""
        with self._lock:
            stopped = {
                "/".join(stage): str(record.differs)
                for stage in self._stages
                if (record := self._stages.get(stage)) is not None and record.left_alone
            }
            return SplitStatistics(self._predicted, self._held, stopped)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        with self._lock:
            assert len(self._awaited) <= KEEP_AWAITED
            assert sum(map(len, self._by_run.values())) == len(self._awaited)
            assert all(self._by_run.values()), "a run without anything awaited"
            assert all(awaited.call in self._awaited for awaited, _ in self._tools.values())


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
