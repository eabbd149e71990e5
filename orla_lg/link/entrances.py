"""Where a call enters with several pools, and how it moves on: each call is known to one core at a time.

A call enters at the pool of the backend that its graph's own mapper wants, else where its stage went last, else where
the mapping sends it beforehand. The core there maps it like any other. Where it finds a backend of another pool it
answers ``Moved``, and the call enters there in the link's own thread: with its age, with the turn that its caller
waits for, and asked for by name, so that no mapper is asked again. That costs one round trip, and is bounded.

All links of a replica share one lock. So a call, and what a core is told of its run, changes from one core to another
in one step: no opening of a connection says it twice, or to neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.call import Assignment, Call
from orla_lg.core.mapping import AUTO, Mappings, Planned, foretold
from orla_lg.core.operation.backends import Schedulers
from orla_lg.core.placement.view import BackendView
from orla_lg.errors import BackendUnavailable, OrlaClosed, shown
from orla_lg.link.call import LinkedCall
from orla_lg.link.connection import Link
from orla_lg.link.cores import Cores
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import Moved, Refused, Welcome
from orla_lg.link.progress import LinkedProgress
from orla_lg.link.side import CoreSide
from orla_lg.link.views import ServedBackend, read_assignment

MOST_MOVES = 8
"""Of one call: more show that the cores' configurations contradict each other."""

MOST_POOLS = 1_000

KEEP_STAGES = 10_000
"""Of so many stages it is known where they went last."""

LinkMaker = Callable[[str], Link]

Where = tuple[str | None, str, str]
"""Variant and stage; of a call of no stage also the model that the code names."""


class PooledReplica(Protocol):
    """What this needs of its replica (``serving.LinkedServing``)."""

    mappings: Mappings
    progress: LinkedProgress
    schedulers: Schedulers

    def side_of(self, pool: str, link: Link) -> CoreSide:
        """Return the replica's side of a core."""
        ...


class MovedMapping:
    """Says what another pool's core has said of a call."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment:  # noqa: D102
        return self._assignment

    def foretell(self, stage: str) -> Planned:
        """Return where the call goes."""
        named = (self._assignment.backend, *self._assignment.alternatives)
        return Planned(stage, named, self._assignment.mapper)


class Entrances:
    """Lets calls enter at the core of the right pool.

    Args:
        replica: Where they are made.
        cores: Those that are known.
        link_to: Makes a link to a pool's core, not opened yet.
    """

    def __init__(self, replica: PooledReplica, cores: Cores, link_to: LinkMaker | None) -> None:
        self._replica, self._cores, self._link_to = replica, cores, link_to
        self._last = BoundedDict[Where, str](KEEP_STAGES)
        """The pool that a stage went to last, where that was not foreseen."""

    # Which pools there are; under the links' lock

    def follow(self, side: CoreSide, welcome: Welcome, backends: Mapping[str, Sequence[ServedBackend]]) -> None:
        """Follow which pools a core knows of, and where their cores are."""
        for pool in self._named(welcome):
            if pool == welcome.pool or (other := self._side(pool, side.link, welcome)) is None or other is side:
                continue
            other.served.expected(backends.get(pool, ()))
        if welcome.pools:
            self._replica.schedulers.arrange([str(flat.get("name")) for flat in welcome.pools])
        self._drop_others(side)

    def _named(self, welcome: Welcome) -> set[str]:
        """Return the pools that a core knows of: as they are configured, else as its directory has them."""
        configured = {str(flat.get("pool", "")) for flat in welcome.pools}
        return configured or set(welcome.cores)

    def _side(self, pool: str, giver: Link, welcome: Welcome | None) -> CoreSide | None:
        """Return the side of a pool's core, made where there is none; ``None``: there are too many.

        Args:
            pool: The pool.
            giver: The link of the core that names it.
            welcome: What that said, and so where the pool's core is.
        """
        cores = self._cores
        known = cores.by_pool.get(pool)
        urls = () if welcome is None else welcome.cores.get(pool, ())
        if known is not None:
            if urls and not known.link.up:
                giver.tells(known.link, urls)
            return known
        if self._link_to is None or len(cores.by_pool) >= MOST_POOLS:
            return None
        home, link = cores.home.link, self._link_to(pool)
        link.lock, link.places = home.lock, home.places.of_pool(pool)
        giver.tells(link, urls)
        side = self._replica.side_of(pool, link)
        cores.add(side)
        link.begin(side)
        return side

    def _drop_others(self, learner: CoreSide) -> None:
        """Let go of pools that no core knows of any more, and whose own cores are gone."""
        cores = self._cores
        welcomes = [each.served.welcome for each in cores.all() if each is learner or each.link.up]
        named = set[str]().union(*(self._named(welcome) for welcome in welcomes if welcome is not None))
        for side in cores.all():
            if side.pool not in named and side is not cores.home and not (side.link.up or len(side.calls)):
                side.served.leave()
                cores.remove(side)
                side.link.stop(0.0)

    # Calls

    def enter(self, call: LinkedCall) -> None:
        """Let a call wait for the word of the core of its pool; that is told of its run first.

        Raises:
            BackendUnavailable: There is no core, and it is not to wait for one.
            OrlaClosed: The replica was closed.
            LinkBroken: It cannot be told.
        """
        side = self._entrance(call)
        with self._cores.home.link.lock:
            if self._cores.by_pool.get(side.pool) is not side:  # the pool was given up just now
                side = self._cores.home
            call.core = side
            self._replica.progress.joins(call.raw.run, side)
            reached = side.calls.enter(call)
        if not reached:
            side.losses.met(call)

    def _entrance(self, call: LinkedCall) -> CoreSide:
        cores, ask = self._cores, call.call.ask
        if call.own is not None:
            return cores.of(call.own.backend)
        pool = self._last.get(_where(call))
        if pool is not None and (side := cores.by_pool.get(pool)) is not None:
            return side
        mappings, hints = self._replica.mappings, call.call.hints
        variant = None if hints.variant is None else mappings.variants.get(hints.variant)
        for mapper in (variant, mappings.shared):
            planned = None if mapper is None else foretold(mapper, call.call.identity.stage)
            if planned is not None and planned.backends:
                return cores.of(planned.backends[0])
        schedulers = self._replica.schedulers
        return cores.of(next(iter(schedulers), "") if ask.model == AUTO else ask.model)

    def moved(self, side: CoreSide, message: Moved) -> None:
        """Let a call enter at the core that decides about it, as the one that it entered at says; in a link's thread.

        Raises:
            LinkBroken: The message says no assignment.
        """
        own, fault, reached = read_assignment(message.own), None, True
        with self._cores.home.link.lock:
            call = side.calls.give_up(message.call)
            if call is None:  # it ended meanwhile
                return
            to = self._side(message.pool, side.link, side.served.welcome)
            if to is None or call.moves >= MOST_MOVES:
                call.refusal = _too_often(call, own, message.pool)
            else:
                call.moved(to, own)
                self._last.set(_where(call), to.pool)
                self._replica.progress.joins(call.raw.run, to)
                try:
                    reached = to.calls.enter(call)
                except (OrlaClosed, LinkBroken) as error:
                    fault = error
        if fault is not None:
            call.turn.fail(fault)
        elif call.refusal is not None:
            call.turn.come()
        elif not reached and to is not None:
            to.losses.met(call)

    def goes_alone(self, call: LinkedCall) -> None:
        """Keep a call that goes on without its core to backends of pools without one; the others' bounds hold."""
        if call.moves and call.own is not None:
            call.mappers = (MovedMapping(call.own),)
        call.fit = partial(self._without_core, call.fit)

    def _without_core(
        self, inner: Callable[[Assignment], Assignment | None] | None, assignment: Assignment
    ) -> Assignment | None:
        named = (assignment.backend, *assignment.alternatives)
        left = [name for name in named if not self._cores.of(name).link.up]
        if not left:
            raise BackendUnavailable(
                f"the call goes on without its core, and backend {shown(assignment.backend)} is of a pool that has "
                "one; the next try enters there"
            )
        kept = Assignment(
            left[0], assignment.model, assignment.mapper, assignment.reason, tuple(left[1:]), assignment.parameters,
            assignment.considered,
        )  # fmt: skip
        return kept if inner is None else inner(kept)


def _where(call: LinkedCall) -> Where:
    stage = call.call.identity.stage
    return call.call.hints.variant, stage, "" if stage else call.call.ask.model


def _too_often(call: LinkedCall, own: Assignment, pool: str) -> Refused:
    text = (
        f"stage {call.call.identity.stage!r}: backend {own.backend!r} is of pool {pool!r}, a core says, and another "
        f"one says otherwise: the call moved {call.moves} times; do all cores have one configuration?"
    )
    return Refused(call.call.id, "MappingError", text)
