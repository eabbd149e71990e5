"""The instrument that both arms are measured with: LangChain's own callbacks, at the node that asks.

What a node waits for counts, wherever it waits: in orla_lg's queue or in the engine's. Token counts are those of the
engine's answer. In the bare arm, where orla_lg hears nothing, the same callbacks are what the view is fed with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.callbacks import AsyncCallbackHandler

from orla_lg import Backend, CallEvent, Happening
from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import price
from orla_lg.core.record import Record

NODE_TAG = "graph:step:"
"""LangGraph's tag of a chain that is a node."""


@dataclass(eq=False, slots=True)
class TimedCall:
    """One call as its node sees it; times on the monotonic clock."""

    stage: str
    asked_s: float
    first_s: float | None = None
    ended_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """As the engine says; ``None`` where it does not."""
    completion_tokens: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Bare:
    """What a view needs of a run that orla_lg does not serve."""

    hear: Callable[[CallEvent], None]
    backends: Mapping[str, Backend]
    """The backend of each stage; ``*`` for the others."""


@dataclass(eq=False)
class Stopwatch(AsyncCallbackHandler):
    """Takes the times of one run's calls; with *bare*, tells a view what happens in it."""

    run: str
    calls: list[TimedCall]
    """Where the calls are put, those of other runs among them; on one event loop."""
    bare: Bare | None = None
    _open: dict[UUID, TimedCall] = field(default_factory=dict)
    _nodes: dict[UUID, str] = field(default_factory=dict)

    async def on_chat_model_start(self, serialized: Any, messages: Any, *, run_id: UUID, **said: Any) -> None:
        """Note that a node asks."""
        stage = str((said.get("metadata") or {}).get("langgraph_node", ""))
        self._open[run_id] = call = TimedCall(stage, time.monotonic())
        self.calls.append(call)
        self._tell(Happening.QUEUED, stage, call=run_id)

    async def on_llm_new_token(self, token: Any, *, run_id: UUID, **said: Any) -> None:
        """Note the first token."""
        if (call := self._open.get(run_id)) is not None and call.first_s is None:
            call.first_s = time.monotonic()
            self._tell(Happening.DISPATCHED, call.stage, call=run_id)

    async def on_llm_end(self, response: Any, *, run_id: UUID, **said: Any) -> None:
        """Note the end, and what the engine counted."""
        if (call := self._open.pop(run_id, None)) is None:
            return
        usage = getattr(response.generations[0][0].message, "usage_metadata", None) or {}
        call.prompt_tokens, call.completion_tokens = usage.get("input_tokens"), usage.get("output_tokens")
        call.cached_tokens = (usage.get("input_token_details") or {}).get("cache_read")
        self._ended(run_id, call)

    async def on_llm_error(self, error: BaseException, *, run_id: UUID, **said: Any) -> None:
        """Note how the call failed."""
        if (call := self._open.pop(run_id, None)) is not None:
            call.error = f"{type(error).__name__}: {error}"
            self._ended(run_id, call)

    async def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: UUID, **said: Any) -> None:
        """Note that a node begins."""
        if any(str(tag).startswith(NODE_TAG) for tag in said.get("tags") or ()):
            self._nodes[run_id] = stage = str((said.get("metadata") or {}).get("langgraph_node", ""))
            self._tell(Happening.NODE_ENTERED, stage)

    async def on_chain_end(self, outputs: Any, *, run_id: UUID, **said: Any) -> None:
        """Note that a node is done."""
        if (stage := self._nodes.pop(run_id, None)) is not None:
            self._tell(Happening.NODE_LEFT, stage, detail="done")

    async def on_chain_error(self, error: BaseException, *, run_id: UUID, **said: Any) -> None:
        """Note that a node failed."""
        if (stage := self._nodes.pop(run_id, None)) is not None:
            self._tell(Happening.NODE_LEFT, stage, detail="failed")

    async def on_tool_start(self, serialized: Any, input_str: str, *, run_id: UUID, **said: Any) -> None:
        """Note a tool."""
        stage = str((said.get("metadata") or {}).get("langgraph_node", ""))
        self._tell(Happening.TOOL_STARTED, stage, detail=str((serialized or {}).get("name", "")))

    def ended(self, detail: str) -> None:
        """Note that the run is over."""
        self._tell(Happening.RUN_ENDED, "", detail=detail)

    def _ended(self, run_id: UUID, call: TimedCall) -> None:
        call.ended_s = time.monotonic()
        self._tell(Happening.FINISHED, call.stage, call=run_id, ended=call)

    def _tell(
        self,
        kind: Happening,
        stage: str,
        *,
        call: UUID | None = None,
        detail: str = "",
        ended: TimedCall | None = None,
    ) -> None:
        if self.bare is None:
            return
        backend = self.bare.backends.get(stage, self.bare.backends["*"])
        record = None if ended is None else _record(str(call), self.run, backend, ended)
        at = CallEvent(
            kind, time.monotonic(), self.run, self.run, stage, None if call is None else str(call), backend.name,
            detail, record,
        )  # fmt: skip
        self.bare.hear(at)


def _record(call_id: str, run: str, backend: Backend, call: TimedCall) -> Record:
    """Return a call of the bare arm as a record, for the view and the table."""
    ended_s = call.asked_s if call.ended_s is None else call.ended_s
    used = None
    if call.prompt_tokens is not None and call.completion_tokens is not None:
        used = Usage(call.prompt_tokens, cached_tokens=call.cached_tokens, completion_tokens=call.completion_tokens)
    return Record(
        id=call_id, workflow=run, run=run, stage=call.stage, step=None, backend=backend.name,
        model=backend.model, mapper=None, reason="", priority=0.0, tenant=None, queue_wait_s=0.0,
        ttft_s=None if call.first_s is None else call.first_s - call.asked_s, duration_s=ended_s - call.asked_s,
        prompt_tokens=call.prompt_tokens, cached_tokens=call.cached_tokens, completion_tokens=call.completion_tokens,
        cache_action="engine", attempts=1, cost_usd=price(used, backend.cost), error=call.error or None,
        external=True,
    )  # fmt: skip
