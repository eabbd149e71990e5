"""What becomes of a replica's calls without a core: they wait, end, or go on with this replica's part of the bound.

Whatever is chosen, a replica that no core was heard of for its lease ends what runs at engines by grants: the core
gives their places to others by then. Only with ``"direct"`` it does not, where no bound is promised.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal, get_args

from orla_lg.core.boundary.plain import counted
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import BackendUnavailable
from orla_lg.link.call import LinkedCall
from orla_lg.link.calls import ReplicaCalls
from orla_lg.link.connection import Link
from orla_lg.link.views import Known
from orla_lg.openai_api.client import EngineClients

OnCoreLost = Literal["wait", "fail", "direct"]
"""Calls wait for a core, end at once, or go on without one; what was granted goes on in any case."""

ON_CORE_LOST: tuple[OnCoreLost, ...] = get_args(OnCoreLost)

log = logging.getLogger("orla_lg")

UNSAID_S = 2.0
"""A core that is lost for less is not logged: a standby takes over within that."""


class CoreLosses:
    """Decides about the calls of a replica that has no core.

    Args:
        link: To the core.
        calls: Those that the core knows of.
        mine: Returns the schedulers of the core's backends; calls that go on alone queue there.
        clients: By backend.
        known: What the core said last.
        on_core_lost: What becomes of calls that wait.
        core_patience_s: How long they wait for a core.
    """

    def __init__(
        self,
        link: Link,
        calls: ReplicaCalls,
        mine: Callable[[], Mapping[str, BackendScheduler]],
        clients: Mapping[str, EngineClients],
        known: Known,
        on_core_lost: OnCoreLost,
        core_patience_s: float,
    ) -> None:
        self._link, self._calls, self._mine, self._clients = link, calls, mine, clients
        self._known, self._on_core_lost, self._core_patience_s = known, on_core_lost, core_patience_s
        self.direct_calls = 0
        """How many went on without the core."""
        self._divided = self._told = False
        self.also_ends: Callable[[str], None] | None = None
        """Ends the requests to a backend that go by other clients than these, as a gateway's do; in any thread."""

    def lost(self) -> None:
        """Decide about the calls that wait, at a loss."""
        if self._on_core_lost != "wait":
            for call in self._calls.waiting():
                self._goes_without(call)

    def met(self, call: LinkedCall) -> None:
        """Decide about a call that there is no core for.

        Raises:
            BackendUnavailable: It is not to wait for one.
        """
        if self._on_core_lost != "wait" and not self._link.beginning:
            self._goes_without(call)

    def found(self) -> None:
        """Note that there is a core again."""
        if self._told:
            log.warning("there is a core again; the calls that waited go on")
        self._divided = self._told = False

    def _goes_without(self, call: LinkedCall) -> None:
        if self._on_core_lost == "fail":
            waits = "on_core_lost='wait' waits for it"
            call.turn.fail(BackendUnavailable(f"the core is lost: {self._link.fault}; {waits}"))
        elif self._calls.leave(call):
            self._divide()
            self.direct_calls += 1
            call.turn.come()

    def _divide(self) -> None:
        """Give each backend this replica's part of its bound, for calls that go on alone."""
        if self._divided:
            return
        self._divided, replicas = True, self._known.replicas
        for name, scheduler in self._mine().items():
            seen = self._known.seen.get(name)
            bound = scheduler.backend.max_concurrency if seen is None else seen.view.max_concurrency
            with scheduler.changing():
                scheduler.queue.max_concurrency = None if bound is None else max(1, bound // replicas)
                scheduler.queue.paused = False if seen is None else seen.view.paused
        log.warning(
            "the core is lost (%s): calls go on without it, each backend with 1/%d of its bound in this process, and "
            "no order, limit or cache is shared meanwhile; statistics().direct counts such calls",
            self._link.fault, replicas,
        )  # fmt: skip

    # What time brings

    def looked(self) -> None:
        """End what waited long enough for a core, and what runs by a lease that is over."""
        self._calls.let_go()
        if not self._link.up and self._on_core_lost == "wait":
            now, waiting = time.monotonic(), list(self._calls.waiting())
            self._tell(len(waiting), now)
            for call in waiting:
                if now - max(self._link.lost_s, call.call.arrived_s) > self._core_patience_s:
                    call.turn.fail(
                        BackendUnavailable(
                            f"no core for {self._core_patience_s} s (core_patience_s): {self._link.fault}; is "
                            "`orla-lg serve` running?"
                        )
                    )
        if self.lease_is_over and self._on_core_lost != "direct":
            self._calls.expire()
            if not self._link.up:
                self.lost()
            self._end_requests()

    def _tell(self, waiting: int, now: float) -> None:
        """Log once of each loss that calls wait for a core, where that takes long."""
        if waiting and not self._told and now - self._link.lost_s > min(UNSAID_S, self._core_patience_s / 2):
            self._told = True
            log.warning(
                "the core is lost (%s): %s in this process for the next one, for %g s at most (core_patience_s)",
                self._link.fault, counted(waiting, "call waits", "calls wait"), self._core_patience_s,
            )  # fmt: skip

    @property
    def lease_is_over(self) -> bool:
        """Whether no core is known to have heard of this replica for its lease: grants that it has hold no more."""
        return time.monotonic() - self._link.confirmed_s > self._known.replica_lease_s

    def _end_requests(self) -> None:
        """End what runs at engines; asked again as long as something does, since a connection may just be made."""
        granted = self._calls.granted()
        for call in granted:
            call.cut = (
                f"the request to backend {call.backend!r} was ended: no core was heard of for "
                f"{self._known.replica_lease_s} s, this replica's lease, so its place belongs to others"
            )
        for name in {call.backend for call in granted}:
            if name is not None and (clients := self._clients.get(name)) is not None:
                clients.abort()
            if name is not None and self.also_ends is not None:
                self.also_ends(name)
