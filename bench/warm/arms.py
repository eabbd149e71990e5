"""The arms: who decides about the cache, how a call is made and timed, and what a turn of an arm showed."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import httpx
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from bench.lib.calls import CallSeen
from orla_lg import Backend, Orla

CONNECT_PATIENCE_S = 30.0


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve a graph."""

    name: str
    wrapped: bool = True
    warm_up: bool = False
    max_saved: int = 0
    """Slots that the engine may keep on its disk; 0: none, so that what is lost must be computed."""


BARE, AGAIN = Arm("bare", wrapped=False), Arm("bare again", wrapped=False)
COLD, WARM = Arm("orla, no warm-ups"), Arm("orla, warm-ups", warm_up=True)
SAVED = Arm("orla, slots saved", warm_up=True, max_saved=64)
ARMS = {arm.name: arm for arm in (BARE, AGAIN, COLD, WARM, SAVED)}


@dataclass(frozen=True, slots=True)
class WarmUps:
    """What became of a turn's warm-ups; fields as in ``orla_lg.WarmStatistics``."""

    started: int = 0
    done: int = 0
    given_up: int = 0
    failed: int = 0
    warmed_tokens: int = 0
    used_tokens: int = 0
    wasted_tokens: int = 0
    refused: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """One turn of an arm: the same load as every other arm of its round."""

    situation: str
    place: str
    arm: str
    seed: int
    calls: list[CallSeen]
    """Number 0: a call that nothing can be warmed for, which counts for the makespan only."""
    makespan_s: float
    warm_ups: WarmUps
    others: float = 0.0
    """What other processes took of the machine meanwhile, 0 to 1."""

    @property
    def counted(self) -> list[CallSeen]:
        """The calls that the situation is about."""
        return [call for call in self.calls if call.number]


def orla_of(arm: Arm, backends: Sequence[Backend], mapper: dict[str, str]) -> AbstractContextManager[Orla | None]:
    """Return the arm's ``Orla``, connected; ``None`` inside for a bare one.

    Raises:
        SystemExit: A backend does not answer.
    """
    if not arm.wrapped:
        return nullcontext()
    orla = Orla(list(backends), mapper, warm_up=arm.warm_up)
    if faults := [str(fault) for fault in orla.connect(CONNECT_PATIENCE_S).values() if fault is not None]:
        orla.close()
        raise SystemExit("; ".join(faults))
    return orla


def warm_ups_of(orla: Orla | None, backend: str) -> WarmUps:
    """Return what an ``Orla`` counted until now."""
    if orla is None:
        return WarmUps()
    said = orla.statistics().backends[backend].warm_ups
    return WarmUps(**{name: getattr(said, name) for name in WarmUps.__dataclass_fields__})


@asynccontextmanager
async def model_at(url: str, name: str) -> AsyncIterator[ChatOpenAI]:
    """Give a model as an application makes it, which knows nothing of ``Orla``."""
    # llama.cpp breaks connections that are used again after a stream. No retries: a call that failed is no figure.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=600, trust_env=False) as http:
        yield ChatOpenAI(
            model=name, base_url=url, api_key=SecretStr("any"), http_async_client=http, max_retries=0, temperature=0,
            stream_usage=True,
        )  # fmt: skip


async def ask(model: Any, messages: Sequence[BaseMessage], *, session: int, number: int) -> tuple[CallSeen, str]:
    """Stream an answer; return what was seen of the call, its times as the clock has them, and the text."""
    called_s, first_s, whole = time.perf_counter(), None, AIMessageChunk("")
    async for chunk in model.astream(list(messages)):
        if first_s is None and (chunk.content or chunk.tool_call_chunks):
            first_s = time.perf_counter()
        whole += chunk
    ended_s, usage = time.perf_counter(), whole.usage_metadata
    assert usage is not None, "the engine counts"
    cached = (usage.get("input_token_details") or {}).get("cache_read") or 0
    told = (usage["input_tokens"], cached, usage["output_tokens"])
    return CallSeen(session, number, called_s, first_s or ended_s, ended_s, *told), str(whole.content)
