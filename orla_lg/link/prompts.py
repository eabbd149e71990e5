"""The prompts that the core may have warmed: kept here, sent from here, and never told to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from orla_lg.core.background import Background
from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import BackendAdapter, Effect, with_fields
from orla_lg.core.engine.capabilities import Warmable
from orla_lg.core.identity import tenant_of, workflow_key, workflow_name
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.prefetch.prefetcher import LIMIT_S
from orla_lg.core.prefetch.prompts import Prompt, PromptBook, prompt_of
from orla_lg.errors import BackendUnavailable, EngineRefused, OrlaClosed
from orla_lg.link.connection import Link
from orla_lg.link.messages import Keeps, StopWarm, Warm, WarmEnded

if TYPE_CHECKING:
    from orla_lg.link.call import LinkedCall


class KeptPrompts:
    """The newest prompt of each workflow, by backend, and what those of a stage begin with.

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
            self._books.setdefault(backend, PromptBook(WarmUp().keep_chars))
            (self._isolated.add if isolated else self._isolated.discard)(backend)
        else:
            self._adapters.pop(backend, None)
            self._books.pop(backend, None)

    # Calls

    def sends(self, call: LinkedCall, body: Mapping[str, Any]) -> None:
        """Note the body of a call's request, as it is before the engine's own fields come in."""
        if call.backend in self._books and call.raw.run is not None:
            call.prompt = prompt_of(call.call, body)

    def ended(self, call: LinkedCall, usage: Usage | None, *, followed: bool) -> None:
        """Keep the prompt of a call that went well and whose workflow goes on, and tell the core; before its end."""
        prompt, call.prompt = call.prompt, None
        book = self._books.get(call.backend or "")
        if prompt is None or book is None or not followed:
            return
        workflow = call.call.identity.workflow
        if call.backend in self._isolated:  # else one tenant's prompts would show what another one's begin with
            kept = prompt.counted(usage)
            prompt = Prompt(
                kept.call_id, kept.graph, kept.stage, kept.ask.within(tenant_of(workflow)), kept.body, kept.chars,
                kept.tokens,
            )  # fmt: skip
        else:
            prompt = prompt.counted(usage)
        with self._lock:
            book.learn(workflow, prompt)
            book.last.put(workflow, prompt)
        self._link.send(Keeps(call.call.id, prompt.chars))

    def over(self, workflows: Sequence[str]) -> None:
        """Drop what is kept of workflows that will not come back."""
        if self._books:
            with self._lock:
                for book in self._books.values():
                    for workflow in workflows:
                        book.last.take(workflow)

    def forked(self) -> None:
        """Keep nothing of the parent's, in a child."""
        self._lock = threading.Lock()
        self._running.clear()
        self._books = {backend: PromptBook(WarmUp().keep_chars) for backend in self._books}

    # Prefetches

    def _found(self, order: Warm) -> Prompt | None:
        book = self._books.get(order.backend)
        if book is None:
            return None
        name, tenant = workflow_name(order.workflow), tenant_of(order.workflow)
        with self._lock:
            if order.stage:
                return book.beginning(order.graph, order.stage, tenant if order.backend in self._isolated else "")
            found = book.last.get(order.workflow)
            return book.last.get(workflow_key(name)) if found is None and tenant == self.tenant else found

    def warm(self, order: Warm) -> None:
        """Send a prefetch, in the background."""
        prompt, adapter = self._found(order), self._adapters.get(order.backend)
        if prompt is None or adapter is None:
            self._link.send(WarmEnded(order.order, "no such prompt is kept"))
            return
        body = with_fields(prompt.body, order.fields)
        try:
            running = self._background.submit(_warm(self._link, adapter, order.order, body))
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


async def _warm(link: Link, adapter: Warmable, order: str, body: Mapping[str, Any]) -> None:
    """Prefill a prompt, and tell the core what it cost."""
    try:
        async with asyncio.timeout(LIMIT_S):
            said = await adapter.warm(body)
    except (TimeoutError, BackendUnavailable, EngineRefused) as error:
        link.send(WarmEnded(order, str(error) or type(error).__name__))
    else:
        fault = None if said.effect is Effect.WARMED else str(said.effect)
        link.send(WarmEnded(order, fault, said.usage.prompt_tokens, said.usage.cached_tokens))
