"""The client side of a benchmark on a real engine: the model, one timed call, and an Orla that is connected."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import httpx
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from bench.lib.calls import CallSeen
from orla_lg import Backend, Orla

CONNECT_PATIENCE_S = 30.0
"""The first probe asks the engine for answers of its own, a slow thing in an engine that is new."""
WARM_TOKENS = 8


@asynccontextmanager
async def model_at(url: str, name: str) -> AsyncIterator[ChatOpenAI]:
    """Give a model as an application makes it, which knows nothing of ``Orla``."""
    # llama.cpp breaks connections that are used again after a stream. No retries: a call that failed is no figure.
    # Streaming shows the first token. Not through a proxy that the environment names: engines are near.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(limits=limits, timeout=900, trust_env=False) as http:
        yield ChatOpenAI(
            model=name, base_url=url, api_key=SecretStr("any"), http_async_client=http, max_retries=0, temperature=0,
            stream_usage=True,
        )  # fmt: skip


async def warm(model: ChatOpenAI) -> None:
    """Make two calls: the first ones after a pause are slower."""
    for _ in range(2):
        await model.ainvoke("hello", max_tokens=WARM_TOKENS)


async def ask(
    model: Any, messages: Sequence[BaseMessage], *, session: int, number: int, called_s: float | None = None,
    **options: Any,
) -> tuple[CallSeen, str]:  # fmt: skip
    """Stream an answer; return what was seen of the call, its times as the clock has them, and the text."""
    called_s, first_s, whole = called_s or time.perf_counter(), None, AIMessageChunk("")
    async for chunk in model.astream(list(messages), **options):
        if first_s is None and (chunk.content or chunk.tool_call_chunks):
            first_s = time.perf_counter()
        whole += chunk
    ended_s = time.perf_counter()
    return seen(whole, session, number, called_s, first_s or ended_s, ended_s), str(whole.content)


def seen(answer: Any, session: int, number: int, called_s: float, first_s: float, ended_s: float) -> CallSeen:
    """Return what was seen of a call that gave this answer."""
    if (usage := answer.usage_metadata) is None:
        raise SystemExit("the engine does not count tokens in its streams")
    cached = (usage.get("input_token_details") or {}).get("cache_read") or 0
    return CallSeen(
        session, number, called_s, first_s, ended_s, usage["input_tokens"], cached, usage["output_tokens"]
    )


@contextmanager
def connected(
    backends: Sequence[Backend], mapper: Mapping[str, Any] | None = None, *, wrapped: bool = True, **options: Any
) -> Iterator[Orla | None]:
    """Give an ``Orla`` whose backends answer; ``None`` for an arm that is not *wrapped*."""
    if not wrapped:
        yield None
        return
    with Orla(list(backends), mapper, **options) as orla:
        if faults := [str(fault) for fault in orla.connect(CONNECT_PATIENCE_S).values() if fault is not None]:
            raise SystemExit("; ".join(faults))
        yield orla


def wrapped(orla: Orla | None, graph: Any) -> Any:
    """Return a graph as an arm serves it."""
    return graph if orla is None else orla.wrap(graph)
