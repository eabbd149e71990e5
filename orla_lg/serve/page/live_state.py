"""What is under way, as the page knows it: stages, workflows, runs, calls and tools, counted and ready to send."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orla_lg.core.boundary.plain import shown
from orla_lg.core.identity import tenant_of, workflow_name
from orla_lg.core.record import Record

MOST_CHARS = 120
"""Of a name, and of an error's text."""

Row = list[Any]


@dataclass(eq=False, slots=True)
class LiveStage:
    """One stage of one graph, and what is open in it now."""

    number: int
    graph: str
    stage: str
    waiting: int = 0
    prefill: int = 0
    decode: int = 0
    tools: int = 0
    inside: int = 0
    """Executions of its node under way."""
    done: int = 0
    failed: int = 0

    def row(self) -> Row:
        """Return its number and its counts."""
        return [
            self.number, self.waiting, self.prefill, self.decode, self.tools, self.inside, self.done, self.failed,
        ]  # fmt: skip


@dataclass(eq=False, slots=True)
class LiveWorkflow:
    """One workflow, and what of it is open now."""

    number: int
    """Names it in requests: a name may be of any length."""
    key: str
    graph: str = ""
    runs: dict[str, None] = field(default_factory=dict)
    """Open now."""
    waiting: int = 0
    prefill: int = 0
    decode: int = 0
    tools: int = 0
    calls: int = 0
    """Ended, of those that are kept or were seen."""
    failed: int = 0
    last_s: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether anything of it is under way."""
        return bool(self.runs or self.waiting or self.prefill or self.decode)

    def row(self) -> Row:
        """Return it as the page reads it."""
        return [
            self.number, shown(workflow_name(self.key), MOST_CHARS), shown(tenant_of(self.key), MOST_CHARS),
            self.graph, list(self.runs)[:8], self.waiting, self.prefill, self.decode, self.tools, self.calls,
            self.failed, round(self.last_s, 3),
        ]  # fmt: skip


@dataclass(eq=False, slots=True)
class LiveSpan:
    """One open call, or one tool; times are monotonic seconds."""

    id: str
    stage: LiveStage
    workflow: LiveWorkflow
    began_s: float
    backend: str = ""
    tool: str = ""
    sent_s: float | None = None
    first_s: float | None = None
    ended_s: float | None = None
    phase: str = ""
    """``waiting``, ``prefill``, ``decode`` or ``tools``: the field that counts it; empty: none."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as the page reads it."""
        return {
            "id": self.id, "stage": self.stage.stage, "backend": self.backend, "tool": self.tool,
            "began": _rounded(self.began_s), "sent": _rounded(self.sent_s), "first": _rounded(self.first_s),
            "ended": _rounded(self.ended_s),
        }  # fmt: skip


@dataclass(eq=False, slots=True)
class LiveRun:
    """One open run."""

    workflow: LiveWorkflow
    graph: str
    inside: Counter[str] = field(default_factory=Counter)
    tools: list[LiveSpan] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class LiveChanges:
    """What is other than at the last look."""

    new: list[LiveStage]
    """Stages that were not seen before."""
    stages: list[LiveStage]
    workflows: list[LiveWorkflow]
    gone: list[int]
    """Numbers of workflows that are no longer followed."""
    spans: Mapping[int, list[dict[str, Any]]]
    """Of the workflows that are watched."""


def span_of(record: Record, ended_s: float | None) -> dict[str, Any]:
    """Return an ended call as the page reads it; without *ended_s* its times count from its arrival."""
    began_s = 0.0 if ended_s is None else ended_s - record.duration_s
    sent_s = None if record.backend is None else began_s + min(record.queue_wait_s, record.duration_s)
    first_s = None if sent_s is None or record.ttft_s is None else sent_s + record.ttft_s
    return {
        "id": record.id, "stage": shown(record.stage, MOST_CHARS), "backend": record.backend or "", "tool": "",
        "began": _rounded(began_s), "sent": _rounded(sent_s), "first": _rounded(first_s),
        "ended": _rounded(began_s + record.duration_s), "timed": ended_s is not None,
        "prompt": record.prompt_tokens, "cached": record.cached_tokens, "completion": record.completion_tokens,
        "attempts": record.attempts, "cache": record.cache_action, "priority": record.priority,
        "error": None if record.error is None else shown(record.error, MOST_CHARS),
    }  # fmt: skip


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
