"""A call of a replica: what the core decides comes by messages, what is measured and sent stays here.

It is an ``InFlightCall`` like any other for the edge that carries its bytes. It waits for a ``Grant``, holds one, has
reported a ``Missed`` attempt and waits again, or is over; changes of that are made under the link's lock, together
with the message that tells of them, so that after a lost connection each call is said as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

from orla_lg.core.cache.slots.table import SlotLease
from orla_lg.core.cache.verification import ExpectedTokens
from orla_lg.core.call import Assignment, Usage
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.guard.access import NO_ACCESS, tool_names
from orla_lg.core.guard.guard import Guard
from orla_lg.core.identity import Identity, workflow_key
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.mapping import Mapper
from orla_lg.core.memory.events import CacheEvent
from orla_lg.core.prefetch.prompts import Prompt
from orla_lg.core.queues import Queued
from orla_lg.core.record import Happening
from orla_lg.core.steps import Waiter
from orla_lg.errors import BackendUnavailable
from orla_lg.link.connection import Link
from orla_lg.link.messages import Adopt, End, Enter, FirstToken, Flat, Grant, Missed, Refused
from orla_lg.link.views import flat_assignment, flat_hints, flat_layer, read_considered


class CallCore(Protocol):
    """What a call needs of the core that decides about it (``side.CoreSide``)."""

    @property
    def pool(self) -> str:
        """That it decides for; empty where there are no pools."""
        ...

    @property
    def link(self) -> Link:
        """The connection to the core."""
        ...

    @property
    def prompts(self) -> SentPrompts:
        """Keeps what may be warmed."""
        ...

    @property
    def calls(self) -> CoreCalls:
        """Those that the core knows of."""
        ...

    @property
    def losses(self) -> LostCore:
        """Decides about calls without the core."""
        ...


class CoreCalls(Protocol):
    """The calls that one core knows of (``calls.ReplicaCalls``)."""

    def enter(self, call: LinkedCall) -> bool:
        """Tell the core of a call; returns whether there is one."""
        ...

    def missed(self, call: LinkedCall, report: Missed) -> bool:
        """Tell the core that an attempt failed; returns whether there is one."""
        ...

    def ended(self, call: LinkedCall, end: End) -> None:
        """Tell the core that a call is over."""
        ...

    def expire(self) -> None:
        """Let grants hold no more that were not used yet."""
        ...


class LostCore(Protocol):
    """What becomes of calls without one core (``losses.CoreLosses``)."""

    @property
    def lease_is_over(self) -> bool:
        """Whether grants of the core hold no more."""
        ...

    def met(self, call: LinkedCall) -> None:
        """Decide about a call that there is no core for."""
        ...


class CallReplica(Protocol):
    """What a call needs of the replica that it is made in (``serving.LinkedServing``)."""

    @property
    def guard(self) -> Guard:
        """Has the tags of its calls."""
        ...

    def missed(self, call: LinkedCall, report: Missed) -> None:
        """Let a call wait for what the core makes of a failed attempt."""
        ...

    def ended(self, call: LinkedCall, end: End, *, failed: bool) -> None:
        """Tell the core that a call is over."""
        ...


class SentPrompts(Protocol):
    """Keeps what calls send, where that may be warmed later (``prompts.KeptPrompts``)."""

    def sends(self, call: LinkedCall, body: Mapping[str, Any]) -> None:
        """Note the body of a call's request."""
        ...

    def ended(self, call: LinkedCall, usage: Usage | None, *, followed: bool) -> None:
        """Keep the prompt of a call whose workflow goes on, and tell the core."""
        ...


class CallPhase(Enum):
    """How far a call is."""

    NEW = "new"
    WAITING = "waiting"
    GRANTED = "granted"
    MISSED = "missed"
    """Its attempt failed, and it waits for what the core makes of that."""
    HUNG_UP = "hung up"
    """It is over here, and the engine may not have noticed: its grant is still out."""
    OVER = "over"


class LinkedCall(InFlightCall):
    """One call of a replica from its arrival to its end."""

    __slots__ = (
        "able", "alone", "broken", "by_name", "core", "failure", "gone", "grant", "held", "key", "mine", "moves",
        "own", "phase", "prompt", "raw", "refusal", "report", "serving", "tags", "turn",
    )  # fmt: skip

    serving: CallReplica
    """Where it is made; set when it arrives."""
    core: CallCore
    """Of the pool that it is in; set when it arrives, and changed under the link's lock."""
    raw: Identity
    """Where it comes from, as the edge said."""
    mine: Sequence[Mapper]
    """Of its graph: asked here."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.phase = CallPhase.NEW
        self.turn = Waiter()
        """Comes when the core answered."""
        self.grant: Grant | None = None
        """Of its newest attempt."""
        self.refusal: Refused | None = None
        self.failure: AttemptFailed | None = None
        """What its last attempt met."""
        self.report: Missed | None = None
        self.own: Assignment | None = None
        """Where its graph's own mapper wants it, or where another pool's core mapped it."""
        self.moves = 0
        """How often a core said that another one decides about it."""
        self.held: Sequence[str] = ()
        """The backends on which its caller held a grant when it came."""
        self.able: Collection[str] | None = None
        """The backends that its request can be sent to; ``None``: all."""
        self.alone = False
        """It goes on without the core (``on_core_lost="direct"``)."""
        self.broken = False
        self.gone = False
        """Its newest grant was used: the request is on its way, or was."""
        self.prompt: Prompt | None = None
        """What it sent, where that may be warmed later."""
        self.key: str | None = None
        """The id of the key in whose name a gateway makes it."""
        self.tags: Mapping[str, str] = {}
        """That its caller claims, where that is a gateway's."""
        self.by_name = False
        """It comes from no graph, and its model's name may say where it goes."""

    # What is said of it

    def entering(self) -> Enter:
        """Return what the core must know of it."""
        call, ask, had = self.call, self.call.ask, self.grant
        granted = had.attempt if had is not None and had.epoch == self.core.link.epoch else 0
        pieces, access, guard = ask.pieces, call.access or NO_ACCESS, self.serving.guard
        return Enter(
            call=call.id,
            age_s=self.services.clock() - call.arrived_s,
            workflow=workflow_key(self.raw.name),
            run=self.raw.run,
            stage=self.raw.stage,
            step=self.raw.step,
            namespace=self.raw.namespace,
            thread=self.raw.thread,
            identified=self.raw.identified,
            model=ask.model,
            stream=ask.stream,
            json_schema=ask.json_schema,
            tools=ask.tools,
            embeds=ask.embeds,
            images=ask.images,
            may_pass=call.may_pass,
            hashes=[hashed for hashed, _ in pieces],
            chars=[chars for _, chars in pieces],
            answers=[index for index in range(len(pieces)) if ask.is_answer(index)],
            prompt_chars=ask.prompt_chars,
            tools_chars=ask.tools_chars,
            max_tokens=ask.max_tokens,
            said=flat_hints(call.said),
            hints=flat_hints(call.hints),
            own=None if self.own is None else flat_assignment(self.own),
            able=None if self.able is None else list(self.able),
            holds=list(self.held),
            max_attempts=self.max_attempts if granted else max(1, self.max_attempts - self.attempts),
            timeout_s=None if call.timeout is None else call.timeout.seconds,
            layers=[flat_layer(each) for each in self.layers],
            attempts=granted,
            tags={**guard.tags, **self.tags},
            tool_names=tool_names(ask.schemas) if access.tools is None else list(access.tools),
            labels=sorted(access.labels | guard.flow.everywhere),
            for_stage=access.stage,
            moved=self.moves > 0,
            key=self.key,
            by_name=self.by_name,
        )

    def adopting(self) -> Adopt:
        """Return what a core must know of it that did not grant what it holds."""
        grant = self.grant
        assert grant is not None and grant.backend is not None
        first = self._first_s is not None
        return Adopt(tuple(self.entering()), grant.backend, grant.model, grant.attempt, first=first, slot=grant.slot)

    # What the core answers; in the link's thread, under its lock

    def granted(self, grant: Grant) -> bool:
        """Take a grant in; returns whether it is one to go by."""
        had = (0, 0) if self.grant is None else (self.grant.epoch, self.grant.attempt)
        if self.phase not in (CallPhase.WAITING, CallPhase.MISSED) or (grant.epoch, grant.attempt) <= had:
            return False
        self.phase, self.grant, self.gone = CallPhase.GRANTED, grant, False
        return True

    def expires(self) -> None:
        """Let a grant that was not used yet hold no more: the call waits for what the core makes of that."""
        assert self.grant is not None
        late = BackendUnavailable("the core has not been heard of for this replica's lease, and the grant is over")
        self.failure = AttemptFailed(late, overloaded=True)  # not the engine's fault
        self.report = Missed(
            self.call.id, self.grant.attempt, f"{late}", unreachable=False, overloaded=True, elsewhere=False,
            retry_after_s=None, unused=True,
        )  # fmt: skip
        self.phase, self.turn = CallPhase.MISSED, Waiter()

    def moved(self, core: CallCore, own: Assignment) -> None:
        """Let the call be another core's, which it enters at as it entered at this one: with its age and its turn."""
        self.core, self.own, self.moves = core, own, self.moves + 1
        self.phase, self.grant, self.report = CallPhase.NEW, None, None

    def refused(self, refusal: Refused) -> bool:
        """Take the core's last word in; returns whether it was waited for."""
        if self.phase not in (CallPhase.WAITING, CallPhase.MISSED):
            return False
        self.refusal = refusal
        return True

    # What the edge asks for and reports

    def goes(self) -> None:
        """Note that the call leaves for its engine, as its grant says."""
        grant, services = self.grant, self.services
        assert grant is not None
        self.gone = True
        self.departed_s = services.clock()
        self._wait_s += self.departed_s - self.entered_s
        if grant.backend is None:
            return
        self.tried.append(grant.backend)
        self.scheduler, self.backend = services.schedulers[grant.backend], grant.backend
        self.model = grant.model or self.scheduler.backend.model or self.call.ask.model
        self.assignment = Assignment(
            grant.backend, grant.model, grant.mapper or "", grant.reason, (), grant.parameters,
            read_considered(grant.considered),
        )  # fmt: skip
        self.slot_lease, self._queued = None, None
        if grant.cache_action is not None:
            self.slot_lease = SlotLease(grant.slot or 0, grant.cache_action, fresh=False)
        if grant.expected_tokens is not None:
            expected = ExpectedTokens(grant.expected_tokens, 0, None, None)
            self._queued = Queued(self.call, 0, waiting=False, granted=True, expected=expected)
        self.call.final_odds = grant.final_odds
        self.attempts += 1
        if services.records.heard:
            self._tell(Happening.DISPATCHED)

    @property
    def counts_streams(self) -> bool:  # noqa: D102
        if self.alone or self.grant is None:
            return super().counts_streams
        return self.grant.counts_streams

    def request_fields(self) -> Flat:  # noqa: D102
        if self.alone or self.grant is None:
            return super().request_fields()
        return dict(self.grant.fields)

    def sends(self, body: Mapping[str, Any]) -> None:  # noqa: D102
        if self.alone:
            super().sends(body)
        else:
            self.core.prompts.sends(self, body)

    def missed(self, failure: AttemptFailed) -> None:  # noqa: D102
        if self.alone:
            super().missed(failure)
            return
        assert self.grant is not None
        self.began_s = self.entered_s = self.services.clock()
        self._first_s = self.usage = None
        self.failure = failure
        cause = self._masked(f"{failure.cause}")
        self.report = Missed(
            self.call.id, self.grant.attempt, cause, failure.unreachable, failure.overloaded, failure.elsewhere,
            failure.retry_after_s,
        )  # fmt: skip
        self.turn = Waiter()
        self.serving.missed(self, self.report)

    def first_token(self) -> None:  # noqa: D102
        if self.alone or self.grant is None:
            super().first_token()
        elif self._first_s is None:
            self._first_s = self.services.clock()
            self.core.link.send(FirstToken(self.call.id, self.grant.attempt))
            if self.services.records.heard:
                self._tell(Happening.FIRST_TOKEN)

    def answered(self) -> None:  # noqa: D102
        if self.alone:
            super().answered()

    def broke(self, error: BaseException) -> None:  # noqa: D102
        if self.alone:
            super().broke(error)
        else:
            self.broken = True
            self.finish(error)

    def _give_back(self, *, failed: bool) -> list[CacheEvent]:
        if self.alone:
            return super()._give_back(failed=failed)
        usage = self.usage
        if usage is not None:  # what the engine computed, as far as it said
            fresh_tokens = usage.prompt_tokens - (usage.cached_tokens or 0)
            self.call.standing.serve(fresh_tokens + usage.completion_tokens, self.services.clock())
        record = self._record
        error = "failed" if failed else None
        if record is not None:
            error = record.error
        end = End(
            self.call.id, error, self.broken,
            None if usage is None else usage.prompt_tokens,
            None if usage is None else usage.cached_tokens,
            0 if usage is None else usage.completion_tokens,
            None if usage is None else usage.prefill_s,
            external=self.external,
        )  # fmt: skip
        self.serving.ended(self, end, failed=failed)
        return []
