"""The simulated engine: requests in, events out, on whatever clock the caller has.

Nothing here sleeps, and nothing reads a clock: ``advance(now)`` does everything that happens up to *now*, and
``next_event_s`` says when something will. A test or a study jumps from event to event; the server waits.
"""

from __future__ import annotations

from collections import deque
from itertools import count
from math import inf
from random import Random

from orla_lg_sim.ownership import Ownership
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import EngineState, Event, Kind, SimRequest
from orla_lg_sim.residents import Residents
from orla_lg_sim.scheduler import EngineStep, Member, Scheduler


class SimEngine:
    """A continuous-batching engine. The same requests at the same times give the same events.

    Times are seconds on the caller's clock and must not go back.
    """

    def __init__(self, parameters: EngineParameters) -> None:
        self.parameters = parameters
        self.ownership = Ownership(parameters.kv_blocks)
        spare_blocks = int(parameters.keep_whole * parameters.kv_blocks)
        residents = Residents(self.ownership, spare_blocks) if parameters.keep_whole else None
        self.scheduler = Scheduler(parameters, self.ownership.pool, self.ownership.claim, residents)
        self._random = Random(parameters.seed)
        self._members: dict[str, Member] = {}
        self._orders = count()
        self._arriving: deque[Member] = deque()
        """On their way through the server, in order: it takes one after another."""
        self._in_flight: deque[tuple[float, EngineStep]] = deque()
        """Steps and when they end; the first is being computed."""
        self._depth = 2 if parameters.async_scheduling else 1
        self._server_free_s = -inf
        self._now_s = -inf
        self._finished = 0
        self._unread: list[Event] = []

    def submit(self, request: SimRequest, now: float) -> None:
        """Let a request arrive.

        Raises:
            ValueError: It can never run, or its id is taken.
        """
        assert now >= self._now_s, f"the clock went back from {self._now_s} to {now}"
        total, most = request.prompt_tokens + request.output_tokens, self.parameters.longest_tokens
        if total > most:
            raise ValueError(f"request {request.id!r} has {total} tokens, the engine takes {most} at most")
        if request.id in self._members:
            raise ValueError(f"there is a request {request.id!r} already")
        began = max(now, self._server_free_s)
        ready = began + self.parameters.request_s + self.parameters.request_token_s * request.prompt_tokens
        self._server_free_s = ready
        member = Member(request, next(self._orders), now, ready)
        self._members[request.id] = member
        self._arriving.append(member)

    def abort(self, id: str, now: float) -> bool:
        """End a request without another event; returns whether it was there."""
        self._run_until(now)
        member = self._members.pop(id, None)
        if member is None:
            return False
        if member in self._arriving:
            self._arriving.remove(member)
        else:
            self.scheduler.retire(member)
        member.gone = True
        return True

    def next_event_s(self) -> float | None:
        """Return when something happens next if nobody comes; ``None`` while there is nothing to do."""
        if self._unread:
            return self._now_s
        if self._in_flight:
            return self._in_flight[0][0]
        return self._arriving[0].ready_s if self._arriving else None

    def advance(self, now: float) -> list[Event]:
        """Return what happened up to *now*, in order."""
        self._run_until(now)
        events, self._unread = self._unread, []
        return events

    def state(self) -> EngineState:
        """Return the load and the counters, as of the last ``advance``."""
        scheduler, pool = self.scheduler, self.ownership.pool
        return EngineState(
            running=len(scheduler.running),
            waiting=scheduler.waiting + len(self._arriving),
            kv_usage=pool.held / pool.blocks,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            steps=scheduler.step,
            finished=self._finished,
            evictions=pool.evictions,
        )

    def check_integrity(self) -> None:
        """Assert that no block is lost and that all counts agree."""
        self.scheduler.check_integrity()
        self.ownership.check_integrity()
        inside = {*self._arriving, *self.scheduler.members()}
        assert inside == set(self._members.values())

    # Inside

    def _run_until(self, now: float) -> None:
        assert now >= self._now_s, f"the clock went back from {self._now_s} to {now}"
        while True:
            if self._in_flight:
                at_s = self._in_flight[0][0]
            elif self._arriving:
                at_s = self._arriving[0].ready_s
            else:
                break
            if at_s > now:
                break
            if self._in_flight:
                self._put_out(self._in_flight.popleft()[1], at_s)
            self._receive(at_s)
            self._compose(at_s)
        self._now_s = now
        if self.ownership.has_pins:
            self.ownership.expire(now)

    def _receive(self, at_s: float) -> None:
        while self._arriving and self._arriving[0].ready_s <= at_s:
            self.scheduler.enqueue(self._arriving.popleft())

    def _compose(self, at_s: float) -> None:
        if self.ownership.has_pins:
            self.ownership.expire(at_s)
        while len(self._in_flight) < self._depth and (step := self.scheduler.compose()) is not None:
            begins_s = self._in_flight[-1][0] if self._in_flight else at_s
            self._in_flight.append((begins_s + self.duration_s(step), step))
        for member in self.scheduler.preempted:
            self._tell(member, Kind.PREEMPTED, at_s, member.generated)
        self.scheduler.preempted.clear()

    def duration_s(self, step: EngineStep) -> float:
        """Return how long a step takes, jitter included."""
        costs = self.parameters
        exact = (
            costs.step_s
            + costs.prefill_s * step.prefilled
            + costs.prefill_token_s * step.prefill_tokens
            + costs.prefill_attention_s * step.prefill_pairs
            + costs.decode_sequence_s * step.decoding
            + costs.decode_context_s * step.context_tokens
            + costs.held_token_s * step.held_blocks * costs.block_tokens
        )
        return exact * self._random.lognormvariate(0.0, costs.jitter) if costs.jitter else exact

    def _put_out(self, step: EngineStep, at_s: float) -> None:
        """Tell what a step brought, and let go who is done."""
        for member, tokens in step.told:
            if not member.gone:
                self._tell(member, Kind.FIRST_TOKEN if tokens == 1 else Kind.TOKEN, at_s, tokens)
        for member in step.last:
            if not member.gone:
                self._tell(member, Kind.FINISHED, at_s, member.generated)
                self.scheduler.retire(member)
                del self._members[member.request.id]
                self._finished += 1

    def _tell(self, member: Member, kind: Kind, at_s: float, tokens: int) -> None:
        self._unread.append(member.event(kind, at_s, tokens))
