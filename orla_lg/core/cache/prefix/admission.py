"""Step 4, queue: which waiting call a prefix cache lets in, by whether it fits beside what others still count on.

After ThunderAgent (which pauses whole programs on a timer), with these differences: it decides at every event, tokens
already promised count, prefixes that are shared count once, and every wait is bounded.

A workflow that had a call here has a *reference* to what that left in the cache, until its run is over. Two rules:

* A **new** workflow enters while all that is wanted fits: what calls use and references hold, what it brings itself,
  and a good part of what all of them are expected to grow by.
* A **resident** one goes before any new one, as soon as what calls use leaves room. The engine then evicts what was
  used longest ago: of those waiting for tools and humans, those that wait longest.

The call that the policies choose goes if it fits by the rule for its kind; only if not, residents go first. So
where all fits nothing of this is felt. No call passes one that waited too long, so that it gets its room.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from orla_lg.core.cache.engine_cache import AdmissionStatistics, Resident
from orla_lg.core.cache.gate import GATE_TOKENS, PATIENCE_S, Held
from orla_lg.core.cache.prefix.capacity import Capacity
from orla_lg.core.cache.prefix.eviction import PrefixNode
from orla_lg.core.cache.prefix.references import References
from orla_lg.core.cache.prefix.tree import CacheHandle, PrefixTree
from orla_lg.core.call import Call, Usage
from orla_lg.core.engine.speed import PREFILL_TOKENS_PER_S, Speed
from orla_lg.core.identity import tenant_of, workflow_name
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.queues import BackendQueue, Queued

GROWTH_SHARE = 0.8
"""Of the growth expected of all, the part that is kept free: not all are at their longest at once."""

UNKNOWN_GROWTH = 1.5
"""Growth expected of a workflow of a kind without any ended run, in lengths of its prompt."""


LENIENCE = 2.0
"""A prefill may take so many times as long as expected before others wait for it no longer."""

PATIENCE_CALLS = 20.0
"""A call that waited ``PATIENCE_S``, or as long as so many calls take where that is longer, has waited too long: no
call passes it, whatever the scheduling policy says. It is a rule of ageing beside that of ``policies.Priority``."""

LOOK_AT = 32
"""When those that should go cannot, so many that might go in their place are looked at."""


@dataclass(eq=False, slots=True)
class Entry:
    """A call that was let in."""

    handle: CacheHandle
    open_at_s: float
    """By then its prefill should be done, even if it does not stream."""


class Admission:
    """Decides which calls may enter one backend's KV cache. Under the backend's lock.

    Args:
        estimates: What calls and graphs usually take.
        references: The references, shared with the prefix cache, which counts on them too.
        holds: Whether calls wait for what they need; else they are only accounted for.
    """

    def __init__(self, estimates: Estimates, references: References | None = None, *, holds: bool = True) -> None:
        self.capacity = Capacity()
        self.references = references or References(PrefixTree())
        self.cache = self.references.cache
        self.holds = holds
        self.again_at_s = inf
        """When to choose again if nothing happens before; monotonic."""
        self.gated: set[Queued] = set()
        """Calls that were seen to wait for another one's prefill when it was last chosen."""
        self._estimates = estimates
        self._entries: dict[Queued, Entry] = {}
        self._prefilling: dict[Queued, Entry] = {}
        """Of these, those with a prefill under way that is long enough to wait for."""
        self._awaited: dict[object, PrefixNode] = {}
        """What they prefill, by its keys."""
        self._short: set[Queued] = set()
        """Calls that were seen not to fit beside what calls in flight use."""
        self._short_at: tuple[int, float] = 0, inf
        """When that was: the tree's changes by then, and the limit."""

    # The next call

    @property
    def lets_all(self) -> bool:
        """Whether calls go in the order of the queue, whatever their prompts."""
        return (not self.holds or self.capacity.limit == inf) and not self._prefilling and not self.gated

    def choose(self, queue: BackendQueue, now: float, speed: Speed) -> Queued | None:
        """Return the call that goes next, or ``None`` if none may now; ``again_at_s`` says when to look again."""
        self.again_at_s = inf
        self.gated.clear()
        if self._prefilling:
            self._open_overdue(now)
        if not self.holds or (self.capacity.limit == inf and not self._prefilling):
            return queue.next(now)
        late_before_s = now - max(PATIENCE_S, PATIENCE_CALLS * (speed.service_s or 0.0))
        beside = self._beside(queue)
        candidates = queue.candidates(now, beside)
        late = [each for each in candidates if is_late(each, late_before_s)]
        for queued in candidates:
            held = self._look(queued, now, late_before_s)
            if held is Held.CACHE or (held is None and queued not in late and self._takes_room_of(late, queued)):
                return self._choose_under_pressure(queue, now, late_before_s, beside)
            if held is None:
                return queued
        return None

    def _beside(self, queue: BackendQueue) -> list[Queued]:
        """Return the calls that might pass those heads of stages that wait for a prefix."""
        if not self._prefilling:
            return []
        gated = [head for head in queue.heads() if self._is_gated(head.call)]
        return [each for head in gated for each in queue.first_of_stage(head.call.identity.stage, LOOK_AT)]

    def _choose_under_pressure(
        self, queue: BackendQueue, now: float, late_before_s: float, beside: Iterable[Queued]
    ) -> Queued | None:
        """Choose when not all fits: first the call that waited too long, then residents, then new ones."""
        residents = queue.waiting_of(name for name in queue.by_workflow if name in self.references)
        led = {each.call.identity.stage for each in queue.heads() if self._is_resident(each.call)}
        behind = (each for stage in led for each in queue.first_of_stage(stage, LOOK_AT))
        candidates = queue.candidates(now, (*residents, *beside, *behind))
        candidates.sort(key=lambda each: (not is_late(each, late_before_s), not self._is_resident(each.call)))
        for queued in candidates[:LOOK_AT]:
            held = self._look(queued, now, late_before_s)
            if held is None:
                return queued
            if held is Held.CACHE and (is_late(queued, late_before_s) or not self._is_resident(queued.call)):
                break
        return None

    def _takes_room_of(self, late: list[Queued], queued: Queued) -> bool:
        """Whether one of those that waited too long would not fit beside a call."""
        room = self.capacity.limit - self.cache.in_use_tokens
        if late:
            room -= self._uses(queued.call)
        return any(self._uses(each.call) > room for each in late)

    def _uses(self, call: Call) -> float:
        return self._adds(call)[0]

    def _adds(self, call: Call) -> tuple[float, float]:
        return self.cache.adds(call.ask, call.expected_answer_tokens, call.identity.prompt_owner)

    def _is_resident(self, call: Call) -> bool:
        return call.identity.workflow in self.references

    def _look(self, queued: Queued, now: float, late_before_s: float) -> Held | None:
        """Return why a call cannot go now, noting that and when to look again; ``None``: it may."""
        held = self._held(queued, now, late=is_late(queued, late_before_s))
        queued.held = held or ""
        if held is Held.PREFIX:
            self.gated.add(queued)
        if held is Held.CACHE:
            late_at_s = now + queued.call.arrived_s - late_before_s
            self.again_at_s = min(self.again_at_s, max(now + 1.0, late_at_s))
        return held

    def _held(self, queued: Queued, now: float, *, late: bool) -> Held | None:
        if not self._entries:
            return None  # with nothing in flight some call must go, whatever it takes
        call = queued.call
        if self._is_gated(call):
            return Held.PREFIX
        if self._short_at != (at := (self.cache.eviction_order.changes, self.capacity.limit)):
            self._short, self._short_at = set(), at
        if queued in self._short:
            return Held.CACHE
        in_use, wanted = self._adds(call)
        if self.cache.in_use_tokens + in_use > self.capacity.limit:
            self._short.add(queued)
            return Held.CACHE
        if late or self._is_resident(call) or self._has_room(call, wanted):
            return None
        self.references.lapse_one(now)
        _, wanted = self._adds(call)
        return None if self._has_room(call, wanted) else Held.CACHE

    def _has_room(self, call: Call, wanted_tokens: float) -> bool:
        """Whether a new workflow fits, with a part of what all will grow by."""
        grows = self.references.grows_tokens + self._growth(call)
        return self.cache.wanted_tokens + wanted_tokens + GROWTH_SHARE * grows <= self.capacity.limit

    def _growth(self, call: Call) -> float:
        """Return what a workflow's longest context is expected to grow by after a call, in tokens."""
        if call.identity.run is None:
            return 0.0  # outside any run nothing is known to follow
        learned = self._estimates.growth_tokens(call.standing.graph, call.identity.stage, call.standing.visit)
        return (
            UNKNOWN_GROWTH * self.cache.tokens_of(call.ask, call.identity.prompt_owner)
            if learned is None
            else learned
        )

    def _is_gated(self, call: Call) -> bool:
        """Whether waiting for another call's prefill saves a prefill of its own."""
        if not self._prefilling or self._awaited.keys().isdisjoint(call.ask.prefix):
            return False
        found = self.cache.find(call.ask, call.identity.prompt_owner)
        if sum(piece.tokens for piece in found if self._awaited.get(piece.key) is piece) < GATE_TOKENS:
            return False
        self.again_at_s = min(self.again_at_s, *(entry.open_at_s for entry in self._prefilling.values()))
        return True

    # Calls

    def enter(
        self, queued: Queued, now: float, prefill_tokens_per_s: float | None, found: list[PrefixNode] | None = None
    ) -> float:
        """Let a call in: its prompt and expected answer count from now on.

        Returns the tokens that the engine is believed to give up for it. *found* is as for ``PrefixTree.begin``.
        """
        call = queued.call
        handle = self.cache.begin(call.ask, call.expected_answer_tokens, call.identity.prompt_owner, found)
        gone_tokens = self._evicted()
        # Growth is weighed against a limit; while none is known, nothing is computed.
        self.references.enter(call.identity.workflow, self._growth(call) if self.capacity.limit < inf else 0.0)
        fresh_tokens = 0.0
        for piece in handle.fresh:
            fresh_tokens += piece.tokens
        open_at_s = now + LENIENCE * fresh_tokens / (prefill_tokens_per_s or PREFILL_TOKENS_PER_S)
        self._entries[queued] = Entry(handle, open_at_s)
        if fresh_tokens >= GATE_TOKENS:
            self._prefilling[queued] = self._entries[queued]
            self._awaited.update((piece.key, piece) for piece in handle.fresh)
        return gone_tokens

    def first_token(self, queued: Queued) -> bool:
        """Note that a call's prefill is done; returns whether others may have waited for it."""
        entry = self._entries.get(queued)
        if entry is not None:
            self.cache.filled(entry.handle)
        return self._open(queued)

    def _open_overdue(self, now: float) -> None:
        for queued in [each for each, entry in self._prefilling.items() if now >= entry.open_at_s]:
            self._open(queued)

    def _open(self, queued: Queued) -> bool:
        """End all waits for a call's prefill."""
        entry = self._prefilling.pop(queued, None)
        for piece in () if entry is None else entry.handle.fresh:
            if self._awaited.get(piece.key) is piece:
                del self._awaited[piece.key]
        return entry is not None

    def leave(self, queued: Queued, now: float, usage: Usage | None, *, reached: bool, followed: bool) -> None:
        """Give back what a call used. Idempotent.

        Args:
            queued: The call.
            now: Monotonic seconds.
            usage: What the engine counted, if it did.
            reached: Whether the call can have got to the engine.
            followed: Whether its workflow goes on, and so counts on what was left.
        """
        if queued in self._prefilling:
            self._open(queued)
        entry = self._entries.pop(queued, None)
        if entry is None:
            return
        if reached:
            self._end(entry.handle, usage)
        else:
            self.cache.undo(entry.handle)
        who, leaf = queued.call.identity, entry.handle.answer if reached else None
        self.references.leave(who.workflow, who.stage, leaf, now, followed=followed)
        self._evicted()

    def _evicted(self) -> float:
        """Believe gone what the engine gives up for what is in use now; returns its tokens."""
        return self.cache.shrink(self.capacity.limit)

    def _end(self, handle: CacheHandle, usage: Usage | None) -> None:
        if usage is None:
            self.cache.end(handle, None, None)
            return
        self.cache.end(handle, usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
        if usage.cached_tokens is not None:
            self.capacity.found(handle.expected_tokens, usage.cached_tokens, handle.enough_tokens)

    def engine_lost(self) -> None:
        """Expect nothing more of what the engine held."""
        for entry in self._entries.values():
            entry.handle.expected_tokens = 0.0  # what it will not find says nothing about the size of the cache

    def statistics(self) -> AdmissionStatistics:
        """Return a snapshot."""
        limit = self.capacity.limit
        return AdmissionStatistics(
            limit_tokens=None if limit == inf else round(limit),
            in_use_tokens=round(self.cache.in_use_tokens),
            wanted_tokens=round(self.cache.wanted_tokens),
            growth_tokens=round(self.references.grows_tokens),
            losses=self.capacity.losses,
            lapsed=self.references.lapsed,
            workflows=tuple(
                Resident(workflow_name(each.workflow), each.tokens, each.doing, tenant_of(each.workflow) or None)
                for each in self.references.holdings()
            ),
        )

    def check_integrity(self, warmed_tokens: float = 0.0) -> None:
        """Assert the invariants; *warmed_tokens* are in use by a warm-up, which is no call."""
        self.cache.check_integrity()
        self.references.check_integrity()
        assert sum(reference.in_flight for reference in self.references.by_workflow.values()) == len(self._entries)
        assert set(self._prefilling) <= set(self._entries)
        awaited = {piece for entry in self._prefilling.values() for piece in entry.handle.fresh}
        kept = set(self._awaited.values())
        assert kept <= awaited and not any(piece.alive for piece in awaited - kept)
        assert all(piece.key == key for key, piece in self._awaited.items())
        if self._short_at == (self.cache.eviction_order.changes, self.capacity.limit):
            room = self.capacity.limit - self.cache.in_use_tokens
            assert all(self._uses(each.call) > room for each in self._short)
        if not self._entries:
            assert abs(self.cache.in_use_tokens - warmed_tokens) < 1e-3, self.cache.in_use_tokens


def is_late(queued: Queued, late_before_s: float) -> bool:
    """Whether a call waited too long: it came before that time."""
    return queued.call.arrived_s < late_before_s
