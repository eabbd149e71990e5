"""An outside service that orders the queues: asked ahead, so that no grant ever waits for it.

While calls wait on a backend the service is asked, one question at a time, which of them goes next; a call that
comes, goes or ends asks again. When a place becomes free, the call that was named goes, if it still waits; else the
backend's own policies decide, as they do while an answer is on its way, after one that cannot be used, and behind one
that failed three times in a row for a while. A decision is made under the queue's lock by what is known; the question
is asked without it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orla_lg.core.boundary.plain import counted
from orla_lg.core.call import Call
from orla_lg.core.engine.breaker import Breaker, BreakerPolicy
from orla_lg.core.policies import Policies, RequestPolicy, StagePolicy
from orla_lg.core.queues import Queued, Sortable
from orla_lg.core.record import CallEvent, Happening
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.serving import Serving
from orla_lg.serve.past_calls.moments import rfc3339
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.fetching import OutsideClient, OutsideFault
from orla_lg.serve.posted.items import PostedSetting
from orla_lg.serve.posted.outside import SCHEDULER_POLICY, HookTies

log = logging.getLogger("orla_lg")

MOST_PENDING = 500
"""So many waiting calls are told, the oldest."""

BREAKER = BreakerPolicy(failures=3, pause_s=1.0, max_pause_s=30.0)

CHANGES = frozenset({Happening.QUEUED, Happening.DISPATCHED, Happening.FINISHED})


class NamedFirst:
    """A policy of either level that lets the calls go first that the service named, the others as they would.

    Args:
        base: Orders the others.
        places: Of the named ones, by arrival number.
    """

    def __init__(self, base: StagePolicy | RequestPolicy, places: dict[int, int]) -> None:
        self.base, self._places = base, places
        self.steady = getattr(base, "steady", False)
        self.follows_service = getattr(base, "follows_service", False)
        if (granted := getattr(base, "granted", None)) is not None:
            self.granted = granted

    def key(self, head: Queued, now: float) -> Sortable:
        """Return the sort key of a call."""
        place, key = self._places.get(head.order, MOST_PENDING), self.base.key(head, now)
        return (place, *key) if isinstance(key, tuple) else (place, key)


class OutsideOrder:
    """Asks the service that is posted, for each backend. Of the server's loop.

    Args:
        serving: The core.
        client: Asks.
        ties: What it is told of calls, and counted by.
    """

    def __init__(self, serving: Serving, client: OutsideClient, ties: HookTies) -> None:
        self.outcomes = Counter[tuple[str, str]]()
        """By backend and outcome: ``ok``, ``fallback_timeout``, ``fallback_error``, ``fallback_invalid``, and
        ``skipped`` behind failures."""
        self._serving, self._client, self._ties = serving, client, ties
        self._setting: PostedSetting | None = None
        self._breaker = Breaker(BREAKER)
        self._places: dict[str, dict[int, int]] = {}
        self._end_listening: Callable[[], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = set[str]()
        self._asking = set[str]()
        self._wake = asyncio.Event()

    def follow(self, items: PostedItems) -> None:
        """Ask the service that is posted now."""
        stored = items.get(PostedSetting, SCHEDULER_POLICY)
        setting = None if stored is None or not stored.item.url else stored.item
        if setting == self._setting:
            return
        self._setting, self._breaker = setting, Breaker(BREAKER)
        if setting is None:
            self.stop()
        elif self._end_listening is None:
            self._loop = asyncio.get_running_loop()
            self._end_listening = self._serving.records.subscribe(self._heard)
        if setting is not None:
            for name in self._serving.schedulers:
                self._mark(name)

    def stop(self) -> None:
        """Ask no more; the queues are ordered as before. Idempotent."""
        self._setting = None
        if self._end_listening is not None:
            self._end_listening()
            self._end_listening = None
        self._places.clear()
        for scheduler in self._serving.schedulers.values():
            _order_by(scheduler, None)

    def _heard(self, event: CallEvent) -> None:
        """Note in whichever thread that a queue changed."""
        if event.kind in CHANGES and event.backend is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._mark, event.backend)

    def _mark(self, backend: str) -> None:
        self._changed.add(backend)
        self._wake.set()

    async def run(self) -> None:
        """Ask whenever a queue changed, for ever."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._wake.wait()
                self._wake.clear()
                for backend in self._changed - self._asking:
                    self._changed.discard(backend)
                    self._asking.add(backend)
                    tasks.create_task(self._ask_about(backend))

    async def _ask_about(self, backend: str) -> None:
        try:
            scheduler, setting = self._serving.schedulers.get(backend), self._setting
            if scheduler is not None and setting is not None:
                await self._ask(scheduler, setting)
        finally:
            self._asking.discard(backend)
            if backend in self._changed:
                self._wake.set()

    async def _ask(self, scheduler: BackendScheduler, setting: PostedSetting) -> None:
        pending = _pending(scheduler)
        if len(pending) < 2:
            return
        name = scheduler.backend.name
        if not self._breaker.admit(self._serving.clock()):
            self._count(name, "skipped")
            return
        asked = self._question(scheduler, pending)
        try:
            answer = await self._client.ask("POST", setting.url, asked, timeout_s=setting.timeout_ms / 1000)
            order = _named(answer, {queued.call.id: queued.order for queued in pending})
        except OutsideFault as fault:
            self._failed(name, fault)
            order = []
        else:
            self._count(name, "ok")
            self._breaker.succeeded()
        if setting is self._setting:
            self._apply(scheduler, pending, order)

    def _count(self, backend: str, outcome: str) -> None:
        self.outcomes[backend, outcome] += 1
        self._ties.counted("applied" if outcome == "ok" else "failed")

    def _failed(self, backend: str, fault: OutsideFault) -> None:
        outcome = f"fallback_{fault.kind}"
        first = not any(count for (_, known), count in self.outcomes.items() if known == outcome)
        self._count(backend, outcome)
        if fault.kind == "invalid":
            self._breaker.succeeded()
        else:
            self._breaker.failed(self._serving.clock(), str(fault))
        if first:
            log.warning("the service that orders calls failed: %s; more like this is only counted", fault)

    def _question(self, scheduler: BackendScheduler, pending: Sequence[Queued]) -> dict[str, Any]:
        queue, now, wall_s = scheduler.queue, self._serving.clock(), time.time()
        return {
            "backend": {
                "name": scheduler.backend.name, "capacity": queue.max_concurrency, "inflight": queue.in_flight,
                "queue_depth": queue.waiting,
            },
            "pending": [
                {
                    "id": queued.call.id, "stage": queued.call.identity.stage, "model": queued.call.ask.model,
                    "tags": self._tags(queued.call), "enqueued_at": rfc3339(wall_s - (now - queued.call.arrived_s)),
                    "wait_ms": round((now - queued.call.arrived_s) * 1000),
                }
                for queued in pending
            ],
        }  # fmt: skip

    def _tags(self, call: Call) -> dict[str, str]:
        hints = {"tenant": call.hints.tenant, "priority": call.hints.priority}
        said = {name: str(value) for name, value in hints.items() if value is not None}
        return {**said, **self._ties.tags_of(call.id)}

    def _apply(self, scheduler: BackendScheduler, pending: Sequence[Queued], order: Sequence[int]) -> None:
        """Let the named calls go first from now on."""
        name = scheduler.backend.name
        places = self._places.setdefault(name, {})
        _order_by(scheduler, places)
        with scheduler.changing():
            touched = {each for each in (*places, *order) if places.get(each) != _place(order, each)}
            places.clear()
            places.update({each: place for place, each in enumerate(order)})
            now = scheduler.clock()
            for queued in pending:
                if queued.order in touched and queued.waiting:
                    scheduler.queue.reorder(now, queued.call.identity.workflow, _only(queued.call))

    def statistics(self) -> dict[str, dict[str, int]]:
        """Return how often each backend's queue was ordered, and how often not, by outcome."""
        found: dict[str, dict[str, int]] = {}
        for (backend, outcome), count in sorted(self.outcomes.items()):
            found.setdefault(backend, {})[outcome] = count
        return found


def _only(call: Call) -> Callable[[Call], bool]:
    return lambda other: other is call


def _place(order: Sequence[int], number: int) -> int | None:
    return order.index(number) if number in order else None


def _pending(scheduler: BackendScheduler) -> list[Queued]:
    with scheduler.lock:
        return sorted(scheduler.queue, key=lambda queued: queued.order)[:MOST_PENDING]


def _named(answer: Any, pending: Mapping[str, int]) -> list[int]:
    """Return the arrival numbers of the calls that an answer names, the first one first.

    Raises:
        OutsideFault: It names none of them.
    """
    said = answer if isinstance(answer, Mapping) else {}
    ranking = [said["next"]] if said.get("next") else said.get("order")
    if not isinstance(ranking, list) or not ranking:
        raise OutsideFault("invalid", "the answer has neither 'next' nor 'order'")
    found = [pending[each] for each in ranking[: len(pending)] if isinstance(each, str) and each in pending]
    if not found:
        raise OutsideFault("invalid", f"none of {counted(len(pending), 'pending call')} was named")
    return list(dict.fromkeys(found))


def _order_by(scheduler: BackendScheduler, places: dict[int, int] | None) -> None:
    """Put the named calls first in a backend's policies, or (``None``) no longer."""
    before = scheduler.queue.policies
    are_wrapped = {isinstance(each, NamedFirst) for each in (before.stage, *before.requests.values())}
    if are_wrapped == {places is not None}:
        return
    with scheduler.changing():
        scheduler.queue.change_policies(_wrapped(scheduler.queue.policies, places), scheduler.clock())


def _wrapped(policies: Policies, places: dict[int, int] | None) -> Policies:
    made: dict[int, Any] = {}  # one object may order both levels, and keeps one account

    def one(policy: Any) -> Any:
        base = policy.base if isinstance(policy, NamedFirst) else policy
        return base if places is None else made.setdefault(id(base), NamedFirst(base, places))

    return Policies(one(policies.stage), {stage: one(each) for stage, each in policies.requests.items()})
