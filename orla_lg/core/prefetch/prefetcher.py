"""Warm-ups: what is certain of a workflow's next prompt is prefilled before its call comes.

What a policy requests (``Verb.WARM``) is looked at on the background loop: what of the prompt is not in the cache,
whether the engine has room, whether it is worth it (``value``). What must wait for room is looked at again when a
call ends. One warm-up runs at a time, since prefills beside each other take as long as one after the other. It is
what its workflow's call would be, in the same slot or session and with the same fields, and the least urgent of all
on engines that heed that.

A call never waits for one. The call it was for gives it up, and so does any call that finds no room: in the very step
in which the call enters, under the same lock, its slot and its tokens are free again, and its request is ended.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

from orla_lg.core.background import Background
from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.cache.engine_cache import EngineCache, PrefetchLease
from orla_lg.core.cache.verification import SLACK_TOKENS, Order
from orla_lg.core.call import Call, Usage
from orla_lg.core.engine.backend import Directions, Effect, price
from orla_lg.core.engine.capabilities import Warmable, Warmed
from orla_lg.core.identity import tenant_of
from orla_lg.core.memory.events import CacheAction, SplitPrompt, Verb
from orla_lg.core.memory.verbs import VERBS
from orla_lg.core.prefetch.book import PrefetchBook, Prefetched, SkipReason, WarmStatistics, WarmUp
from orla_lg.core.prefetch.prompts import Prompt, PromptBook, prompt_of
from orla_lg.core.prefetch.value import PrefetchedEngine, PrefetchRequest, PrefetchValue, RequestKey
from orla_lg.core.queues import Queued
from orla_lg.errors import OrlaClosed

KEEP_REQUESTS = 256
"""For one backend, the newest."""

LOOK_AT = 8
"""When there is room, so many requests are looked at, the newest first."""

PRIORITY = -1_000_000.0
"""The least urgent of all, on engines that heed it; adapters bound it to what theirs takes."""

LIMIT_S = 300.0
"""A prefill that takes longer has failed."""


@dataclass(eq=False, slots=True)
class Prefill:
    """A warm-up under way: it holds the place in the cache that its workflow's call would have."""

    request: PrefetchRequest
    prompt: Prompt
    cache: EngineCache
    lease: PrefetchLease
    expected_tokens: float = 0.0
    """Of the prompt, believed to be in the cache when it began."""
    missing_tokens: float = 0.0
    """Of the prompt, taken to be missing there; more, where others use the engine too."""
    sent: bool = False
    task: Future[None] | None = field(default=None, repr=False)


class Prefetcher:
    """One backend's warm-ups. Part of a backend's scheduler and, where nothing else is said, under its lock.

    Args:
        scheduler: Its backend's.
        background: Where warm-ups run.
        clock: Monotonic seconds.
        settings: What they may take; ``None``: there are none, and no prompt is kept.
        announce: Called, outside the lock, when there is news of orders.
    """

    def __init__(
        self,
        scheduler: PrefetchedEngine,
        background: Background,
        clock: Callable[[], float],
        settings: WarmUp | None,
        announce: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.running: Prefill | None = None
        self.book = PrefetchBook()
        self.value = PrefetchValue(scheduler, clock, settings or WarmUp(), self.book)
        self.prompts = PromptBook(0 if settings is None else settings.keep_chars)
        self._scheduler = scheduler
        self._adapter = scheduler.adapter if isinstance(scheduler.adapter, Warmable) else None
        backend = scheduler.backend
        self._refuses = (
            SkipReason.ENGINE if settings is None or self._adapter is None or backend.engine == "openai"
            else SkipReason.PRICED if not settings.priced and backend.cost.input_per_mtoken > 0 else None
        )  # fmt: skip
        self.able = self._refuses is None
        """Whether anything is ever warmed on this backend; if not, no prompt is kept."""
        self._background = background
        self._clock = clock
        self._announce = announce
        self._requests = BoundedDict[RequestKey, PrefetchRequest](KEEP_REQUESTS)
        self._counter = 0
        self._again_at_s = -inf

    # Calls: what they are made of, and what they find. Not called where nothing is ever warmed.

    def sending(self, queued: Queued, body: Mapping[str, Any]) -> None:
        """Note the body of a call, as it goes to the engine; needs no lock."""
        if queued.call.identity.run is not None:
            queued.prompt = prompt_of(queued.call, body)

    def keeping(self, queued: Queued, prompt: Prompt) -> None:
        """Note the prompt of a call as an edge elsewhere keeps it; needs no lock."""
        if queued.call.identity.run is not None:
            queued.prompt = prompt

    def ended(self, queued: Queued, usage: Usage | None, *, reached: bool, followed: bool) -> None:
        """Note that a call ended, or left the queue; there may be room now.

        Args:
            queued: Its place.
            usage: What the engine counted, if it did.
            reached: Whether it reached the engine.
            followed: Whether its workflow goes on.
        """
        self.look_soon()
        if not reached:
            return
        call = queued.call
        self.value.heard_s = self._clock()
        cached_tokens = None if usage is None else usage.cached_tokens
        self.book.called(call.identity.workflow, call.ask.prefix, cached_tokens)
        if queued.prompt is not None and followed:
            prompt, queued.prompt = queued.prompt.counted(usage), None
            self.prompts.learn(call.identity.workflow, prompt)
            self.prompts.last.put(call.identity.workflow, prompt)

    def entering(self, call: Call) -> None:
        """Drop what was requested for a call that enters; give up what it was to find, or what leaves it no room."""
        workflow, under_way = call.identity.workflow, self.running
        stage = call.standing.graph, call.identity.stage
        late: list[RequestKey] = [(workflow, None, False), (workflow, stage, False), (workflow, stage, True)]
        for key in late if len(self._requests) else ():
            self._requests.pop(key)
        if self.prompts.split:
            self.prompts.came(workflow, stage)
        if under_way is None:
            return
        ours = under_way.request.key in late
        if ours or not self.value.has_room(entering=1):
            self.give_up(again=not ours)

    def heed(self, action: CacheAction) -> None:
        """Drop what is of no use once a policy's order is carried out."""
        meaning = VERBS[action.verb]
        if meaning.forgets:
            self.forget(action.workflow)
        if meaning.releases:
            self.dismiss(action.workflow)

    def dismiss(self, workflow: str) -> None:
        """Drop and give up what was requested for a workflow when its cache may go."""
        if len(self._requests):
            for key in [key for key in self._requests if key[0] == workflow]:
                self._requests.pop(key)
        if self.running is not None and self.running.request.workflow == workflow:
            self.give_up(again=False)

    def forget(self, workflow: str) -> None:
        """Drop all that is kept of a workflow that will not come back."""
        if self.able:
            self.dismiss(workflow)
            self.prompts.forget(workflow)
            self.book.forget(workflow)

    def forget_all(self) -> None:
        """Drop every prompt that is kept, and what is requested or under way. Takes the lock itself."""
        with self._scheduler.lock:
            if self.running is not None:
                self.give_up(again=False)
            for key in list(self._requests):
                self._requests.pop(key)
            self.prompts = PromptBook(0 if self.settings is None else self.settings.keep_chars)

    def extend(self, split: SplitPrompt) -> bool:
        """Keep what is certain of a next prompt; returns whether it may be warmed. Takes the lock itself."""
        with self._scheduler.lock:
            if self._refuses is not None:
                self.book.refused[self._refuses] += 1
                return False
            return self.prompts.extend(split)

    def last_prompt(self, workflow: str) -> Prompt | None:
        """Return a workflow's last prompt here, as far as it is kept. Takes the lock itself."""
        with self._scheduler.lock:
            return self.prompts.last.get(workflow)

    def receive(self, workflow: str, prompt: Prompt) -> None:
        """Keep the last prompt of a workflow that was moved here, and have it warmed. Takes the lock itself."""
        if self.able:
            with self._scheduler.lock:
                self.prompts.last.put(workflow, prompt)
            self.wish(CacheAction(Verb.WARM, workflow, self._scheduler.backend.name))

    @property
    def why_never(self) -> str | None:
        """Why nothing is ever warmed on this backend, and what to do; ``None`` where something may be."""
        if self._refuses is None:
            return None
        if self.settings is None:
            return "warm_up=False"
        if self._refuses is SkipReason.PRICED:
            return "it has a price for input; WarmUp(priced=True) warms it all the same"
        engine = self._scheduler.backend.engine
        if engine == "openai":
            return 'engine="openai" may be any server, one that is paid too; name the engine that it is'
        return f"engine={engine!r} has no prompts prefilled"

    # Requests

    def wish(self, action: CacheAction) -> None:
        """Have what a policy wants warmed, as soon as there is room; takes the lock itself."""
        stage = (action.graph, action.stage) if action.stage else None
        due_s = inf if action.within_s is None else self._clock() + action.within_s
        request = PrefetchRequest(action.workflow, stage, action.chance, due_s, action.next_of)
        with self._scheduler.lock:
            if self._refuses is not None:
                self.book.refused[self._refuses] += 1
                return
            prompt = self._prompt(request)
            if prompt is None:
                if stage is None:  # of most stages nothing is certain
                    self.book.refused[SkipReason.UNKNOWN] += 1
                return
            if self.running is not None and self.running.prompt is prompt:
                return
            needless = None if stage is None else self.value.needless(action.workflow, prompt)
            if needless is not None:  # as mostly, at every call
                self.book.refused[needless] += 1
                return
            self._requests.set(request.key, request)
        self.look_soon()

    def look_soon(self) -> None:
        """Look at what is requested, off the caller's path; with or without the lock."""
        if len(self._requests) and self.running is None:
            self._background.call_later(0.0, self._look)

    def _look(self) -> None:
        """Begin the newest request that may be begun; takes the lock itself."""
        health = self._scheduler.health
        health.connect()  # an engine not heard of for long is asked whether it is still the same
        load = None if self._scheduler.load is None else self._scheduler.load.wanted(health.probe)
        with self._scheduler.lock:
            if self.running is not None:
                return
            for request in self._requests.values()[: -LOOK_AT - 1 : -1]:
                prompt = self._prompt(request)
                refused = SkipReason.UNKNOWN if prompt is None else self.value.why_not(request, prompt, load)
                if prompt is not None and refused is None:
                    self._begin(request, prompt)
                    return
                assert refused is not None
                if not self._may_change(refused):
                    self.book.refused[refused] += 1
                    self._requests.pop(request.key)
            self._look_again()

    def _look_again(self) -> None:
        """Look again when the first slot may be taken that a workflow holds while it is away."""
        now = self._clock()
        at_s = self._scheduler.cache.next_expiry_s(now) if len(self._requests) else inf
        if now < at_s < inf and not now < self._again_at_s <= at_s:
            self._again_at_s = at_s
            self._background.call_later(at_s - now, self._look)

    def _may_change(self, refused: SkipReason) -> bool:
        """Whether to look again later, rather than to drop a request."""
        return refused is SkipReason.BUSY or (
            refused in (SkipReason.THERE, SkipReason.UNWELL) and self._scheduler.health.asking
        )

    def _prompt(self, request: PrefetchRequest) -> Prompt | None:
        workflow, stage = request.workflow, request.stage
        if stage is None:
            return self.prompts.last.get(workflow)
        if request.next_of:
            return self.prompts.next(workflow, stage, request.next_of)
        return self.prompts.beginning(*stage, self._scheduler.isolation.scope(tenant_of(workflow)))

    # Doing it

    def _begin(self, request: PrefetchRequest, prompt: Prompt) -> None:
        missing, cache = self.value.missing(request.workflow, prompt), self._scheduler.cache
        expected = prompt.tokens - cache.missing(request.workflow, prompt.ask, prompt.tokens)
        lease = cache.acquire_prefetch(request.workflow, prompt.ask, prompt.tokens, self._clock(), self.book.owes)
        under_way = self.running = Prefill(request, prompt, cache, lease, expected, missing)
        self._requests.pop(request.key)
        self.book.started += 1
        self.book.split_started += bool(request.next_of)
        try:
            under_way.task = self._background.submit(self._prefill(under_way, self._fields(under_way)))
        except OrlaClosed:
            self.give_up(again=False)

    def _fields(self, under_way: Prefill) -> dict[str, Any]:
        """Return what the request has beside the prompt: the fields that its workflow's call would have."""
        prompt, lease = under_way.prompt, under_way.lease
        self._counter += 1
        told = Directions(
            call_id=f"{prompt.call_id}.warm{self._counter}",
            workflow=under_way.request.workflow,
            stage=prompt.stage,
            priority=PRIORITY,
            slot=lease.slot,
            fresh=lease.fresh,
            cache_salt=self._scheduler.isolation.salt(tenant_of(under_way.request.workflow)),
        )
        return self._scheduler.adapter.request_fields(prompt.ask, told)

    async def _prefill(self, under_way: Prefill, fields: Mapping[str, Any]) -> None:
        assert self._adapter is not None
        if self.running is not under_way:  # given up before it began
            return
        said, under_way.sent = Warmed(Effect.FAILED), True
        try:
            async with asyncio.timeout(LIMIT_S):
                said = await under_way.prompt.warm(self._adapter, fields)
        except TimeoutError:
            pass
        finally:
            self._ended(under_way, said)

    def _ended(self, under_way: Prefill, said: Warmed) -> None:
        """Record what the engine did, as it says; takes the lock itself."""
        request, prompt = under_way.request, under_way.prompt
        with self._scheduler.lock:
            if self.running is not under_way:  # given up meanwhile
                return
            self.running, warmed = None, said.effect is Effect.WARMED
            under_way.cache.release_prefetch(
                under_way.lease, said.usage.prompt_tokens or prompt.tokens if warmed else 0
            )
            orders = self._scheduler.orders
            orders.note(Order(Verb.WARM, said.effect), orders.order_logs.get(request.workflow) if warmed else None)
            if warmed:
                self._count(under_way, said.usage)
            else:
                self.book.failed += 1
                if request.next_of and request.stage is not None:
                    self.prompts.declined(request.stage)
                elif request.stage is not None:
                    self.prompts.unfit(request.stage, prompt.ask.scope)
        self._announce()
        with self._scheduler.changing():
            self._scheduler.cache.tidy()  # what had to wait for it
        self.look_soon()

    def _count(self, under_way: Prefill, usage: Usage) -> None:
        had = usage.cached_tokens or 0
        owed = Prefetched(had, max(0, usage.prompt_tokens - had), split=bool(under_way.request.next_of))
        self.book.warmed(under_way.request.workflow, under_way.prompt.whole, owed)
        if usage.cached_tokens is not None and under_way.expected_tokens > SLACK_TOKENS:
            self._scheduler.orders.found(under_way.expected_tokens, had)
        self.book.cost_usd += price(usage, self._scheduler.backend.cost) or 0.0
        self.value.heard_s = self._clock()

    def give_up(self, *, again: bool = True) -> bool:
        """End the warm-up under way, on the engine too; returns whether there was one.

        Args:
            again: Whether to begin it again when there is room.
        """
        if (under_way := self.running) is None:
            return False
        self.running = None
        under_way.cache.release_prefetch(under_way.lease, 0)
        self.book.gave_up(under_way.request.workflow, under_way.prompt.whole, _at_most(under_way))
        if again:
            self._requests.set(under_way.request.key, under_way.request)
        if under_way.task is not None:
            # Not from here: callbacks of the task may run at once, and the lock is held.
            self._background.call_later(0.0, partial(_cancel, under_way.task))
        return True

    def statistics(self) -> WarmStatistics:
        """Return a snapshot."""
        return self.book.statistics(len(self.prompts.last), self.prompts.chars)


def _at_most(under_way: Prefill) -> Prefetched | None:
    """Return what a warm-up that was given up may have computed; ``None`` where it did not reach the engine."""
    missing = round(under_way.missing_tokens)
    had, split = under_way.prompt.tokens - missing, bool(under_way.request.next_of)
    return Prefetched(had, missing, done=False, split=split) if under_way.sent else None


def _cancel(task: Future[None]) -> None:
    with contextlib.suppress(RuntimeError):  # its loop was closed, and the task with it
        task.cancel()
