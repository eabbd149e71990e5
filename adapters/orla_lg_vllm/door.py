"""Our side of the vLLM plugin: what a request is labelled with, and how orders reach the engine.

What the labels mean stands in ``segments``; the routes, in ``routes``. Both run inside the engine, this file never.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Capability, Directions, Effect
from orla_lg.core.engine.capabilities import Scope, WorkflowCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.adapter import OpenAIAdapter
from orla_lg.wires import reading
from orla_lg_vllm.bands import Band
from orla_lg_vllm.segments import BANDS, ENDS, KEEP_S, STAGE, WORKFLOW

ORDERS = (Capability.PIN, Capability.RELEASE, Capability.FLUSH_WORKFLOW)
"""What the plugin brings."""

HOW = (
    "the orla_lg vLLM plugin would let a workflow's cache be pinned, released and flushed: `pip install --no-deps "
    "orla-lg` in the engine's environment, then start it with VLLM_PLUGINS=orla_lg and `--scheduler-cls "
    "orla_lg_vllm.scheduler.OrlaAsyncScheduler` (docs/vllm-plugin.md)"
)

_ABSENT = (404, 405, 501)


@dataclass(frozen=True, slots=True)
class Found:
    """Whether the plugin is there and at work."""

    works: bool
    advice: str = HOW
    """What to do about it if it is not."""


async def find(adapter: OpenAIAdapter) -> Found:
    """Ask the engine for its plugin."""
    try:
        told = await adapter.post("orla/kv/stat", {})
    except EngineRefused as error:
        if error.status == 501:
            return Found(False, f"the orla_lg vLLM plugin is there, but leaves the engine as it is: {error}")
        return Found(False)
    except BackendUnavailable:
        return Found(False)
    return Found(told.get("effect") == "stat")


async def held_requests(adapter: OpenAIAdapter) -> int:
    """Return how many of the requests that wait are held back by the plugin, because their workflow is suspended."""
    try:
        told = (await adapter.post("orla/kv/stat", {})).get("suspension")
    except (EngineRefused, BackendUnavailable):
        return 0
    return reading.count(told.get("held_requests")) or 0 if isinstance(told, Mapping) else 0


async def order(adapter: OpenAIAdapter, verb: str, scope: Scope, ttl_s: float | None = None) -> Effect:
    """Have the engine pin, release or flush a workflow; return what it says that it did."""
    if not isinstance(scope, WorkflowCache):
        return Effect.UNSUPPORTED
    body = {"workflow": scope.workflow} | ({} if ttl_s is None else {"ttl_s": ttl_s})
    try:
        told = await adapter.post(f"orla/kv/{verb}", body)
        return Effect(str(told.get("effect")))
    except EngineRefused as error:
        return Effect.UNSUPPORTED if error.status in _ABSENT else Effect.FAILED
    except (BackendUnavailable, ValueError):
        return Effect.FAILED


def labels(ask: Ask, told: Directions) -> dict[str, Any]:
    """Return what a request says of itself: whose it is, and where its prompt's segments end, in characters."""
    said: dict[str, Any] = {WORKFLOW: told.workflow}
    if told.stage:
        said[STAGE] = told.stage
    if told.keep_s is not None:
        said[KEEP_S] = told.keep_s
    ends, bands = segments(ask)
    return {**said, ENDS: ends, BANDS: bands} if ends else said


def segments(ask: Ask) -> tuple[list[int], list[int]]:
    """Return the ends and the bands of a prompt's segments; neighbours of one band are one segment.

    Templates put the tools' schemas beside the system prompt, before all that was said.
    """
    ends: list[int] = []
    bands: list[int] = []
    position = 0
    pieces = [(Band.SYSTEM, ask.tools_chars), *_spoken(ask)]
    for band, chars in pieces:
        if not chars:
            continue
        position += chars
        if bands and bands[-1] == band:
            ends[-1] = position
        else:
            ends.append(position)
            bands.append(int(band))
    return ends, bands


def _spoken(ask: Ask) -> Sequence[tuple[Band, int]]:
    return [(_band(message), chars) for message, (_, chars) in zip(ask.messages, ask.pieces, strict=True)]


def _band(message: Any) -> Band:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role in ("system", "developer"):
        return Band.SYSTEM
    return Band.TOOL if role in ("tool", "function") else Band.HISTORY
