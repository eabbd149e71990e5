"""The memory manager: asks the policy about what happens to workflows, and has its orders carried out.

It adds when a workflow that waits now usually calls again (``returns``). What the policy wants done later is done
later, unless the workflow calls before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from orla_lg.core.background import Background, Clock
from orla_lg.core.call import Call
from orla_lg.core.memory import returns
from orla_lg.core.memory.events import (
    FINAL,
    CacheAction,
    CacheEvent,
    Doing,
    EventKind,
    MemoryPolicy,
    Returns,
    SplitPrompt,
    Verb,
)
from orla_lg.core.memory.policies import ReleaseOnly, WarmNextStage, rules_for
from orla_lg.core.memory.verbs import VERBS
from orla_lg.core.scheduler import BackendScheduler

ON_THREAD = {EventKind.INTERRUPTED: returns.HUMAN, EventKind.IDLE: returns.IDLE}
"""What a thread waits for after such an event."""

UNLIKELY = 0.2
"""A workflow that comes back less often than this is not waited for."""


IN_ITS_PLACE = ReleaseOnly()
"""Decides what a policy that fails does not."""

log = logging.getLogger("orla_lg")


class MemoryManager:
    """Keeps caches by workflow on all backends. Holds no lock while it asks or orders.

    Args:
        policy: Decides.
        schedulers: Those of the backends; may still be filled when this is made.
        background: For what is done later.
        clock: Monotonic seconds.
        book: When workflows come back, if the schedulers ask the same one; else one of its own.
    """

    def __init__(
        self,
        policy: MemoryPolicy,
        schedulers: Mapping[str, BackendScheduler],
        background: Background,
        clock: Clock,
        book: returns.ReturnBook | None = None,
    ) -> None:
        self.policy = policy
        self.returns = book or returns.ReturnBook()
        self._schedulers = schedulers
        self._background = background
        self._clock = clock
        self._lock = threading.Lock()
        self._due: dict[str, list[object]] = {}
        """By workflow, a token for each order that is to be carried out later."""
        self._failed: set[EventKind] = set()
        """On which events the policy failed."""
        self.follower: Callable[[CacheEvent], None] | None = None
        """Hears of each event, after what is done about it; ``None`` while nothing wants to."""

    @property
    def policy(self) -> MemoryPolicy:
        """What decides."""
        return self._policy

    @policy.setter
    def policy(self, policy: MemoryPolicy) -> None:
        self._policy = policy
        self._kinds = frozenset(kind for kind in EventKind if rules_for(policy, kind))
        """Events that it may do something about."""
        self._heeds_stages: bool | None = None

    def heeds_stages(self) -> bool:
        """Whether it makes a difference to know which calls a busy stage leads to.

        It does not where the policy's only answer would be a warm-up, and no backend can be warmed.
        """
        if self._heeds_stages is None:
            rules = rules_for(self.policy, EventKind.STAGE_BUSY)
            warmable = any(scheduler.prefetcher.able for scheduler in self._schedulers.values())
            self._heeds_stages = warmable or any(type(rule) is not WarmNextStage for rule in rules)
            self._heeds_stages &= bool(rules)
        return self._heeds_stages

    # What happens

    def signal(self, events: Iterable[CacheEvent]) -> None:
        """Ask the policy about *events* and have its orders carried out."""
        for each in events:
            event = self._informed(each)
            if event.kind in self._kinds:
                for action in self._decided(event):
                    self._order(action)
            if event.kind in FINAL:
                self._drop_due(event.workflow)
                for scheduler in self._schedulers.values():
                    scheduler.forget(event.workflow)
            if self.follower is not None:
                self.follower(event)

    def _decided(self, event: CacheEvent) -> Sequence[CacheAction]:
        """Ask the policy; where it fails, slots are released at boundaries and nothing else is done."""
        try:
            return [_checked(action) for action in self._policy.decide(event)]
        except Exception:  # a policy is its user's code; its fault must not end a call, nor hold a place for ever
            if event.kind not in self._failed:
                self._failed.add(event.kind)
                log.exception(
                    "memory policy %r failed on %s; this is logged once. Slots are released at the ends of runs all "
                    "the same, and what is cached stays until the engine needs the room", self.policy, event.kind,
                )  # fmt: skip
            return IN_ITS_PLACE.decide(event)

    def _informed(self, event: CacheEvent) -> CacheEvent:
        """Learn from an event, and add what is known of when its workflow calls again."""
        now, workflow = self._clock(), event.workflow
        if event.waits:
            if event.returns is not None:
                return event
            return replace(event, returns=self.away(workflow, event.graph, event.stage))
        if event.kind is EventKind.TOOL_STARTED:
            return replace(event, returns=self.returns.uses(workflow, event.tool, now))
        if event.kind is EventKind.TOOL_ENDED:
            return replace(event, returns=self.returns.rest(event.running, event.at_once))
        if event.kind is EventKind.PRESSURE:
            held = [
                replace(each, chance=self.returns.chance(each.workflow, each.doing, each.since_s, now))
                for each in event.holdings
            ]
            return replace(event, holdings=held)
        if (reason := ON_THREAD.get(event.kind)) is not None:
            said = self.returns.waits(workflow, reason, now)  # first: the turn makes schedulers ask for its chance
            self._turned(workflow, returns.ON_THREAD[reason])
            return replace(event, returns=said)
        if event.kind is EventKind.RESUMED:  # else what is warmed now would be saved, as if it waited for a human
            self._turned(workflow, Doing.TOOL)
            for scheduler in self._schedulers.values():
                scheduler.returned(workflow)
        if event.kind in FINAL:
            self.returns.gone(workflow)
        return event

    def _turned(self, workflow: str, doing: Doing) -> None:
        for scheduler in self._schedulers.values():
            scheduler.turned(workflow, doing)

    def away(self, workflow: str, graph: str, stage: str) -> Returns:
        """Note that a workflow waits, after a call of a stage, for what comes next; returns what is known of that."""
        return self.returns.waits(workflow, returns.after_stage(graph, stage), self._clock())

    def called(self, workflow: str) -> None:
        """Note that a workflow calls: what was to be done if it did not is not done."""
        if self._due:
            self._drop_due(workflow)
        self.returns.came(workflow, self._clock())

    def keep_s(self, call: Call) -> float | None:
        """Return for how long the cache of a call's workflow should be kept after it; ``None``: not known."""
        if call.identity.run is None:
            return 0.0  # outside any run nothing is known to follow
        usual = self.returns.usual(returns.after_stage(call.standing.graph, call.identity.stage))
        return 0.0 if usual.chance < UNLIKELY else usual.late_s

    def forget_prompts(self) -> None:
        """Drop every prompt that is kept to be sent again: what may be sent where has changed."""
        for scheduler in self._schedulers.values():
            scheduler.prefetcher.forget_all()

    def extend(self, split: SplitPrompt) -> bool:
        """Keep what is certain of a workflow's next prompt; returns whether it can be warmed, as far as is known."""
        scheduler = self._schedulers.get(split.backend)
        return scheduler is not None and scheduler.prefetcher.extend(split)

    def why_never_warmed(self) -> dict[str, str | None]:
        """Return of each backend why no prompt is ever prefilled there; ``None`` where one may be."""
        return {name: scheduler.prefetcher.why_never for name, scheduler in self._schedulers.items()}

    # What is done

    def _order(self, action: CacheAction) -> None:
        if action.after_s <= 0:
            self._carry_out(action)
            return
        token = object()
        with self._lock:
            self._due.setdefault(action.workflow, []).append(token)
        self._background.call_later(action.after_s, partial(self._come_due, action, token))

    def _come_due(self, action: CacheAction, token: object) -> None:
        with self._lock:
            tokens = self._due.get(action.workflow, [])
            if token not in tokens:
                return
            tokens.remove(token)
            if not tokens:
                del self._due[action.workflow]
        self._carry_out(action)

    def _carry_out(self, action: CacheAction) -> None:
        for name, scheduler in self._schedulers.items():
            if action.backend in (None, name):
                scheduler.apply(action)

    def _drop_due(self, workflow: str) -> None:
        """Drop what was to be done later about a workflow."""
        with self._lock:
            self._due.pop(workflow, None)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        self.returns.check_integrity()
        with self._lock:
            assert all(self._due.values()), "a workflow without anything due"


def _checked(action: CacheAction) -> CacheAction:
    """Return what a policy decided, if it is an action that a policy may ask for."""
    if not isinstance(action, CacheAction):
        raise TypeError(f"decide(event) returns CacheActions, as a list; in it was {action!r}")
    if not (isinstance(action.verb, Verb) and VERBS[action.verb].of_policies):
        names = ", ".join(f"Verb.{verb.name}" for verb, meaning in VERBS.items() if meaning.of_policies)
        raise TypeError(f"the verb of a policy's CacheAction is one of {names}; it was {action.verb!r}")
    return action
