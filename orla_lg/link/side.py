"""A replica's side of one core: the link to it, and all that is said and known of the pool that the core decides for.

A server without pools has one. With pools there is one for each: they come as the directory names them, and each has
a connection, calls, requests, prompts and losses of its own, so that a pool without a core holds up its own calls
only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from orla_lg.core.background import Background
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.link.calls import ReplicaCalls
from orla_lg.link.connection import Link
from orla_lg.link.losses import CoreLosses, OnCoreLost
from orla_lg.link.messages import (
    Grant,
    Hello,
    Message,
    Moved,
    Refused,
    Renewed,
    RequestDone,
    StopWarm,
    View,
    Warm,
    Welcome,
)  # fmt: skip
from orla_lg.link.prompts import KeptPrompts
from orla_lg.link.reports import CoreReports
from orla_lg.link.requests import CoreRequests
from orla_lg.link.served import ServedBackends
from orla_lg.link.views import Known
from orla_lg.openai_api.client import EngineClients


class SideReplica(Protocol):
    """What one core's side needs of the replica that it is in (``serving.LinkedServing``)."""

    def greets(self, link: Link) -> Hello:
        """Return what a connection begins with."""
        ...

    def learned(self, side: CoreSide, welcome: Welcome) -> None:
        """Follow what a core is and serves."""
        ...

    def said_again(self, side: CoreSide, welcome: Welcome) -> Sequence[Message]:
        """Return all that a core must know that has just been met."""
        ...

    def moved(self, side: CoreSide, message: Moved) -> None:
        """Let a call enter at another core."""
        ...

    def was_forked(self) -> None:
        """Begin afresh in a child."""
        ...


class CoreSide:
    """One core, as a replica has it; it is what hears of the link (``listener.Listener``).

    Args:
        pool: That the core decides for; empty where there are no pools.
        link: To the core.
        replica: Where this is.
        schedulers: Of all backends, by name.
        clients: The same.
        served: Makes what follows the core's backends.
        background: Where prefetches run.
        on_core_lost: What becomes of calls without a core.
        core_patience_s: How long they wait for one.
    """

    def __init__(
        self,
        pool: str,
        link: Link,
        replica: SideReplica,
        schedulers: Mapping[str, BackendScheduler],
        clients: Mapping[str, EngineClients],
        served: Callable[[CoreSide], ServedBackends],
        background: Background,
        on_core_lost: OnCoreLost,
        core_patience_s: float,
    ) -> None:
        self.pool, self.link, self._replica = pool, link, replica
        self.known = Known()
        self.requests = CoreRequests(link)
        self.prompts = KeptPrompts(link, background)
        self.reports = CoreReports(link)
        self.calls = ReplicaCalls(link, schedulers)
        self.served = served(self)
        self.losses = CoreLosses(
            link, self.calls, self.served.mine, clients, self.known, on_core_lost, core_patience_s
        )

    def check_integrity(self) -> None:
        """Assert that each call that the core knows of is in its pool."""
        with self.link.lock:
            self.calls.check_integrity(self)

    # What the link hears (``listener.Listener``)

    def hello(self) -> Hello:  # noqa: D102
        return self._replica.greets(self.link)

    def opening(self, welcome: Welcome) -> Sequence[Message]:  # noqa: D102
        if welcome is not self.served.welcome:
            self._replica.learned(self, welcome)
        self.losses.found()
        return self._replica.said_again(self, welcome)

    def heard(self, message: Message) -> None:  # noqa: D102
        if isinstance(message, Grant):
            self.calls.take(message)
        elif isinstance(message, Refused):
            self.calls.refuse(message)
        elif isinstance(message, Renewed):
            self.known.replicas = max(1, message.replicas)
            self.calls.confirmed(message.number)
        elif isinstance(message, View):
            self.served.seen(message.views, message.replicas)
        elif isinstance(message, RequestDone):
            self.requests.answered(message)
        elif isinstance(message, Moved):
            self._replica.moved(self, message)
        elif isinstance(message, Warm):
            self.prompts.warm(message)
        elif isinstance(message, StopWarm):
            self.prompts.stop(message)
        elif isinstance(message, Welcome):
            self._replica.learned(self, message)

    def disconnected(self, why: str) -> None:  # noqa: D102
        self.requests.lost(why)
        self.losses.lost()

    def looked(self) -> None:  # noqa: D102
        self.losses.looked()

    def forked(self) -> None:  # noqa: D102
        self.calls.forked()
        self.requests.forked()
        self.prompts.forked()
        self._replica.was_forked()
