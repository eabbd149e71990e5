"""The watch over one call's answer: starts what is safe as soon as it is whole."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from typing import Any

from orla_lg.core.boundary.stage_keys import inner_key
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.record import Happening
from orla_lg.graph.context import Core, Origin
from orla_lg.graph.tools.declared import SafeTools, ToolPlace
from orla_lg.graph.tools.early.arguments import apart, are_said_alike
from orla_lg.graph.tools.early.fitness import ARUN, RUN
from orla_lg.graph.tools.early.handover import tell
from orla_lg.graph.tools.early.noted import note_not_begun
from orla_lg.graph.tools.early.reasons import DropReason, NotBegun
from orla_lg.graph.tools.early.running import EARLY, enter, namespace_of
from orla_lg.graph.tools.early.starts import AskingCall, EarlyStart, around_of
from orla_lg.graph.tools.split.split_watch import SplitWatch
from orla_lg.wires.watching import AnswerWatch, HeardToolCall, Late

log = logging.getLogger("orla_lg")


def watch_for(core: Core, come_from: Origin, inflight: InFlightCall, body: Mapping[str, Any]) -> AnswerWatch | None:
    """Return what hears the answer to *body*; ``None`` where it offers no safe tool, and prompts are not split."""
    tools, identity = come_from.binding.tools if come_from.binding else None, inflight.call.identity
    if tools is None or identity.run is None or EARLY.get() is not None:
        return None
    asking = AskingCall(inflight.call.id, identity.run, identity.stage, identity.namespace, identity.step)
    _drop_outdated(core, asking)
    heeds = bool(tools.offered(body, identity.stage))
    notes = core.serving.journal is not None and bool(body.get("tools"))
    watch = ToolWatch(core, tools, asking, heeds=heeds) if heeds or notes else None
    if not tools.splits:
        return watch
    return SplitWatch(core.next_prompts, core.serving, inflight, watch, tuple if watch is None else watch.starts)


def _drop_outdated(core: Core, asking: AskingCall) -> None:
    """Drop what earlier answers to the same node left behind: their turn has passed."""
    outdated = [
        start for start in core.early.of_run(asking.run)
        if start.asking.stage == asking.stage and start.asking.namespace != asking.namespace
        and around_of(start.asking.namespace) == around_of(asking.namespace)
        and start.asking.step is not None and asking.step is not None and start.asking.step < asking.step
    ]  # fmt: skip
    if outdated:
        core.early.drop(outdated, DropReason.NEXT_CALL, is_unused=True)


class ToolWatch:
    """Starts the safe tools of one call's answer.

    Args:
        core: What serves the call.
        tools: What is safe in its graph.
        asking: The call.
        heeds: Whether it offers a safe tool; if not, only why no tool began is noted.
    """

    wants_message = True
    """The calls of the whole answer alone are certain."""

    def __init__(self, core: Core, tools: SafeTools, asking: AskingCall, *, heeds: bool = True) -> None:
        self.wants_calls = heeds
        self._late: Late | None = None
        self._missed: dict[str, NotBegun] = {}
        """By tool, why a call of it that was heard did not begin."""
        self._core = core
        self._tools = tools
        self._asking = asking
        self._context = copy_context()
        self._loop = asyncio._get_running_loop()
        self._started: list[EarlyStart] = []
        """For calls of this attempt's answer."""
        self._broken: list[EarlyStart] = []
        """For calls of earlier attempts' answers, which broke off."""
        self._left = [
            start for start in core.early.of_run(asking.run)
            if start.is_answered and start.asking.namespace == asking.namespace
        ]  # fmt: skip
        """For calls of earlier answers to this execution of the node: it may be retried."""
        if heeds:
            core.early.offered()

    def starts(self) -> Sequence[EarlyStart]:
        """Return what was started for this attempt's answer, dropped since or not."""
        return self._started

    def comes_late(self, why: Late) -> None:
        """Count an attempt whose tools cannot begin before it ends."""
        self._late = why
        self._core.early.comes_late(why)

    def begins(self) -> None:
        """Note that an attempt's answer begins."""
        self._broken += self._started
        self._started = []

    def tool_call(self, call: HeardToolCall) -> None:
        """Start a tool, if it is safe and an attempt before did not start it."""
        try:
            place = self._tools.place(call.name, self._asking.stage)
            said = None if place is None else json.loads(call.arguments or "{}")
            if place is None:
                return
            self._missed[call.name] = NotBegun.ARGUMENTS
            if not isinstance(said, dict):
                return
            if not self._goes_on(place, said):
                self._start(place, said, call)
        except Exception as error:  # noqa: BLE001 - validators are the user's; what they raise, the call meets in its place
            log.debug("tool %r does not start early: %s", call.name, error)

    def _goes_on(self, place: ToolPlace, said: Mapping[str, Any]) -> bool:
        """Whether an answer that does not count any more started the same, which is this one's now."""
        for starts in (self._broken, self._left):
            for start in starts:
                if start.tool is place.tool and are_said_alike(start.said, said):
                    starts.remove(start)
                    start.is_answered = False
                    self._started.append(start)
                    return True
        return False

    def _start(self, place: ToolPlace, said: Mapping[str, Any], call: HeardToolCall) -> None:
        tool, loop = place.tool, self._loop
        kind = next(kind for kind in RUN if isinstance(tool, kind))
        is_async = loop is not None and getattr(tool, "coroutine", None) is not None
        no_loop = is_async and asyncio._get_running_loop() is not loop
        if no_loop or (not is_async and getattr(tool, "func", None) is None):
            self._missed[call.name] = NotBegun.NO_LOOP  # a coroutine, and the request is made in a thread
            return
        validated = tool._to_args_and_kwargs(dict(said), None)
        namespace = namespace_of(place, self._asking.namespace)
        start = EarlyStart(self._asking, tool, validated, said, inner_key(place.within, place.node), self._tools)
        args, kwargs = apart(validated)
        run = ARUN[kind] if is_async else RUN[kind]

        def body() -> Any:
            config = enter(start, place, namespace)
            return run(tool, *args, config=config, **kwargs)

        begun = self._core.early.begin(
            start, body, self._context.copy(), loop if is_async else None, self._core.serving.background
        )
        self._missed[call.name] = NotBegun.NO_ROOM
        if begun:
            self._started.append(start)
            tell(self._core, Happening.TOOL_BEGAN_EARLY, start)

    def ends(self, message: Mapping[str, Any] | None) -> None:
        """Drop what the whole answer does not ask for; one that broke off may come again."""
        try:
            for start in self._started:
                start.is_answered = True
            if message is None:
                return
            called = list(_calls_of(message))
            changed = []
            for start in self._started:
                start.is_certain = _is_among(start, called)
                if not start.is_certain:
                    changed.append(start)
            self._core.early.drop([*changed, *self._broken], DropReason.CHANGED)
            self._broken = []
            if self._core.serving.journal is not None:
                for name, _ in called:  # those that no start is for
                    self._note(str(name))
            self._late, self._missed = None, {}
        except Exception:
            log.debug("an answer's tool calls cannot be read", exc_info=True)

    def _note(self, name: str) -> None:
        """Note why a tool that the answer asks for did not begin."""
        why = self._tools.why_not(name, self._asking.stage) or self._missed.get(name) or self._late
        note_not_begun(self._core.serving, self._asking, name, why or NotBegun.UNHEARD)


def _calls_of(message: Mapping[str, Any]) -> Any:
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        try:
            said = json.loads(function.get("arguments") or "{}")
        except ValueError:
            continue
        yield function.get("name"), said


def _is_among(start: EarlyStart, called: list[tuple[str, Any]]) -> bool:
    """Whether an answer asks for a start; each call for one."""
    for at, (name, said) in enumerate(called):
        if name == start.tool.name and are_said_alike(start.said, said):
            del called[at]
            return True
    return False
