"""What the core is and serves, as the replica's own parts follow it: backends, their engines, mappings, limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, Protocol

from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.engine.registry import ENTRY_POINTS, check_engine
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import BackendUnavailable, ConfigError
from orla_lg.link.adapter import LinkedAdapter
from orla_lg.link.connection import Link
from orla_lg.link.messages import Welcome
from orla_lg.link.prompts import KeptPrompts
from orla_lg.link.views import Known, ServedBackend, read_backend, read_view
from orla_lg.openai_api.client import EngineClients

log = logging.getLogger("orla_lg")

Adapters = Callable[[Backend], BackendAdapter]
Keys = Callable[[str], str | None]


@cache
def _is_registered(engine: str) -> bool:
    """Whether a package registered an adapter of that name: all packages' files are read for it, so once."""
    return any(entry.name == engine for entry in entry_points(group=ENTRY_POINTS))


def _read(flat: Mapping[str, Any], key_in: Keys) -> ServedBackend:
    """Return a backend that can be used from here.

    Raises:
        ConfigError: It cannot be.
        LinkBroken: It is none.
    """
    each = read_backend(flat, key_in)
    if not _is_registered(each.backend.engine):
        check_engine(each.backend)
    return each


def usable(welcome: Welcome, key_in: Keys) -> tuple[list[ServedBackend], list[ConfigError]]:
    """Return the core's backends that can be used from here, and what is wrong with the others."""
    served, faults = list[ServedBackend](), list[ConfigError]()
    for flat in welcome.backends:
        try:
            served.append(_read(flat, key_in))
        except ConfigError as error:
            faults.append(error)
    return served, faults


class Owners(Protocol):
    """Which core decides about which backend (``cores.Cores``)."""

    @property
    def owners(self) -> Mapping[str, object]:
        """The cores, by backend."""
        ...

    def owns(self, backend: str, pool: str) -> None:
        """Note which pool a backend is in."""
        ...

    def disowns(self, backend: str) -> None:
        """Note that there is no such backend any more."""
        ...


class ServingCore(Protocol):
    """What of one core follows what it serves (``side.CoreSide``)."""

    pool: str
    link: Link
    known: Known
    prompts: KeptPrompts


class ServedBackends:
    """Follows what one core is and serves.

    Args:
        core: The core.
        cores: All of them.
        schedulers: Of all, by backend; they come and go with their cores'.
        clients: By backend.
        made: Makes a backend's scheduler.
        adapter_of: Makes a backend's adapter.
        key_in: Returns the key in an environment variable.
        learns: Takes keys out of what is recorded.
    """

    def __init__(
        self,
        core: ServingCore,
        cores: Owners,
        schedulers: dict[str, BackendScheduler],
        clients: dict[str, EngineClients],
        *,
        made: Callable[[Backend, BackendAdapter], BackendScheduler],
        adapter_of: Adapters,
        key_in: Keys,
        learns: Callable[[object], None],
    ) -> None:
        self._core, self._cores, self._schedulers, self._clients = core, cores, schedulers, clients
        self._made, self._adapter_of, self._key_in, self._learns = made, adapter_of, key_in, learns
        self.welcome: Welcome | None = None
        """The newest."""
        self.unable = False
        """Whether calls cannot be sent to some of the core's backends from here."""

    def mine(self) -> dict[str, BackendScheduler]:
        """Return the schedulers of the core's backends."""
        owners = self._cores.owners
        return {name: each for name, each in list(self._schedulers.items()) if owners.get(name) is self._core}

    def learned(self, welcome: Welcome) -> None:
        """Follow a welcome of the core.

        Raises:
            LinkBroken: Something in it is not what it should be.
        """
        served, faults = usable(welcome, self._key_in)
        for fault in faults:
            log.warning("calls cannot be sent to a backend of the core from here: %s", fault)
        self.unable = bool(faults)
        prompts = self._core.prompts
        for each in served:
            self._serves(each.backend)
            adapter = self._schedulers[each.backend.name].adapter
            assert isinstance(adapter, LinkedAdapter)
            prompts.serves(each.backend.name, adapter.inner, warms=each.warms, isolated=each.backend.isolate_tenants)
        self._keep_only({each.backend.name for each in served})
        known, tenants = self._core.known, welcome.tenants
        known.epoch, known.version, known.tenants = welcome.epoch, welcome.version, tenants
        known.replica_lease_s = welcome.replica_lease_s
        prompts.tenant = tenants[0] if tenants is not None and len(tenants) == 1 else ""
        self.seen(welcome.views, welcome.replicas)
        self.welcome = welcome

    def expected(self, backends: Sequence[ServedBackend]) -> None:
        """Note backends as another core has them configured, until their own core says what it serves."""
        if self.welcome is None:
            for each in backends:
                self._serves(each.backend)
            self._keep_only({each.backend.name for each in backends})

    def _keep_only(self, names: set[str]) -> None:
        for gone in [name for name in self.mine() if name not in names]:
            del self._schedulers[gone]  # its clients stay, for calls that are under way
            self._cores.disowns(gone)

    def leave(self) -> None:
        """Serve nothing any more: the pool is none."""
        self._keep_only(set())

    def _serves(self, backend: Backend) -> None:
        """Note a backend, which may be new, another one than before, or another core's before."""
        before = self._schedulers.get(backend.name)
        is_same = before is not None and before.backend == backend and before.backend.api_key == backend.api_key
        self._learns(backend.api_key)
        if is_same and self._cores.owners.get(backend.name) is self._core:
            return
        adapter = LinkedAdapter(self._adapter_of(backend), self._core.link)
        self._schedulers[backend.name] = self._made(backend, adapter)
        self._cores.owns(backend.name, self._core.pool)
        if not is_same:
            self._clients[backend.name] = EngineClients(backend, keep_alive=adapter.keep_alive)

    def seen(self, views: Sequence[Mapping[str, Any]], replicas: int) -> None:
        """Take in how the core sees its backends.

        Raises:
            LinkBroken: A view is none.
        """
        known, owners = self._core.known, self._cores.owners
        known.replicas = max(1, replicas)
        for flat in views:
            scheduler = self._schedulers.get(str(flat.get("name")))
            if scheduler is None or owners.get(scheduler.backend.name) is not self._core:
                continue
            seen = known.seen[scheduler.backend.name] = read_view(flat, scheduler.backend)
            adapter, probe = scheduler.adapter, seen.view.probe
            assert isinstance(adapter, LinkedAdapter)
            adapter.probe_seen, adapter.fault = probe, seen.fault
            scheduler.health.follow(probe, None if seen.fault is None else BackendUnavailable(seen.fault))


def of_other_pools(welcome: Welcome, key_in: Keys) -> dict[str, list[ServedBackend]]:
    """Return the backends of other pools by pool, as a core has them configured; those that can be used from here."""
    found: dict[str, list[ServedBackend]] = {}
    for flat in welcome.pools:
        pool = str(flat.get("pool", ""))
        if pool == welcome.pool:
            continue
        of_pool = found.setdefault(pool, [])
        try:
            of_pool.append(_read(flat, key_in))
        except ConfigError as error:
            log.warning("calls cannot be sent to a backend of pool %r from here: %s", pool, error)
    return found
