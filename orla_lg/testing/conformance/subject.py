"""The adapter under test, and how checks talk with its engine: unlike prompts, timed answers."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from orla_lg.core.call import Chunk, Usage
from orla_lg.core.engine.backend import Backend, BackendAdapter, Directions, Effect, Probe, with_fields
from orla_lg.core.engine.capabilities import WorkflowCache
from orla_lg.testing.conformance.report import NonConforming, NotApplicable
from orla_lg.wires import chat

AdapterAt = Callable[[str], BackendAdapter]
Body = dict[str, Any]

PROMPT_WORDS = 400
"""A long prompt, in words of about a token: long against cache blocks, short against a slow prefill."""

ANSWER_TOKENS = 8
LONG_ANSWER_TOKENS = 1200

LIMIT_S = 60.0
"""A check that takes longer has failed."""

MUCH, LITTLE = 0.5, 0.25
"""Cached parts of a prompt: at least ``MUCH`` was found in the cache; at most ``LITTLE`` is chance."""

DEFERRALS = 10

_WORDS = [
    f"{how} {what}" for how in ("red", "old", "big", "new", "wet") for what in ("cat", "sea", "car", "sun", "map")
]


def expect(truth: object, message: str) -> None:
    """Fail the check with *message* unless *truth*."""
    if not truth:
        raise NonConforming(message)


@dataclass(frozen=True, slots=True)
class StreamedAnswer:
    """A stream that was read to its end."""

    chunks: tuple[Chunk, ...]
    arrivals_s: tuple[float, ...]
    """When each chunk came, in seconds after the request."""

    @property
    def text(self) -> str:
        """All text."""
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def usage(self) -> Usage:
        """The last token counts."""
        counted = [chunk.usage for chunk in self.chunks if chunk.usage is not None]
        expect(counted, "the stream brought no usage")
        return counted[-1]

    @property
    def cached_part(self) -> float:
        """The part of the prompt that was found in the cache, 0 to 1."""
        return (self.usage.cached_tokens or 0) / max(1, self.usage.prompt_tokens)

    @property
    def finish_reason(self) -> str | None:
        """Why it ended."""
        return next((chunk.finish_reason for chunk in reversed(self.chunks) if chunk.finish_reason), None)


@dataclass(eq=False)
class Subject:
    """An adapter under test."""

    adapter: BackendAdapter
    model: str | None = None
    """The model to ask for; ``None`` takes the backend's own, else the first that is served."""
    adapter_at: AdapterAt | None = None
    """Builds another adapter of the kind for a URL."""
    disruptive: bool = False
    """Whether checks may interrupt others who use the engine."""
    limit_s: float = LIMIT_S
    """A check that takes longer, in seconds, has failed."""
    prompt_words: int = PROMPT_WORDS
    """Of a long prompt."""
    _probe: Probe | None = None
    _slots: dict[str, int] = field(default_factory=dict)
    _count: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    async def probe(self) -> Probe:
        """Return what the engine said when it was first asked."""
        if self._probe is None:
            self._probe = await self.adapter.probe()
        return self._probe

    @property
    def known(self) -> Probe:
        """What ``probe`` returned."""
        assert self._probe is not None, "checks that need the probe run after it"
        return self._probe

    @property
    def backend(self) -> Backend | None:
        """What the adapter was built with, if it tells."""
        backend = getattr(self.adapter, "backend", None)
        return backend if isinstance(backend, Backend) else None

    @property
    def where(self) -> str:
        """The engine's place and version."""
        url = self.backend.url if self.backend is not None else "its engine"
        return " ".join(filter(None, (url, self._probe.version if self._probe is not None else "")))

    @property
    def model_name(self) -> str:
        """The model to ask for."""
        own = self.backend.model if self.backend is not None else None
        return self.model or own or next(iter(self.known.models), "default")

    def another(self, url: str | None = None) -> BackendAdapter:
        """Return another adapter of the kind, at *url* or at the same engine; skips where none can be built."""
        if self.adapter_at is not None and (url or self.backend):
            return self.adapter_at(url or self.backend.url)  # type: ignore[union-attr]
        if self.backend is None:
            skip("it takes `adapter_at`, or an adapter with its `backend`, to build another one")
        backend = self.backend if url is None else replace(self.backend, url=url)
        return type(self.adapter)(backend)  # type: ignore[call-arg]

    # Requests

    def unlike(self) -> str:
        """Return a name that nobody used before, here or in an earlier run."""
        return f"{secrets.token_hex(3)}-{next(self._count)}"

    def prompt(self, words: int | None = None, ask: str = "Go on.") -> list[dict[str, str]]:
        """Return messages of about *words* tokens that differ from all others from their first word on."""
        name = self.unlike()
        some = random.Random(name).choices(_WORDS, k=(words or self.prompt_words) // 2)
        return [{"role": "user", "content": f"{name} {' '.join(some)}. {ask}"}]

    def scope(self, workflow: str) -> WorkflowCache:
        """Return what *workflow* holds; on engines with slots each workflow gets the next one."""
        slots = self.known.slots
        if slots and workflow not in self._slots:
            self._slots[workflow] = len(self._slots) % slots
        return WorkflowCache(workflow, self._slots.get(workflow))

    def body(
        self,
        messages: Sequence[Mapping[str, Any]],
        workflow: str = "",
        *,
        told: Directions | None = None,
        max_tokens: int = ANSWER_TOKENS,
        **more: Any,
    ) -> Body:
        """Return a request as the core would send it, with the adapter's fields."""
        body: Body = {
            "model": self.model_name, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, **more,
        }  # fmt: skip
        if told is None:
            slot = self.scope(workflow).slot if workflow else None
            told = Directions(call_id=self.unlike(), workflow=workflow, slot=slot)
        return with_fields(body, self.adapter.request_fields(chat.ask_of(body), told))

    def long_body(self, **more: Any) -> Body:
        """Return a request whose answer takes a while."""
        room = (self.known.context_tokens or 4096) - 200
        ask = "Write a very long story about all of these words."
        return self.body(self.prompt(24, ask), max_tokens=max(32, min(LONG_ANSWER_TOKENS, room)), **more)

    @asynccontextmanager
    async def stream(self, body: Body) -> AsyncIterator[Any]:
        """Give the stream of a request, and close it at the end."""
        async with aclosing(self.adapter.generate(body)) as chunks:
            yield chunks

    async def ask(self, body: Body) -> StreamedAnswer:
        """Read a whole answer."""
        began, chunks, arrivals = time.perf_counter(), list[Chunk](), list[float]()
        async with self.stream(body) as stream:
            async for chunk in stream:
                chunks.append(chunk)
                arrivals.append(time.perf_counter() - began)
        return StreamedAnswer(tuple(chunks), tuple(arrivals))


async def read_rest(first: Chunk, chunks: AsyncIterator[Chunk]) -> StreamedAnswer:
    """Read a stream that has begun to its end; when its pieces came is not noted."""
    return StreamedAnswer((first, *[chunk async for chunk in chunks]), ())


# Caches, and what became of them


async def primed(on: Subject, words: int | None = None) -> tuple[WorkflowCache, Body]:
    """Return a workflow whose prompt is cached, and a request that finds it."""
    workflow, prompt = on.unlike(), on.prompt(words)
    await on.ask(on.body(prompt, workflow))
    return on.scope(workflow), on.body(prompt, workflow)


async def told_effect(on: Subject, order: str, scope: Any, **how: Any) -> Effect:
    """Give an order to an engine, which may say ``deferred`` for a moment."""
    effect = Effect.DEFERRED
    for _ in range(DEFERRALS):
        effect = await getattr(on.adapter, order)(scope, **how)
        if effect is not Effect.DEFERRED:
            break
        await asyncio.sleep(0.3)
    return effect


async def expect_lost(on: Subject, body: Body, why: str) -> None:
    """Fail the check if the prompt of *body* is still cached, to more than chance."""
    part = (await on.ask(body)).cached_part
    expect(part <= LITTLE, f"{why}, yet {part:.0%} of its prompt was still cached")


async def expect_kept(on: Subject, body: Body, why: str) -> None:
    """Fail the check if the prompt of *body* is no longer cached, for the most part."""
    part = (await on.ask(body)).cached_part
    expect(part >= MUCH, f"{why}, yet only {part:.0%} of its prompt was cached")


async def read_some(chunks: AsyncIterator[Chunk], count: int = 4) -> float:
    """Read *count* pieces of text and return the seconds between them; skips if the answer ends before."""
    came: list[float] = []
    async for chunk in chunks:
        if chunk.text:
            came.append(time.perf_counter())
        if len(came) >= count:
            break
    else:
        skip(f"the answer ended after {len(came)} pieces, too soon to be interrupted")
    return (came[-1] - came[0]) / (count - 1)


def skip(reason: str) -> NoReturn:
    """Say that the check does not apply, and why."""
    raise NotApplicable(reason)
