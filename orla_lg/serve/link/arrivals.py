"""Calls of replicas: they come, are taken up again, and end. Each message counts once, however often it comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from orla_lg.core.call import Ask, Assignment, Hints
from orla_lg.core.guard.access import CallAccess
from orla_lg.core.guard.labels import claimed_labels
from orla_lg.core.guard.subject import checked_tags
from orla_lg.core.identity import Identity
from orla_lg.core.lifecycle import arrive, serve
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.limits.patience import SLICE_WAIT_S
from orla_lg.core.operation.adoption import adopt
from orla_lg.core.placement.elsewhere import BackendElsewhere
from orla_lg.core.serving import Serving
from orla_lg.core.workflow import of_tenant
from orla_lg.errors import AccessDenied, ConfigError, MappingError, OrlaError, QueueFull, shown
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import (
    Adopt,
    End,
    Enter,
    FirstToken,
    Flat,
    Keeps,
    Missed,
    Moved,
    Refused,
    SlotContents,
    read,
)
from orla_lg.link.views import read_assignment, read_layer
from orla_lg.serve.access.budgets import HeldSlot
from orla_lg.serve.access.keys import allows
from orla_lg.serve.gateway.placing import place_by_name
from orla_lg.serve.link.flat import (
    MOST_AGE_S,
    MOST_ATTEMPTS,
    MOST_CHARS,
    MOST_ID_CHARS,
    Fitting,
    LinkCaller,
    OwnMapping,
    SpokenKeys,
    ask_of,
    bounded,
    hints_of,
    identity_of,
    moved_of,
    named,
    refused_of,
    speaks_for_others,
    tenant_within,
    timeout_of,
    whole,
)
from orla_lg.serve.link.hosted import HostedCall, ReplicaCall, ReplicaLine
from orla_lg.serve.link.recovery import Recovery
from orla_lg.serve.link.roster import QueuePlace, Replica
from orla_lg.serve.link.warming import KeptPrompt, PromptKeeper

log = logging.getLogger("orla_lg")

MOST_CALLS = 10_000
"""Of one replica, waiting and granted."""

MOST_LAYERS = 16
"""Of one call."""

MOST_TOOLS = 10_000
"""That one call offers."""

KEEP_LAYERS = 256
"""Of one core, read from what replicas say."""


@dataclass(eq=False)
class LinkedCalls:
    """Takes in what replicas say of their calls. Of the loop's thread."""

    serving: Serving
    recovery: Recovery
    epoch: Callable[[], int]
    layers_of: Callable[[LinkCaller], Sequence[LimitScope]]
    """The limits of a key."""
    taken: Callable[[LinkCaller, bool], HeldSlot] = lambda caller, refuses: HeldSlot()
    """Counts a call in among those of its key; raises, if it may refuse, where there are as many as may be."""
    keys: SpokenKeys | None = None
    """Those in whose names gateways make calls."""
    pending: Callable[[str | None], Future[None] | None] = lambda key_id: None
    """What a key's call should wait for before it is counted in; ``None``: nothing."""
    slots_held: dict[str, set[str]] = field(default_factory=dict)
    """By backend, adopted calls that are in a slot of their engine: which one is free is not known meanwhile."""
    _layers: dict[str, tuple[Flat, LimitScope]] = field(default_factory=dict)
    _pending: dict[tuple[str, str], Callable[[], None]] = field(default_factory=dict)
    """By replica and call: those that wait until their key's calls in other pools give way."""

    # Coming

    def enter(self, replica: Replica, line: ReplicaLine, message: Enter) -> None:
        """Let a call arrive."""
        named(message.call, "a call's id", MOST_ID_CHARS)
        known = replica.calls.get(message.call)
        if known is not None:
            if known.line is not line:  # it did not get the grant
                known.attach(line, repeats=True)
            return
        if len(replica.calls) + self.recovery.held_of(replica.id) >= MOST_CALLS:
            full = QueueFull(
                f"this process has {MOST_CALLS} calls waiting or under way at the server; no more are taken"
            )
            line.send(refused_of(message.call, full))
            return
        arrived_s = self.serving.clock() - bounded(message.age_s, MOST_AGE_S)
        if self.recovery.over:
            self._enter(replica, line, message, arrived_s)
        else:
            self.recovery.hold(
                (replica.id, message.call), arrived_s, partial(self._late, replica, line, message, arrived_s)
            )

    def _late(self, replica: Replica, line: ReplicaLine, message: Enter, *since: float) -> None:
        """Let a call enter whose message came before; what is wrong in that ends its own connection only."""
        try:
            self._enter(replica, line, message, *since)
        except Exception as error:
            log.exception("a call of replica %s could not be taken in", replica.id)
            if replica.session is not None:
                replica.session.cut(f"a message could not be taken in: {error}")

    def _enter(
        self, replica: Replica, line: ReplicaLine, message: Enter, arrived_s: float, until_s: float | None = None
    ) -> None:
        if (pending := self.pending(message.key or replica.caller.key_id)) is not None:
            now = self.serving.clock()
            until_s = now + SLICE_WAIT_S if until_s is None else until_s
            if now < until_s:
                self._wait(pending, replica, line, message, arrived_s, until_s)
                return
        try:
            caller = self._caller_of(replica, message)
            inflight = self._made(replica, message, arrived_s, caller)
            slot = self._taken(caller)
        except OrlaError as error:
            if isinstance(error, LinkBroken):
                raise
            line.send(refused_of(message.call, error))
            return
        call = self._hosted(replica, line, message, inflight)
        call.attempt = whole(message.attempts, MOST_CHARS) or 0
        if (place := replica.places.pop(message.call, None)) is not None:
            inflight.place, inflight.tried = place.at, list(place.tried)
            inflight.call.standing = place.standing
            call.attempt = max(call.attempt, place.attempt)
        call.withdrawn = slot.release
        call.begin(serve(inflight, call, lambda record: slot.release()))  # its replica traces it

    def _caller_of(self, replica: Replica, message: Enter) -> LinkCaller:
        """Return in whose name a call is made: its link's, or that of the key which a gateway's caller sent.

        Raises:
            AccessDenied: The link makes no calls in others' names, or the key does not hold.
        """
        if message.key is None:
            return replica.caller
        speaks_for_others(replica.caller)
        named(message.key, "a key's id", MOST_ID_CHARS)
        if self.keys is None:
            raise AccessDenied("this core has no keys")
        return self.keys.caller_of(message.key)

    def _wait(
        self,
        pending: Future[None],
        replica: Replica,
        line: ReplicaLine,
        message: Enter,
        arrived_s: float,
        until_s: float,
    ) -> None:
        """Let a call enter once what it waits for has come, or the time is over."""
        loop, key = asyncio.get_running_loop(), (replica.id, message.call)

        def again() -> None:
            if self._pending.get(key) is again:
                del self._pending[key]
                timer.cancel()
                self._late(replica, line, message, arrived_s, until_s)

        def came(_: Future[None]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(again)

        self._pending[key] = again
        timer = loop.call_later(until_s - self.serving.clock(), again)
        pending.add_done_callback(came)

    def _taken(self, caller: LinkCaller) -> HeldSlot:
        try:
            return self.taken(caller, True)
        except OrlaError as error:
            raise QueueFull(str(error)) from error

    def adopt(self, replica: Replica, line: ReplicaLine, message: Adopt) -> None:
        """Take up a call again that holds a grant, of this core or of one before."""
        enter = read(("Enter", *message.enter))
        assert isinstance(enter, Enter)
        named(enter.call, "a call's id", MOST_ID_CHARS)
        known = replica.calls.get(enter.call)
        if known is not None:
            if known.granted is not None and known.line is not line:
                known.attach(line, repeats=False)
                if message.first:
                    known.first_token(FirstToken(enter.call, known.attempt))
            return
        if message.backend not in self.serving.schedulers or len(replica.calls) >= MOST_CALLS:
            log.warning("a call on backend %s cannot be adopted: there is none such here", shown(message.backend))
            return
        self.recovery.drop((replica.id, enter.call))
        self._adopt(replica, line, message, enter)

    def _adopt(self, replica: Replica, line: ReplicaLine, message: Adopt, enter: Enter) -> None:
        attempt = max(1, min(message.attempt, MOST_ATTEMPTS))
        assignment = Assignment(message.backend, message.model, "adopted", "granted by the core before")
        caller = replica.caller
        try:
            caller = self._caller_of(replica, enter)
            inflight = self._made(replica, enter, self.serving.clock() - bounded(enter.age_s, MOST_AGE_S), caller)
        except OrlaError as error:
            if isinstance(error, LinkBroken):
                raise
            # It is at the engine whatever is wrong with it now: what cannot be read of it is left out.
            log.warning("a call is adopted without what is wrong in it: %s", error)
            plain = enter._replace(said={}, hints={}, own=None, layers=(), run=None)
            inflight = self._made(replica, plain, self.serving.clock(), caller, checks=False)
        inflight.tried = [message.backend] * (attempt - 1)
        call = self._hosted(replica, line, enter, inflight)
        if message.slot is not None:
            self.slots_held.setdefault(message.backend, set()).add(enter.call)
            workflow, ask = inflight.call.identity.workflow, inflight.call.ask
            self._recall(message.backend, message.slot, workflow, ask, 0, self.serving.clock())
        slot = self.taken(caller, False)
        call.withdrawn = slot.release
        call.adopt(adopt(inflight, call, assignment, lambda record: slot.release()), attempt)
        if message.slot is not None and inflight.slot_lease is not None and inflight.slot_lease.slot == message.slot:
            self._free_slot(call)  # it is known where it is, and so which slots are free
        if message.first:
            call.first_token(FirstToken(enter.call, attempt))

    def recall(self, replica: Replica, message: SlotContents) -> None:
        """Note what a call that this core never saw left in a slot."""
        enter = read(("Enter", *message.enter))
        assert isinstance(enter, Enter)
        tokens, used_s = whole(message.tokens) or 0, self.serving.clock() - bounded(message.age_s, MOST_AGE_S)
        identity, (said, hints) = identity_of(enter), hints_of(enter)
        run = self.serving.book.run(identity.run) if identity.run in replica.runs else None
        try:
            said = _allowed(replica.caller, identity, said, hints, self.serving)
        except MappingError as error:
            log.warning("what is in slot %d of backend %s is not known: %s", message.slot, message.backend, error)
            return
        identity, _ = of_tenant(identity, said.over(hints), run)
        self._recall(message.backend, message.slot, identity.workflow, ask_of(enter), tokens, used_s)

    def _recall(self, backend: str, slot: int, workflow: str, ask: Ask, tokens: int, used_s: float) -> None:
        scheduler = self.serving.schedulers.get(backend)
        if scheduler is not None:
            with scheduler.lock:
                scheduler.cache.recall(slot, workflow, ask.prefix, tokens, used_s)

    def _hosted(self, replica: Replica, line: ReplicaLine, message: Enter, inflight: ReplicaCall) -> HostedCall:
        attempts = max(1, min(message.max_attempts, MOST_ATTEMPTS))
        call = HostedCall(inflight, line, self.epoch(), attempts, partial(self._refused, replica))
        replica.calls[message.call] = call
        return call

    def _made(
        self, replica: Replica, message: Enter, arrived_s: float, caller: LinkCaller, *, checks: bool = True
    ) -> ReplicaCall:
        """Return the call of a message, made in the name of a caller.

        Raises:
            OrlaError: It is refused.
            LinkBroken: It is none.
        """
        serving = self.serving
        identity, (said, hints) = identity_of(message), hints_of(message)
        if (
            identity.run is not None
            and identity.run not in replica.runs
            and serving.book.run(identity.run) is not None
        ):
            identity = replace(identity, run=None)  # another replica's
        if checks:
            said = _allowed(caller, identity, said, hints, serving)
        own = () if message.own is None else (OwnMapping(read_assignment(message.own)),)
        inflight = arrive(
            serving.services, identity, ask_of(message), call_id=message.call, said=said, hints=hints, mappers=own,
            layers=self._layers_of(caller, message.layers), timeout=timeout_of(message), may_pass=message.may_pass,
            kind=ReplicaCall,
        )  # fmt: skip
        assert isinstance(inflight, ReplicaCall)
        inflight.aged(max(0.0, inflight.call.arrived_s - arrived_s))
        inflight.holds = message.holds
        inflight.call.access = self._access(caller, message)
        moves = replica.moves and serving.schedulers.elsewhere is not None
        if checks and (moves or message.able is not None or caller.backends is not None):
            inflight.fit = fitting = Fitting(message.able, caller.backends)
            inflight.moves = fitting if moves else None
        if message.moved:
            inflight.mappers = own
        elif message.by_name:
            place_by_name(serving, inflight)
        return inflight

    def _access(self, caller: LinkCaller, message: Enter) -> CallAccess:
        """Return what access policies need to know of a call; what its replica claims can only narrow."""
        guard = self.serving.guard
        if message.for_stage is not None:
            named(message.for_stage, "a stage's name")
        if len(message.tool_names) > MOST_TOOLS:
            raise LinkBroken(f"a call with {len(message.tool_names)} tools, at most {MOST_TOOLS} are right")
        try:
            claimed, labels = checked_tags("tags", message.tags), claimed_labels("labels", message.labels)
        except ConfigError as error:
            raise LinkBroken(str(error)) from error
        guard.claims(labels)
        subject = guard.subject_of(caller.tags, claimed, trusted=caller.key_id is None)
        return CallAccess(subject, [str(name) for name in message.tool_names], labels, None, message.for_stage)

    def _layers_of(self, caller: LinkCaller, layers: Sequence[Flat]) -> Sequence[LimitScope]:
        """Return the limits of a call's graph, of its run and of its key."""
        own = self.layers_of(caller)
        if not layers:
            return own
        if len(layers) > MOST_LAYERS:
            raise LinkBroken(f"a call with {len(layers)} tables of limits, at most {MOST_LAYERS} are right")
        return (*map(self._layer, layers), *own)

    def _layer(self, flat: Flat) -> LimitScope:
        key = str(flat.get("key"))
        known = self._layers.get(key)
        if known is not None and known[0] == flat:
            return known[1]
        try:
            layer = read_layer(flat)
        except (AttributeError, TypeError) as error:
            raise LinkBroken(f"a table of limits that is none: {error}") from error
        layer = replace(layer, key=("link", layer.key))  # never that of the server's own limits
        if len(self._layers) >= KEEP_LAYERS:
            self._layers.clear()
        self._layers[key] = (flat, layer)
        return layer

    # Under way

    def first_token(self, replica: Replica, message: FirstToken) -> None:
        """Note a call's first token."""
        if (call := replica.calls.get(message.call)) is not None:
            call.first_token(message)

    def missed(self, replica: Replica, message: Missed) -> None:
        """Note a failed attempt."""
        if (call := replica.calls.get(message.call)) is not None:
            call.missed(message)

    def keeps(self, replica: Replica, message: Keeps, keeper: PromptKeeper) -> None:
        """Note that a replica keeps the prompt of a call."""
        call = replica.calls.get(message.call)
        if call is not None and call.granted is not None:
            chars = whole(message.chars, MOST_CHARS) or 0
            call.inflight.keeps(KeptPrompt.of(call.inflight, chars, message.frame, keeper))

    # Ending

    def end(self, replica: Replica, message: End) -> None:
        """End a call, or its wait."""
        self.recovery.drop((replica.id, message.call))
        self._pending.pop((replica.id, message.call), None)
        replica.places.pop(message.call, None)
        call = replica.calls.pop(message.call, None)
        if call is not None:
            call.end(message)
            self._free_slot(call)

    def _refused(self, replica: Replica, call: HostedCall, error: Exception) -> None:
        """Tell a replica that a call of its goes nowhere, or where else it goes."""
        id, moves = call.inflight.call.id, call.inflight.moves
        replica.calls.pop(id, None)
        if isinstance(error, BackendElsewhere) and moves is not None and moves.left is not None:
            answer: Moved | Refused = moved_of(id, error, moves.left)
            if call.withdrawn is not None:
                call.withdrawn()
        else:
            answer = refused_of(id, error)
        if call.line is not None:
            call.line.send(answer)
        self._free_slot(call)

    def _free_slot(self, call: HostedCall) -> None:
        if not self.slots_held:
            return
        for backend, held in list(self.slots_held.items()):
            held.discard(call.inflight.call.id)
            if not held:
                del self.slots_held[backend]
                self.serving.schedulers[backend].go_on()

    def lost(self, replica: Replica) -> None:
        """Note that a replica's connection was lost: what waits leaves the queue and keeps its place."""
        for key in [key for key in self._pending if key[0] == replica.id]:
            del self._pending[key]
        for id, call in list(replica.calls.items()):
            call.line = None
            if call.granted is None:
                inflight = call.inflight
                tried = inflight.tried[:-1] if call.waits else inflight.tried  # the last is to come
                replica.places[id] = QueuePlace(inflight.waits_at, inflight.call.standing, call.attempt, tried)
                del replica.calls[id]
                call.withdraw()

    def end_all(self, replica: Replica, why: str, *, unclaimed: bool = False) -> None:
        """End the calls of a replica; with *unclaimed* those only that it did not speak of."""
        for id, call in list(replica.calls.items()):
            if call.line is None or not unclaimed:
                del replica.calls[id]
                call.give_up(why)
                self._free_slot(call)


def _allowed(caller: LinkCaller, identity: Identity, said: Hints, hints: Hints, serving: Serving) -> Hints:
    """Return the hints given with a call, with the tenant that its key lets it have.

    Raises:
        MappingError: The key does not allow the tenant, or the stage.
    """
    if not allows(caller.stages, identity.stage):
        allowed = ", ".join(caller.stages or ()) or "none"
        raise MappingError(f"this key may not call from stage {identity.stage!r}; it may from {allowed}")
    if caller.tenants is None:
        return said
    run = None if identity.run is None else serving.book.run(identity.run)
    tenant = said.tenant if said.tenant is not None else hints.tenant
    tenant = tenant if tenant is not None or run is None else run.tenant
    within = tenant_within(caller, tenant)
    try:
        return said if said.tenant == within else replace(said, tenant=within)
    except ConfigError as error:
        raise MappingError(str(error)) from error
