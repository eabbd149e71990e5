"""What the core is and serves, as the replica's own parts follow it: backends, their engines, mappings, limits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.engine.registry import check_engine
from orla_lg.core.limits.limits import Limits
from orla_lg.core.mapping import Mappings
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import BackendUnavailable, ConfigError
from orla_lg.link.adapter import LinkedAdapter
from orla_lg.link.connection import Link
from orla_lg.link.messages import Welcome
from orla_lg.link.prompts import KeptPrompts
from orla_lg.link.requests import LinkedLimits
from orla_lg.link.views import Known, ServedBackend, read_backend, read_mapping, read_view
from orla_lg.openai_api.client import EngineClients

log = logging.getLogger("orla_lg")

Adapters = Callable[[Backend], BackendAdapter]
Keys = Callable[[str], str | None]


def usable(welcome: Welcome, key_in: Keys) -> tuple[list[ServedBackend], list[ConfigError]]:
    """Return the core's backends that can be used from here, and what is wrong with the others."""
    served, faults = list[ServedBackend](), list[ConfigError]()
    for flat in welcome.backends:
        try:
            each = read_backend(flat, key_in)
            check_engine(each.backend)
            served.append(each)
        except ConfigError as error:
            faults.append(error)
    return served, faults


class ServedBackends:
    """Follows what the core is and serves.

    Args:
        link: To the core.
        schedulers: By backend; they come and go with the core's.
        clients: By backend.
        known: What the core said last.
        made: Makes a backend's scheduler.
        adapter_of: Makes a backend's adapter.
        key_in: Returns the key in an environment variable.
        learns: Takes keys out of what is recorded.
    """

    def __init__(
        self,
        link: Link,
        schedulers: dict[str, BackendScheduler],
        clients: dict[str, EngineClients],
        known: Known,
        *,
        made: Callable[[Backend, BackendAdapter], BackendScheduler],
        adapter_of: Adapters,
        key_in: Keys,
        learns: Callable[[object], None],
    ) -> None:
        self._link, self._schedulers, self._clients, self._known = link, schedulers, clients, known
        self._made, self._adapter_of, self._key_in, self._learns = made, adapter_of, key_in, learns
        self.welcome: Welcome | None = None
        """The newest."""
        self.unable = False
        """Whether calls cannot be sent to some of the core's backends from here."""

    def learned(self, welcome: Welcome, mappings: Mappings, limits: LinkedLimits, prompts: KeptPrompts) -> None:
        """Follow a welcome.

        Raises:
            LinkBroken: Something in it is not what it should be.
        """
        served, faults = usable(welcome, self._key_in)
        told = read_mapping(welcome.mapping)
        for fault in faults:
            log.warning("calls cannot be sent to a backend of the core from here: %s", fault)
        self.unable = bool(faults)
        for each in served:
            self._serves(each.backend)
            adapter = self._schedulers[each.backend.name].adapter
            assert isinstance(adapter, LinkedAdapter)
            prompts.serves(each.backend.name, adapter.inner, warms=each.warms, isolated=each.backend.isolate_tenants)
        names = {each.backend.name for each in served}
        for gone in [name for name in self._schedulers if name not in names]:
            del self._schedulers[gone]  # its clients stay, for calls that are under way
        mappings.shared, mappings.variants = told.shared, told.variants
        limits.learned(Limits.of(welcome.limits))
        known, tenants = self._known, welcome.tenants
        known.epoch, known.version, known.tenants = welcome.epoch, welcome.version, tenants
        known.replica_lease_s = welcome.replica_lease_s
        prompts.tenant = tenants[0] if tenants is not None and len(tenants) == 1 else ""
        self.seen(welcome.views, welcome.replicas)
        self.welcome = welcome

    def _serves(self, backend: Backend) -> None:
        """Note a backend, which may be new or another one than before."""
        before = self._schedulers.get(backend.name)
        self._learns(backend.api_key)
        if before is not None and before.backend == backend and before.backend.api_key == backend.api_key:
            return
        adapter = LinkedAdapter(self._adapter_of(backend), self._link)
        self._schedulers[backend.name] = self._made(backend, adapter)
        self._clients[backend.name] = EngineClients(backend, keep_alive=adapter.keep_alive)

    def seen(self, views: Sequence[Mapping[str, Any]], replicas: int) -> None:
        """Take in how the core sees its backends.

        Raises:
            LinkBroken: A view is none.
        """
        self._known.replicas = max(1, replicas)
        for flat in views:
            scheduler = self._schedulers.get(str(flat.get("name")))
            if scheduler is None:
                continue
            seen = self._known.seen[scheduler.backend.name] = read_view(flat, scheduler.backend)
            adapter, probe = scheduler.adapter, seen.view.probe
            assert isinstance(adapter, LinkedAdapter)
            adapter.probe_seen, adapter.fault = probe, seen.fault
            scheduler.health.follow(probe, None if seen.fault is None else BackendUnavailable(seen.fault))
