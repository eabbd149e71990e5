"""One core and its doors in one process: built from its parts, run on one loop, drained and ended.

The port is open before anything else is begun, and requests are answered as soon as the loop runs; whether calls are
taken is what ``/readyz`` says. Of several cores on one store the one that has the lease takes them, the others wait.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette

from orla_lg import __version__
from orla_lg.control.protocol import CoreRole
from orla_lg.core.boundary.plain import counted
from orla_lg.core.limits.limits import LimitScope
from orla_lg.errors import OrlaError
from orla_lg.link.places import CorePlace
from orla_lg.link.thread_leases import LeasesInStore
from orla_lg.link.whereabouts import here
from orla_lg.orla import Orla
from orla_lg.serve.access.access import Access, Caller, Denied
from orla_lg.serve.access.budgets import HeldSlot
from orla_lg.serve.access.keys import Keyring, KeyScope
from orla_lg.serve.access.sessions import SignIns
from orla_lg.serve.api.denials import denial
from orla_lg.serve.api.dispatch import api_routes
from orla_lg.serve.ending import ServerEnd
from orla_lg.serve.gateway.calls import Gateway
from orla_lg.serve.gateway.no_route import ON_ERROR
from orla_lg.serve.gateway.routes import Shortcut, routes_of
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.serve.http import health
from orla_lg.serve.http.doors import Headers
from orla_lg.serve.http.guard import LOOPBACK_NAMES, AccessLayer, HttpGuard
from orla_lg.serve.http.health import CoreState, ReadinessGate
from orla_lg.serve.http.listening import Listening
from orla_lg.serve.http.metrics import MutationCount, ServerMetrics, metrics_routes
from orla_lg.serve.http.traces import CallTraces
from orla_lg.serve.link.flat import LinkCaller
from orla_lg.serve.link.host import LinkHost
from orla_lg.serve.page.feed import EventFeed
from orla_lg.serve.page.routes import LivePage
from orla_lg.serve.past_calls.captures import CaptureBook
from orla_lg.serve.past_calls.completions import CompletionBook
from orla_lg.serve.pools.directory import Directory
from orla_lg.serve.pools.secret import OTHER_CORE, CoreSecret
from orla_lg.serve.pools.succession import Succession
from orla_lg.serve.pools.viewing import OtherPools
from orla_lg.serve.posted.allowed import Allowed
from orla_lg.serve.posted.applying import PostedThings
from orla_lg.serve.posted.effects import StageEffects
from orla_lg.serve.posted.fetching import OutsideClient
from orla_lg.serve.posted.guarding import guard_by
from orla_lg.serve.posted.ordering import OutsideOrder
from orla_lg.serve.posted.outside import HookTies
from orla_lg.serve.posted.prices import PriceReader
from orla_lg.serve.posted.rates import BackendRates
from orla_lg.serve.recognition import refuse_our_own
from orla_lg.serve.reloading import Reloader
from orla_lg.serve.running import SIGHUP, http_server, new_loop, signals
from orla_lg.serve.settings import ServeSettings, addresses_of
from orla_lg.serve.steering import control_routes
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.store import Store, StoreUnavailable

log = logging.getLogger("orla_lg")


class OrlaServer:
    """A core, and what it is reached by.

    Args:
        settings: What it is started with.
        orla: The core.
        store: What outlives the process.
    """

    def __init__(self, settings: ServeSettings, orla: Orla, store: Store) -> None:
        self.settings, self.orla, self.store = settings, orla, store
        table, serving = settings.table, orla.core.serving
        own = ScopedStore(store, table.pool)
        self._port = 0
        """That was found free."""
        self._tasks: asyncio.TaskGroup

        # Which core decides, here and in other pools.
        self._core_secret = CoreSecret(store)
        self.others = (
            None
            if (elsewhere := serving.schedulers.elsewhere) is None
            else OtherPools(table.pool, elsewhere, self._core_secret, __version__)
        )
        """What is seen of the other pools; ``None``: there are none."""
        self.lease = CoreLease(own, table.core_lease_s, goes_on=table.on_store_lost == "go_on")

        # Who may call, and the configuration that is loaded again.
        self._keyring = Keyring(store)
        self.access = Access(self._keyring)
        self._sign_ins = SignIns()
        allowed = Allowed.of(table)
        self.reloader = Reloader(orla, settings.core, refuse_our_own, allowed)
        self._reloading = asyncio.Lock()
        self._key_envs = dict[str, str]()
        self._note_key_envs()

        # Calls of linked processes, and of clients of the gateway.
        self.host = LinkHost(
            serving, own, self.lease, replica_lease_s=table.replica_lease_s, key_envs=self._key_envs,
            layers=self._layers, taken=self._taken, pending=self.access.pending, version=__version__, pool=table.pool,
            on_deposed=self._deposed, is_valid=self._still_may_link, keys=self.access,
        )  # fmt: skip
        self.host.requests.threads = LeasesInStore(store)
        if table.pool:
            self.access.slots = self.host.share_limits(store, table.pool)
        self.gateway = Gateway(serving, self.access, gateway_settings(settings), KeyScope.USE)
        self.completions = self.gateway.completions = CompletionBook()
        serving.records.followers.append(self.completions.note)
        self.captures = self.gateway.captures = (
            CaptureBook(table.kept_prompt_bytes, table.kept_prompt_age_s) if table.keep_prompts else None
        )
        self.gateway.effects = StageEffects(self.reloader)

        # What is posted by API, and asked of other servers for it.
        self.outside = OutsideClient()
        tags_of = self.completions.tags_of
        self.reloader.ties = HookTies(tags_of, lambda outcome: self.metrics.counts.hook("mapper", outcome))
        ordering = HookTies(tags_of, lambda outcome: self.metrics.counts.hook("scheduler", outcome))
        self.order = OutsideOrder(serving, self.outside, ordering)
        self.prices = PriceReader(serving, self.outside, allowed)
        self.rates = BackendRates(serving)
        self.host.paced = self.rates.may_grant
        self.posted = PostedThings(
            store, self.reloader, allowed, self._reloading, self._backends_changed, own if table.pool else None
        )
        self.posted.followers += [
            partial(guard_by, serving.guard), self.order.follow, self.prices.follow, self.rates.follow
        ]  # fmt: skip

        # What is seen of it, its end, and what follows on it.
        self.metrics = ServerMetrics(self)
        self.page = LivePage(
            EventFeed(serving, self.access, self._sign_ins, lambda: self.state), self.access, self._sign_ins,
            is_secure=settings.has_tls or table.behind_proxy, cut=lambda scope: self.ending.cut_request(scope),
        )  # fmt: skip
        self.ending = ServerEnd(self.page.feed, self.host.bye, self._hand_over)
        self.succession = Succession(
            self.host, Directory(store), self.place, self.posted.refresh, is_meant=table.standby
        )
        if self.others is not None:
            self.succession.followers.append(self.others.follow)

        # What a request passes, from the inside to the outside.
        self._traces = CallTraces.opened(orla)
        self.layer = AccessLayer(self._answers(), self.access, guard(settings), denial, self._sign_ins)
        self.app = ReadinessGate(self.layer, self, denial)

    def _answers(self) -> Any:
        """Return what answers a request that may be made."""
        routes = [
            *health.routes(self), *metrics_routes(self.metrics), *control_routes(self), *self.page.routes(),
            *api_routes(self), *routes_of(self.gateway),
        ]  # fmt: skip
        routed = MutationCount(Starlette(routes=routes, exception_handlers=ON_ERROR), self.metrics.counts)
        return self._traces.around(Shortcut(routed, self.gateway))

    @property
    def state(self) -> CoreState:
        """What it is at."""
        if self.ending.has_begun:
            return CoreState.DRAINING
        return CoreState.READY if self.host.decides else CoreState.STANDBY

    @property
    def under_way(self) -> int:
        """How many HTTP requests have no whole answer yet."""
        return self.ending.under_way

    @property
    def role(self) -> CoreRole:
        """Which of its pool's servers it is."""
        return CoreRole(pool=self.host.pool, epoch=self.lease.epoch, cores=list(self.succession.own))

    # Links

    def open_link(
        self, headers: Headers, client: Sequence[Any] | None, server: Sequence[Any] | None
    ) -> asyncio.Protocol:
        """Return what a link's connection is given to (``doors.Links``)."""
        is_core = self._is_core(headers)
        caller = OTHER_CORE if is_core else self.layer.admit_link(headers, client, server)
        if self.state is not CoreState.READY:
            raise health.LinkElsewhere(self.state, self.succession.own)
        return self.host.session(caller, looks_on=is_core)

    def _is_core(self, headers: Headers) -> bool:
        """Whether it is another pool's core, which knows the secret of the store that both have."""
        try:
            return self._core_secret.is_sent(headers)
        except StoreUnavailable as error:
            raise Denied(503, f"the server's store does not answer: {error}", "server_error") from error

    def _layers(self, caller: LinkCaller) -> Sequence[LimitScope]:
        assert isinstance(caller, Caller)
        return self.access.layers(caller)

    def _taken(self, caller: LinkCaller, refuses: bool) -> HeldSlot:
        assert isinstance(caller, Caller)
        return self.access.enter(caller, refuses)

    def _still_may_link(self, caller: LinkCaller) -> bool:
        assert isinstance(caller, Caller)
        return caller is OTHER_CORE or self.access.still(caller, KeyScope.LINK)

    # Its life

    async def run(self, opened: Listening, ready: Callable[[str], None]) -> int:
        """Serve until a signal ends it; returns the exit status.

        Args:
            opened: Where it listens.
            ready: Called with the URL when requests are answered.
        """
        table, loop, self._port = self.settings.table, asyncio.get_running_loop(), opened.port or 0
        http = http_server(self.app, self, table)
        with signals(loop, {signal.SIGTERM: self.end, signal.SIGINT: self.end, SIGHUP: self.reload_soon}):
            async with asyncio.TaskGroup() as tasks, self.posted.followed(tasks):
                self._tasks = tasks
                self.ending.of(http, tasks)
                lasting = [self.reloader.see_off(), self.succession.run(), self.order.run(), self.prices.run()]
                helping = [tasks.create_task(each) for each in lasting]
                serving = tasks.create_task(http.serve(sockets=[opened.socket]))
                while not http.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event for it
                    await asyncio.sleep(0.005)
                ready(self.settings.listen.url(opened.port, tls=self.settings.has_tls))
                if self.captures is not None:
                    helping.append(tasks.create_task(self.captures.swept()))
                helping.append(tasks.create_task(self.ending.run(table.drain_s)))
                await serving
                for task in helping:
                    task.cancel()
        if self.others is not None:
            self.others.close()
        self.page.feed.close()
        await self._hand_over()
        self.order.stop()
        await self.outside.close()
        self._keyring.close()
        self.metrics.close()
        await asyncio.to_thread(self._traces.close)  # what is left of them is sent
        opened.close()
        cut = f", {counted(self.ending.cut, 'call')} cut off" if self.ending.cut else ""
        log.warning("ended: %s served%s", counted(self.orla.statistics().calls, "call"), cut)
        return self.ending.status(is_standby=table.standby)

    def place(self, epoch: int) -> CorePlace:
        """Return where this process is reached, as the directory has it; an *epoch* of 0 is a standby's."""
        table = self.settings.table
        urls = table.advertise
        if not urls and not table.behind_proxy:  # the proxy's URL is not known here, and its way is not to be left
            urls = (self.settings.listen.url(self._port, tls=self.settings.has_tls),)
        return CorePlace(
            table.pool, tuple(urls), epoch, tuple(self.orla.core.serving.schedulers), here(), os.getpid(),
            holder=self.lease.holder,
        )  # fmt: skip

    def end(self) -> None:
        """Drain and end; asked a second time, end at once."""
        self.ending.ask()

    async def _hand_over(self) -> None:
        """Write what is left to be written, and let the next core take over. Idempotent."""
        await self.gateway.aclose()  # its sessions end, and what they carry is kept
        await self.host.close("the server ends")

    def _deposed(self) -> None:
        then = "it begins again as a standby" if self.settings.table.standby else "start it again, as a standby"
        log.error("this process stood still or lost its store for too long; %s", then)
        for scheduler in self.orla.core.serving.schedulers.values():
            scheduler.turn_away()
        self.ending.replaced()

    # The configuration, loaded again

    def reload_soon(self) -> None:
        """Load the configuration again, and log what came of it."""
        self._tasks.create_task(self._reload_and_log())

    async def _reload_and_log(self) -> None:
        try:
            found = await self.reload(dry_run=False)
        except OrlaError as error:
            log.error("the configuration was not loaded again: %s", error)
        else:
            log.warning("%s was loaded again:\n%s", self.reloader.settings.source, found)

    async def reload(self, *, dry_run: bool) -> str:
        """Load the configuration again, and return what changed; with *dry_run* what would.

        Raises:
            OrlaError: It is wrong, or cannot be loaded while calls run; nothing was changed.
        """
        async with self._reloading:
            found = await asyncio.to_thread(self.reloader.look)  # it asks new backends what they are
            if dry_run:
                self.reloader.try_out(found)
            else:
                self.reloader.apply(found)
                self.posted.reapplied()
                if found.added or found.removed or found.replaced or "pools" in found.keys:
                    self._backends_changed()
        return found.text()

    def _backends_changed(self) -> None:
        self._note_key_envs()
        self.host.refresh()
        self.succession.announce()

    def _note_key_envs(self) -> None:
        """Note in which variable replicas find each backend's key, which never goes to them."""
        tables = self.reloader.settings.written.get("backends", {})
        self._key_envs.clear()
        self._key_envs.update({name: each["api_key_env"] for name, each in tables.items() if each["api_key_env"]})


def guard(settings: ServeSettings) -> HttpGuard:
    """Return what requests must be like."""
    table = settings.table
    named = {name.lower() for name in (*table.names, *(each.host for each in addresses_of(table)))}
    own = set() if settings.listen.is_any else {settings.listen.host.lower()}
    return HttpGuard(LOOPBACK_NAMES | named | own, table.behind_proxy, table.max_body_bytes, table.body_timeout_s)


def gateway_settings(settings: ServeSettings) -> GatewaySettings:
    """Return what ``[serve.gateway]`` says, with the gateway's own lists where it says nothing."""
    said = settings.table.gateway.model_dump()
    return GatewaySettings(**{name: value for name, value in said.items() if value is not None})


def run(settings: ServeSettings, orla: Orla, store: Store, opened: Listening, ready: Callable[[str], None]) -> int:
    """Serve on one loop until a signal ends it; returns the exit status."""

    async def serving() -> int:
        return await OrlaServer(settings, orla, store).run(opened, ready)

    with asyncio.Runner(loop_factory=new_loop()) as runner:
        return runner.run(serving())
