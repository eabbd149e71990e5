"""A tool whose turn came takes the result of its early start, if there is one: ``StructuredTool._run``, ``_arun``.

LangChain runs callbacks, validation, errors and formatting around these two, at their usual time and place; only the
innermost call of the tool's function is replaced, by the result that is there already or under way. A start is taken
once. What it raised is never handed over: the tool then runs in its place, as it does where its start never began.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any, NamedTuple

from langchain_core.tools import BaseTool

from orla_lg.core.inflight import grants_held
from orla_lg.core.record import CallEvent, Happening
from orla_lg.errors import shown
from orla_lg.graph.context import Core
from orla_lg.graph.running_node import RunningNode, current, node_around
from orla_lg.graph.tools.early.arguments import Arguments
from orla_lg.graph.tools.early.fitness import ARUN, RUN, without_runtime
from orla_lg.graph.tools.early.reasons import LeftOut
from orla_lg.graph.tools.early.running import EARLY
from orla_lg.graph.tools.early.starts import EarlyStart
from orla_lg.graph.tools.split.partial_results import heard, is_final
from orla_lg.graph.tracing import annotate_tool


class Handover(NamedTuple):
    """The early start of a call whose turn came."""

    core: Core
    start: EarlyStart
    node: RunningNode
    turn_s: float
    """When its turn came, in monotonic seconds."""
    manager: Any
    """LangChain's, of the tool's run."""

    def may_wait(self, *, in_loop: bool) -> bool:
        """Whether this caller may wait for a body that has not ended: where it could not end meanwhile, none may."""
        start = self.start
        if start.outcome.done():
            return True
        if not start.outcome.running() or grants_held():  # a model in the body may wait for the grant held here
            return False
        return start.loop is None or (in_loop and start.loop is asyncio._get_running_loop())

    def is_result(self) -> bool:
        """Whether the body, which has ended, returned something; else the tool runs in its place."""
        start = self.start
        if not start.needs_its_place and not start.outcome.cancelled() and start.outcome.exception() is None:
            self._done()
            return True
        self.given_up()
        if (
            start.needs_its_place
            and start.tools is not None
            and start.tools.leave_out(start.tool, LeftOut.NEEDS_ITS_PLACE)
        ):
            self.core.early.left_out(LeftOut.NEEDS_ITS_PLACE)
        return False

    def given_up(self) -> None:
        """Note that the tool runs in its place."""
        start, early = self.start, self.core.early
        start.cancel()
        early.ran_again(start)
        why, tools = _fault(start), start.tools
        if why is not None and tools is not None and tools.failed(start.tool, start.asking.call, start.stage, why):
            early.left_out(LeftOut.FAILING)

    def _done(self) -> None:
        """Note what the start hid: its time before the call's turn."""
        start, now_s = self.start, time.monotonic()
        hidden_s = max(0.0, min(start.ended_s, self.turn_s) - start.began_s)
        self.core.early.handed_over(start, hidden_s)
        if start.tools is not None:
            start.tools.returned(start.tool)
        annotate_tool(self.manager, now_s - start.began_s, hidden_s)
        tell(self.core, Happening.TOOL_HANDED_OVER, start, hidden_s)
        if (journal := self.core.serving.journal) is not None:
            asking = start.asking
            journal.early_tool(
                asking.run, asking.call, start.stage, start.tool.name, began_before_s=now_s - start.began_s,
                hidden_s=hidden_s, waited_s=max(0.0, start.ended_s - self.turn_s),
            )  # fmt: skip


def _fault(start: EarlyStart) -> str | None:
    """Return why a body that began has nothing for its call, where that is said of further ones too."""
    outcome = start.outcome
    if not start.began_s or start.needs_its_place or outcome.cancelled():
        return None
    if not outcome.done():
        return "it had not ended, and could not be waited for there"
    error = outcome.exception()
    return None if error is None or isinstance(error, asyncio.CancelledError) else f"it raised {shown(error)}"


def tell(core: Core, kind: Happening, start: EarlyStart, hidden_s: float | None = None) -> None:
    """Tell listeners of an early start."""
    serving = core.serving
    if not serving.records.heard or (run := serving.book.run(start.asking.run)) is None:
        return
    serving.records.tell(
        CallEvent(
            kind, serving.clock(), run.name, run.id, start.stage, start.asking.call, detail=start.tool.name,
            tenant=run.tenant, hidden_s=hidden_s,
        )
    )  # fmt: skip


def _turn(tool: BaseTool, arguments: Arguments, config: Mapping[str, Any] | None, manager: Any) -> Handover | None:
    """Return the start that a call may take whose turn came; ``None`` outside graphs that have safe tools."""
    node = current() or node_around((config or {}).get("metadata") or {})
    if node is None or EARLY.get() is not None:
        return None
    for each in node.outward():
        handler = each.handler
        if handler is None or (tools := handler.orla_binding.tools) is None:
            continue
        core, run = handler.orla_binding.core, each.lineage
        if each is node or each.chain == node.chain:
            tools.used(tool, each.path)
        if run is None or core.early.is_idle:
            continue
        given = without_runtime(tool, arguments)
        if (start := core.early.take(run.root, tool, given, each.path)) is not None:
            return Handover(core, start, each, time.monotonic(), manager)
    return None


def _sync(original: Any) -> Any:
    @functools.wraps(original)  # LangChain inspects the signature
    def run(self: BaseTool, *args: Any, config: Any, run_manager: Any = None, **kwargs: Any) -> Any:
        turn = _turn(self, (args, kwargs), config, run_manager)
        if turn is not None:
            if not turn.may_wait(in_loop=False):
                turn.given_up()
            elif _ended(turn.start) and turn.is_result():
                return turn.start.outcome.result()
        if self.metadata and is_final(self):
            kwargs = heard(run_manager, kwargs)
        return original(self, *args, config=config, run_manager=run_manager, **kwargs)

    return run


def _ended(start: EarlyStart) -> bool:
    """Wait in this thread until a body ended."""
    with contextlib.suppress(CancelledError):
        start.outcome.exception()
    return True


def _async(original: Any) -> Any:
    @functools.wraps(original)
    async def arun(self: Any, *args: Any, config: Any, run_manager: Any = None, **kwargs: Any) -> Any:
        # Without a coroutine of its own, LangChain runs ``_run`` in a thread, which takes the start there.
        turn = None if self.coroutine is None else _turn(self, (args, kwargs), config, run_manager)
        if turn is not None:
            if not turn.may_wait(in_loop=True):
                turn.given_up()
            else:
                try:
                    await _aended(turn.start)
                except asyncio.CancelledError:
                    turn.core.early.left_waiting(turn.start)
                    raise
                if turn.is_result():
                    return turn.start.outcome.result()
        if self.metadata and self.coroutine is not None and is_final(self):
            kwargs = heard(run_manager, kwargs)
        return await original(self, *args, config=config, run_manager=run_manager, **kwargs)

    return arun


async def _aended(start: EarlyStart) -> None:
    """Wait in this task until a body ended; a caller that is cancelled takes the body's task along."""
    if start.outcome.done():
        return
    waiting = start.task if start.task is not None else asyncio.wrap_future(start.outcome)
    try:
        await asyncio.wait({waiting})
    except asyncio.CancelledError:
        waiting.cancel()
        if start.task is not None:
            await asyncio.wait({start.task})
        raise


# Installed once for all cores, while one of them is open whose graphs have safe tools.

_OURS: dict[tuple[type[BaseTool], str], tuple[Any, Any]] = {
    **{(kind, "_run"): (original, _sync(original)) for kind, original in RUN.items()},
    **{(kind, "_arun"): (original, _async(original)) for kind, original in ARUN.items()},
}


def install() -> None:
    """Let tools take what was started for them from now on. Idempotent."""
    for (kind, name), (original, ours) in _OURS.items():
        if getattr(kind, name) is original:
            setattr(kind, name, ours)


def uninstall() -> None:
    """Restore LangChain's methods, except where another package wrapped ours."""
    for (kind, name), (original, ours) in _OURS.items():
        if getattr(kind, name) is ours:
            setattr(kind, name, original)
