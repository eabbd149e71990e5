"""What a LangSmith trace shows of a call: the record on the model's own run, and when it left the queue."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from langchain_core.tracers.base import BaseTracer

from orla_lg.core.record import Record
from orla_lg.graph.context import ModelRun

SHOWN = (
    "id", "workflow", "run", "stage", "backend", "model", "mapper", "reason", "priority", "tenant", "attempts",
    "queue_wait_s", "ttft_s", "prompt_tokens", "cached_tokens", "expected_cached_tokens", "completion_tokens",
    "cost_usd", "cache_action", "cache_orders", "error", "external",
)  # fmt: skip
"""Fields of the record that the trace carries, as ``orla_<field>``."""


def is_traced(model_run: ModelRun) -> bool:
    """Whether a tracer keeps the run of its model."""
    for handler in model_run.tracers:  # noqa: SIM110  # a generator costs as much as all that it looks at
        if isinstance(handler, BaseTracer):
            return True
    return False


def annotate(model_run: ModelRun, record: Record) -> None:
    """Write *record* on the traced run of its model, for every tracer that keeps one."""
    for handler in model_run.tracers:
        if isinstance(handler, BaseTracer) and (traced := handler.run_map.get(str(model_run.id))) is not None:
            traced.add_metadata(_metadata(record))
            traced.add_event(_event(record))


def annotate_tool(manager: Any, began_before_s: float, hidden_s: float) -> None:
    """Write on the traced run of a tool that it began early, for every tracer that keeps one.

    Args:
        manager: LangChain's, of the tool's run.
        began_before_s: So many seconds ago it began.
        hidden_s: So many seconds of its time passed before its turn.
    """
    for handler in getattr(manager, "handlers", ()):
        if isinstance(handler, BaseTracer) and (traced := handler.run_map.get(str(manager.run_id))) is not None:
            began = datetime.fromtimestamp(datetime.now(UTC).timestamp() - began_before_s, UTC).isoformat()
            traced.add_metadata({"orla_began_early": began, "orla_hidden_s": hidden_s})


def _metadata(record: Record) -> dict[str, Any]:
    values = record.asdict()
    shown = {f"orla_{name}": values[name] for name in SHOWN if values[name] not in (None, ())}
    if record.model is not None and not record.external and record.error is None:
        shown["ls_model_name"] = record.model  # the model that answered; LangSmith reckons costs by it
    return shown


def _event(record: Record) -> dict[str, Any]:
    left = datetime.now(UTC).timestamp() - record.duration_s + record.queue_wait_s
    return {
        "name": "orla_left_queue",
        "time": datetime.fromtimestamp(left, UTC).isoformat(),
        "kwargs": {"backend": record.backend, "queue_wait_s": record.queue_wait_s},
    }
