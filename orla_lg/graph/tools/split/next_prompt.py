"""What is certain of a run's next prompt while its tools still run, so that it can be prefilled meanwhile.

A node of an agent sends the messages that it sent before, then the model's answer as LangChain writes it, then the
results of the tools in the order of the calls. So the beginning of its next prompt is certain as far as results are
there without a gap: a slow first tool blocks those after it, and nothing is cut before the first result, since most
templates render an answer without results in another way. Each prediction is compared with the prompt that comes. A
stage whose prompts differ (its graph trims, summarises or rewrites messages) is left alone from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.call import Ask
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.memory.events import SplitPrompt
from orla_lg.core.prefetch.prompts import SplitStatistics
from orla_lg.core.serving import Serving
from orla_lg.graph.tools.early.starts import EarlyStart
from orla_lg.graph.tools.split.as_written import answer_message, result_message
from orla_lg.graph.tools.split.awaited_prompt import AwaitedPrompt, Differs, ToolRun, tools_of

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
    at_once: int = 1
    """How many tools of one answer were seen to run beside each other."""

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

    def answered(
        self, serving: Serving, inflight: InFlightCall, message: Mapping[str, Any] | None,
        starts: Iterable[EarlyStart] = (),
    ) -> None:  # fmt: skip
        """Note how a call was answered: compare its prompt with what was awaited, and await the next one.

        Args:
            serving: Serves it.
            inflight: The call, of a graph whose prompts are split.
            message: As in ``AnswerWatch.ends``.
            starts: Of its tools, those that began before their turn.
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
            call.id, run, place, stage, call.identity.workflow, inflight.backend, sent, answer, tools,
            at_once=1 if record is None else record.at_once,
        )  # fmt: skip
        awaited.began_early(starts)
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
                        self._note_at_once(awaited)
                        break
                else:
                    continue
                break
            else:
                return
        if awaited.kept is None:
            self._pass_on(serving, awaited)

    def _note_at_once(self, awaited: AwaitedPrompt) -> None:
        """Learn whether a stage's node runs its tools beside each other or one by one."""
        awaited.started()
        record = self._stages.get(awaited.stage)
        if awaited.at_once > (1 if record is None else record.at_once):
            self._record(awaited.stage).at_once = awaited.at_once

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
                    running, partly=bool(part), at_once=awaited.at_once,
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
