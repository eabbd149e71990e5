"""What the page shows of a core every second: its backends with their queues and caches, in plain data."""

from __future__ import annotations

from typing import Any

from orla_lg.control.state import BackendState, ProcessState
from orla_lg.core.boundary.plain import shown
from orla_lg.core.operation.statistics import Waiting
from orla_lg.serve.page.live_state import MOST_CHARS

MOST_WAITS = 25
"""Of the calls that wait at a backend: those that go first."""
MOST_HOLDERS = 24
"""Of the workflows that hold cache on a backend: those that hold most."""
MOST_QUEUES = 12
"""Of the stages that calls of a backend wait in: those with most; the others count together."""


def core_view(now: ProcessState, condition: str) -> dict[str, Any]:
    """Return a core at one moment.

    Args:
        now: Its state.
        condition: Whether it takes calls: ``ready``, ``standby`` or ``draining``.
    """
    return {
        "at": round(now.at_s, 3),
        "condition": condition,
        "calls": now.calls,
        "runs": now.runs,
        "idle": now.idle,
        "backends": [_backend(name, backend) for name, backend in now.backends.items()],
    }


def _backend(name: str, now: BackendState) -> dict[str, Any]:
    stages = sorted(now.waiting_by_stage.items(), key=lambda each: -each[1])
    others = sum(count for _, count in stages[MOST_QUEUES:])
    spent, kv = now.spent, now.kv
    return {
        "name": shown(name, MOST_CHARS),
        "engine": now.engine,
        "reachable": now.reachable,
        "circuit": now.circuit,
        "paused": now.paused,
        "in_flight": now.in_flight,
        "most": now.max_concurrency,
        "waiting": now.waiting,
        "capacity": now.capacity,
        "queues": [[shown(stage, MOST_CHARS), count] for stage, count in stages[:MOST_QUEUES]],
        "others": others,
        "policy": now.stage_policy,
        "spent": [spent.calls, spent.prompt_tokens, spent.cached_tokens, spent.completion_tokens, spent.usd],
        "kv": {
            "capacity": kv.capacity_tokens,
            "promised": kv.promised_tokens,
            "resident": kv.resident_tokens,
            "holders": kv.holders,
            "workflows": [
                [shown(each.workflow, MOST_CHARS), shown(each.tenant or "", MOST_CHARS), each.tokens, each.state]
                for each in kv.workflows[:MOST_HOLDERS]
            ],
        },
        "waits": [_wait(each) for each in now.waits[:MOST_WAITS]],
    }


def _wait(each: Waiting) -> list[Any]:
    return [
        each.call, shown(each.workflow, MOST_CHARS), shown(each.tenant or "", MOST_CHARS),
        shown(each.stage, MOST_CHARS), each.priority, round(each.waited_s, 2), each.waits_for, each.expected_tokens,
    ]  # fmt: skip
