"""The prompts that the core may have warmed: kept here, sent from here, and never told to it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from typing import Any

from orla_lg.core.background import Background
from orla_lg.core.call import HASH_BYTES, Usage
from orla_lg.core.engine.backend import BackendAdapter, Effect
from orla_lg.core.engine.capabilities import Warmable
from orla_lg.core.identity import tenant_of, workflow_key, workflow_name
from orla_lg.core.memory.events import SplitPrompt
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.prefetch.prefetcher import LIMIT_S
from orla_lg.core.prefetch.prompts import Prompt, PromptBook, prompt_of
from orla_lg.errors import BackendUnavailable, EngineRefused, OrlaClosed
from orla_lg.link.call import LinkedCall
from orla_lg.link.connection import Link
from orla_lg.link.messages import FlatMessage, Keeps, StopWarm, Warm, WarmEnded


class KeptPrompts:
    """The newest prompt of each workflow, and what those of a stage begin with; by backend, as a core keeps its own.

    Args:
        link: To the core.
        background: Where prefetches run.
    """

    def __init__(self, link: Link, background: Background) -> None:
        self._link, self._background = link, background
        self._lock = threading.Lock()
        self._books: dict[str, PromptBook] = {}
        self._adapters: dict[str, Warmable] = {}
        self._isolated: set[str] = set()
        self._running: dict[str, Future[None]] = {}
        self.tenant = ""
        """That of a key that carries one: the core knows calls without a tenant as that one's."""

    def serves(self, backend: str, adapter: BackendAdapter, *, warms: bool, isolated: bool) -> None:
        """Note a backend; prompts are kept where the core has them warmed."""
        if warms and isinstance(adapter, Warmable):
            self._adapters[backend] = adapter
            self._books.setdefault(backend, _book())
            (self._isolated.add if isolated else self._isolated.discard)(backend)
        else:
            self._adapters.pop(backend, None)
            self._books.pop(backend, None)

    def keeps(self, backend: str) -> bool:
        """Whether prompts are kept for a backend."""
        return backend in self._books

    # Calls

    def sends(self, call: LinkedCall, body: Mapping[str, Any]) -> None:
        """Note the body of a call's request, as it is before the engine's own fields come in."""
        if (book := self._books.get(call.backend or "")) is not None and call.raw.run is not None:
            call.prompt = prompt_of(call.call, body)
            if book.split:
                with self._lock:
                    book.came(call.call.identity.workflow, (call.prompt.graph, call.prompt.stage))

    def ended(self, call: LinkedCall, usage: Usage | None, *, followed: bool) -> None:
        """Keep the prompt of a call that went well and whose workflow goes on, and tell the core; before its end."""
        prompt, call.prompt = call.prompt, None
        book = self._books.get(call.backend or "")
        if prompt is None or book is None or not followed:
            return
        workflow = call.call.identity.workflow
        if call.backend in self._isolated:
            prompt = replace(prompt, ask=prompt.ask.within(tenant_of(workflow) or self.tenant))
        prompt = prompt.counted(usage)
        with self._lock:
            book.learn(workflow, prompt)
            book.last.put(workflow, prompt)
        self._link.send(Keeps(call.call.id, prompt.chars, _frame(prompt)))

    def extend(self, split: SplitPrompt) -> Sequence[FlatMessage] | None:
        """Keep what is certain of a next prompt; returns what a core may know of it, ``None`` if it is not kept."""
        if (book := self._books.get(split.backend)) is None:
            return None
        with self._lock:
            prompt = book.next(split.workflow, split.stage, split.call) if book.extend(split) else None
        if prompt is None:
            return None
        ask = replace(prompt.ask, scope="")
        return [FlatMessage(*piece) for piece in ask.pieces[-len(split.messages) :]]

    def over(self, workflows: Sequence[str]) -> None:
        """Drop what is kept of workflows that will not come back."""
        if self._books:
            with self._lock:
                for book in self._books.values():
                    for workflow in workflows:
                        book.forget(workflow)

    def forked(self) -> None:
        """Keep nothing of the parent's, in a child."""
        self._lock = threading.Lock()
        self._running.clear()
        self._books = {backend: _book() for backend in self._books}

    # Prefetches

    def _found(self, order: Warm) -> Prompt | None:
        """Return the prompt that is meant, unless the one that is kept does not begin as the core knows it."""
        with self._lock:
            if (book := self._books.get(order.kept_for or order.backend)) is None:
                return None
            if order.next_of:
                for workflow in self._names(order.workflow):
                    stage = (order.graph, order.stage)
                    found = book.next(workflow, stage, order.next_of)
                    if found is not None and _is_at(found, len(found.ask.prefix), order.prefix):
                        return found
                return None
            if order.messages is None:
                kept = (book.last.get(workflow) for workflow in self._names(order.workflow))
                found = next((prompt for prompt in kept if prompt is not None), None)
                return found if found is not None and _is_at(found, len(found.ask.prefix), order.prefix) else None
            scope = tenant_of(order.workflow) if order.backend in self._isolated else ""
            known = book.beginning(order.graph, order.stage, scope)
            of_stage = (each for each in book.last.newest() if (each.graph, each.stage) == (order.graph, order.stage))
            alike = (known, *of_stage)
        for prompt in alike:
            if prompt is not None and _is_at(prompt, order.messages, order.prefix):
                return prompt.beginning(order.messages)
        return None

    def _names(self, workflow: str) -> Sequence[str]:
        """Return the keys that the core's key of a workflow may have here."""
        mine = tenant_of(workflow) == self.tenant
        return (workflow, workflow_key(workflow_name(workflow))) if mine else (workflow,)

    def warm(self, order: Warm) -> None:
        """Send a prefetch, in the background."""
        prompt, adapter = self._found(order), self._adapters.get(order.backend)
        if prompt is not None and order.kept_for:
            prompt = prompt.elsewhere(order.backend, order.model)
        if prompt is None or adapter is None:
            self._link.send(WarmEnded(order.order, "no such prompt is kept"))
            return
        try:
            running = self._background.submit(_warm(self._link, adapter, order, prompt))
        except OrlaClosed:
            return
        self._running[order.order] = running
        running.add_done_callback(partial(self._ended, order.order))

    def _ended(self, order: str, _: Future[None]) -> None:
        self._running.pop(order, None)

    def stop(self, order: StopWarm) -> None:
        """Give a prefetch up; its request is ended at the engine too."""
        if (running := self._running.pop(order.order, None)) is not None:
            running.cancel()


async def _warm(link: Link, adapter: Warmable, order: Warm, prompt: Prompt) -> None:
    """Prefill a prompt, and tell the core what it cost."""
    try:
        async with asyncio.timeout(LIMIT_S):
            said = await prompt.warm(adapter, order.fields)
    except (TimeoutError, BackendUnavailable, EngineRefused) as error:
        link.send(WarmEnded(order.order, str(error) or type(error).__name__))
    else:
        fault = None if said.effect is Effect.WARMED else str(said.effect)
        link.send(WarmEnded(order.order, fault, said.usage.prompt_tokens, said.usage.cached_tokens))


def _book() -> PromptBook:
    return PromptBook(WarmUp().keep_chars)


def _is_at(prompt: Prompt, messages: int, prefix: int) -> bool:
    """Whether so many messages of a prompt have the hash that the core knows."""
    hashes = prompt.ask.prefix
    return not prefix or (0 < messages <= len(hashes) and hashes[messages - 1] == prefix)


def _frame(prompt: Prompt) -> int:
    """Return a number that bodies have in common which differ in their messages only."""
    text = json.dumps(prompt.frame, sort_keys=True, default=str)
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest())
