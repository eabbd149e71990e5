"""When caches are kept, pinned, demoted, flushed and warmed: one small class for each rule, and how they are joined.

The rules are those of the Orla paper (section 2.2, Memory manager): preserve while a context grows by small
increments, flush at a workflow's boundaries, flush under pressure. Two are ours: what waits for a tool is pinned for
as long as such tools take, and a thread is demoted when its run ended, not flushed, since its user may write again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from orla_lg.arguments import answering
from orla_lg.core.memory.events import CacheAction, CacheEvent, Doing, EventKind, Holding, MemoryPolicy, Returns, Verb
from orla_lg.core.memory.verbs import VERBS
from orla_lg.errors import ConfigError, did_you_mean, shown

ALL_KINDS = frozenset(EventKind)


def rules_for(policy: MemoryPolicy, kind: EventKind) -> list[MemoryPolicy]:
    """Return the rules of a policy that may act on such events: all but those of classes that exclude them."""
    if type(policy) is Joined:
        return [rule for each in policy.policies for rule in rules_for(each, kind)]
    heeds = vars(type(policy)).get("KINDS", ALL_KINDS)  # not inherited: a derived class may heed others
    return [policy] if kind in heeds else []


class FlushAtBoundary:
    """Flush when a workflow is over or leaves a backend; demote what may come back.

    A thread's end is not the end: the user may write again, so its cache is released, not flushed. What
    is called outside any run is released at once.
    """

    _VERBS: ClassVar[dict[EventKind, Verb]] = {
        EventKind.STRAY_DONE: Verb.RELEASE,
        EventKind.SWITCHED: Verb.FLUSH,
        EventKind.IDLE: Verb.RELEASE,
        EventKind.OVER: Verb.FLUSH,
        EventKind.THREAD_DELETED: Verb.FLUSH,
        EventKind.FORGOTTEN: Verb.FLUSH,
    }
    KINDS: ClassVar[frozenset[EventKind]] = frozenset({*_VERBS, EventKind.CALL_DONE})

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        verb = self._VERBS.get(event.kind)
        if event.hint == "flush" and event.kind in (EventKind.CALL_DONE, EventKind.STRAY_DONE):
            verb = Verb.FLUSH
        if event.hint == "preserve" and event.kind is EventKind.SWITCHED:
            verb = None
        return () if verb is None else (CacheAction(verb, event.workflow, event.backend),)


class ReleaseAtSwitch(FlushAtBoundary):
    """Flush when a workflow is over; on a backend that it leaves, give its place back: it may return there.

    A graph that goes to and fro between two models, and a thread whose every turn begins on the light one, would
    else compute their whole prompts again at each turn.
    """

    _VERBS: ClassVar[dict[EventKind, Verb]] = FlushAtBoundary._VERBS | {EventKind.SWITCHED: Verb.RELEASE}
    KINDS: ClassVar[frozenset[EventKind]] = FlushAtBoundary.KINDS


class FlushPerRequest(FlushAtBoundary):
    """Flush after every call: the paper's baseline, for comparison."""

    _VERBS: ClassVar[dict[EventKind, Verb]] = FlushAtBoundary._VERBS | {
        EventKind.CALL_DONE: Verb.FLUSH,
        EventKind.STRAY_DONE: Verb.FLUSH,
        EventKind.INTERRUPTED: Verb.RELEASE,
    }
    KINDS: ClassVar[frozenset[EventKind]] = FlushAtBoundary.KINDS | {EventKind.INTERRUPTED}


class ReleaseOnly(FlushAtBoundary):
    """Never flush: places are given back at boundaries, contents stay until the engine needs the room."""

    _VERBS: ClassVar[dict[EventKind, Verb]] = {
        EventKind.INTERRUPTED: Verb.RELEASE,
        **{kind: Verb.RELEASE for kind in FlushAtBoundary._VERBS if kind is not EventKind.SWITCHED},
    }
    KINDS: ClassVar[frozenset[EventKind]] = FlushAtBoundary.KINDS | {EventKind.INTERRUPTED}


@answering
@dataclass(frozen=True, slots=True)
class PreserveIncrements:
    """Pin what grows by small increments, for as long as its workflow usually waits before it calls again.

    A pin that ends by itself costs nothing to forget, so it is the tool's learned duration that decides: the time in
    which nine in ten came back, and half as much again. Where nothing is learned yet it is ``unknown_s``.
    """

    small: float = 0.5
    """A call increments its workflow's context if it found at least this part of its prompt cached."""
    unknown_s: float = 30.0
    longest_s: float = 300.0
    likely: float = 0.2
    """A workflow that comes back less often than this is not waited for."""
    KINDS: ClassVar[frozenset[EventKind]] = frozenset({EventKind.CALL_DONE, EventKind.TOOL_STARTED})

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        if event.kind is EventKind.TOOL_STARTED:
            return self._pin(event)
        if event.kind is not EventKind.CALL_DONE or not event.waits or event.hint == "flush":
            return ()
        grown = event.fresh_tokens > (1 - self.small) * event.prompt_tokens
        return () if grown and event.hint != "preserve" else self._pin(event)

    def _pin(self, event: CacheEvent) -> Sequence[CacheAction]:
        returns = event.returns or Returns()
        if returns.chance < self.likely and event.hint != "preserve":
            return ()
        ttl_s = self.unknown_s if returns.late_s is None else 1.5 * returns.late_s
        return (CacheAction(Verb.PIN, event.workflow, event.backend, ttl_s=min(self.longest_s, ttl_s)),)


@answering
@dataclass(frozen=True, slots=True)
class DemoteInterrupted:
    """Release what waits for a human, after a while: an answer that comes at once should find everything warm."""

    after_s: float = 20.0
    KINDS: ClassVar[frozenset[EventKind]] = frozenset({EventKind.INTERRUPTED})

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        if event.kind is not EventKind.INTERRUPTED:
            return ()
        return (CacheAction(Verb.RELEASE, event.workflow, event.backend, after_s=self.after_s),)


@answering
@dataclass(frozen=True, slots=True)
class FlushUnderPressure:
    """When a backend is full, let go of what loses least: chance of reuse times tokens to compute again.

    What no open run uses goes before what one does. It is demoted, which on an engine that evicts by need is as
    good as a flush and costs nothing if the need passes.
    """

    KINDS: ClassVar[frozenset[EventKind]] = frozenset({EventKind.PRESSURE})

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        if event.kind is not EventKind.PRESSURE:
            return ()
        actions: list[CacheAction] = []
        room = 0
        for each in sorted(event.holdings, key=_cheapest_first):
            if room >= event.needs_tokens:
                break
            room += each.alone_tokens
            actions.append(CacheAction(Verb.RELEASE, each.workflow, event.backend))
        return actions


def _cheapest_first(holding: Holding) -> tuple[bool, float]:
    return holding.doing is Doing.TOOL, holding.loss_tokens


class WarmReturns:
    """Prefill for a thread that is resumed at once, and for a tool's workflow shortly before the tool should end."""

    KINDS: ClassVar[frozenset[EventKind]] = frozenset({EventKind.RESUMED, EventKind.TOOL_STARTED})

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        if event.kind is EventKind.RESUMED:
            return (CacheAction(Verb.WARM, event.workflow),)
        if event.kind is EventKind.TOOL_STARTED and event.returns is not None and event.returns.usual_s is not None:
            said, after_s = event.returns, 0.7 * event.returns.usual_s
            within_s = (event.returns.usual_s if said.late_s is None else said.late_s) - after_s
            return (
                CacheAction(
                    Verb.WARM, event.workflow, event.backend, after_s=after_s, chance=said.chance, within_s=within_s
                ),
            )
        return ()


@answering
@dataclass(frozen=True, slots=True)
class WarmNextStage:
    """Prefill what the likely next stage's prompt begins with, while the stage before it is busy.

    That is what its calls always begin with: its system prompt and its tools' schemas.
    """

    likely: float = 0.5
    """A stage that comes no more often than this is not prepared for."""
    KINDS: ClassVar[frozenset[EventKind]] = frozenset({EventKind.STAGE_BUSY})

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        if event.kind is not EventKind.STAGE_BUSY:
            return ()
        within_s = None if event.returns is None else event.returns.usual_s
        return [
            CacheAction(
                Verb.WARM, event.workflow, backend, graph=event.graph, stage=stage, chance=chance, within_s=within_s
            )
            for (stage, backend), chance in event.ahead.items()
            if chance > self.likely
        ]


@answering
@dataclass(frozen=True, slots=True)
class WarmSplit:
    """Prefill what is certain of a workflow's next prompt while a slower tool still runs.

    That is its last prompt, the answer that asked for the tools, and the results that are there. Where the other
    tools usually end soon the prefetch is not begun: its call would come before it is done.
    """

    gather_s: float = 0.02
    """Tools that end so shortly after each other are prefilled together."""
    unknown_s: float = 0.5
    """Where it is not known how long the others take, they are waited for so long first."""
    KINDS: ClassVar[frozenset[EventKind]] = frozenset({EventKind.TOOL_ENDED})

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        if event.kind is not EventKind.TOOL_ENDED or not event.running:
            return ()
        known = event.returns or Returns()
        after_s = self.unknown_s if known.usual_s is None else self.gather_s
        within_s = None if known.usual_s is None else known.usual_s - after_s
        if within_s is not None and within_s <= 0:
            return ()
        return (
            CacheAction(
                Verb.WARM, event.workflow, event.backend, graph=event.graph, stage=event.stage, next_of=event.call,
                after_s=after_s, chance=known.chance, within_s=within_s,
            ),
        )  # fmt: skip


@answering
class Joined:
    """Several rules as one policy: all are asked; of orders for one cache at one time the strongest counts.

    Args:
        policies: The rules, each by name or as an object.

    Raises:
        ConfigError: One of them is neither.
    """

    def __init__(self, *policies: str | MemoryPolicy) -> None:
        self.policies = tuple(memory_policy(each) for each in policies)
        self._by_kind = {kind: tuple(each for each in self.policies if rules_for(each, kind)) for kind in EventKind}

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:  # noqa: D102
        chosen: dict[tuple[str, str | None, float, bool, str, str], CacheAction] = {}
        for policy in self._by_kind[event.kind]:
            for action in policy.decide(event):
                # A pin and a warm-up go together, and so do warm-ups for several stages.
                warms = action.verb is Verb.WARM
                place = (action.workflow, action.backend, action.after_s, warms, action.stage, action.next_of)
                known = chosen.get(place)
                if known is None or VERBS[action.verb].strength > VERBS[known.verb].strength:
                    chosen[place] = action
        return list(chosen.values())


def default() -> MemoryPolicy:
    """Return what ``memory="default"`` means."""
    return Joined(
        ReleaseAtSwitch(),
        PreserveIncrements(),
        DemoteInterrupted(),
        FlushUnderPressure(),
        WarmReturns(),
        WarmNextStage(),
        WarmSplit(),
    )


_NAMED = {
    "default": default,
    "flush_at_boundary": FlushAtBoundary,
    "flush_per_request": FlushPerRequest,
    "release_only": ReleaseOnly,
}


def memory_policy(chosen: str | MemoryPolicy) -> MemoryPolicy:
    """Return the policy for a name, or the object itself.

    Raises:
        ConfigError: The name is unknown, or the object has no ``decide``.
    """
    if isinstance(chosen, str):
        if chosen not in _NAMED:
            raise ConfigError(f"unknown memory policy {shown(chosen)}{did_you_mean(chosen, _NAMED)}")
        return _NAMED[chosen]()
    if isinstance(chosen, type) or not callable(getattr(chosen, "decide", None)):
        raise ConfigError(f"{shown(chosen)} is no memory policy: it needs decide(event), as an object, not a class")
    return chosen
