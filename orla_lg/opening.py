"""What an ``Orla`` is made of: a core of its own, or a replica's side of a core elsewhere."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from orla_lg import config
from orla_lg.config_faults import check_url, faults_of_policies, one_server_twice
from orla_lg.core.accounting.journal import Journal
from orla_lg.core.boundary.checked import choice, flag, is_number, whole
from orla_lg.core.boundary.checked import path as checked_path
from orla_lg.core.boundary.secret import Secret
from orla_lg.core.engine.backend import MOST_CALLS, Backend, BackendAdapter
from orla_lg.core.engine.given import Backends, backends_of
from orla_lg.core.engine.registry import adapter_of
from orla_lg.core.limits.limits import Limits
from orla_lg.core.mapping import Mapper
from orla_lg.core.memory.events import MemoryPolicy
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.operation.policy_choice import PolicyChoice
from orla_lg.core.policies import RequestChoice, StageChoice
from orla_lg.core.prefetch.book import WarmUp, settings_of
from orla_lg.core.serving import Serving
from orla_lg.errors import ConfigError, MappingError, shown
from orla_lg.link.connection import Link
from orla_lg.link.dialing import Unwelcome
from orla_lg.link.losses import ON_CORE_LOST, OnCoreLost
from orla_lg.link.redis_directory import are_named, directory_at, named
from orla_lg.link.serving import LinkedServing, hello
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.table import Entry, faults_of, stage_mapper
from orla_lg.openai_api.client import EngineClients

MOST_FAULTS = 20
"""Of a mapping, so many are told at once."""

WELCOME_PATIENCE_S = 10.0
FAIL_PATIENCE_S = 2.0
"""The same where calls without a core are to fail: enough for another core to take over."""
"""How long a new replica waits for a core, which may just be changing places."""

MapperLike = Mapper | Mapping[str, Entry]

log = logging.getLogger("orla_lg")


class Opened(NamedTuple):
    """What serves, and the clients of its engines by backend."""

    serving: Serving
    clients: dict[str, EngineClients]


def own_core(
    backends: Backends,
    mapper: MapperLike | None,
    *,
    policy: PolicyChoice | None,
    stage_policy: StageChoice | None,
    request_policy: RequestChoice | None,
    memory: str | MemoryPolicy,
    admission: bool,
    keep_records: int,
    records_file: str | Path | None,
    limits: Limits,
    estimates_file: str | Path | None,
    warm_up: bool | WarmUp,
) -> Opened:
    """Return a core in this process; the arguments are those of ``Orla``.

    Raises:
        ConfigError: A name is unknown, two backends share one, the estimates file cannot be read.
        MappingError: The mapper names a backend that does not exist.
    """
    given = backends_of(backends)
    adapters = {backend: adapter_at(backend) for backend in given}
    if faults := faults_of_policies(stage_policy, [backend.name for backend in given]):
        raise ConfigError("; ".join(faults))
    for twice in one_server_twice(given):
        log.warning("%s", twice)
    shared = stage_mapper(mapper)
    check_backends(shared, [backend.name for backend in given])
    flag("admission", admission)
    kept, warming = memory_policy(memory), settings_of(warm_up)
    journal = _journal(keep_records, records_file)
    estimates = None if estimates_file is None else checked_path("estimates_file", estimates_file)
    clients = {
        backend.name: EngineClients(backend, keep_alive=adapter.keep_alive) for backend, adapter in adapters.items()
    }
    serving = Serving(
        adapters, mapper=shared, policy=policy, stage_policy=stage_policy, request_policy=request_policy, memory=kept,
        admission=admission, keep_records=keep_records, journal=journal, limits=limits, estimates_file=estimates,
        warm_up=warming,
    )  # fmt: skip
    return Opened(serving, clients)


def arguments_of(settings: config.Settings) -> dict[str, Any]:
    """Return the arguments of ``Orla`` in settings, beside its backends and mapper."""
    return {**{name: getattr(settings, name) for name in _ARGUMENTS}, "stage_policy": own_policies(settings)}


def own_policies(settings: config.Settings) -> StageChoice | None:
    """Return the stage policies in settings, without those of backends of other pools."""
    said, others = settings.stage_policy, {backend.name for backend in settings.elsewhere}
    if not isinstance(said, Mapping) or others.isdisjoint(said):
        return said
    return {name: policy for name, policy in said.items() if name not in others} or None


def elsewhere_in(settings: config.Settings) -> tuple[dict[str, list[Backend]], list[str]]:
    """Return the backends of other pools by pool, and all backends in the order of the configuration."""
    known = {backend.name: backend for backend in settings.elsewhere}
    pools = {
        pool: [known[name] for name in names if name in known]
        for pool, names in settings.pools.items()
        if pool != settings.pool
    }
    order = list(settings.written.get("backends", {})) or [backend.name for backend in settings.backends]
    return pools, order


_ARGUMENTS = (
    "policy", "stage_policy", "request_policy", "memory", "admission", "keep_records", "records_file", "limits",
    "estimates_file", "control", "warm_up", "untranslatable", "tags",
)  # fmt: skip


def mapper_of(settings: config.Settings, mapping: MapperLike) -> Mapper:
    """Return the mapper that a configuration means by a table, or by an object of its own."""
    made = stage_mapper(mapping)
    assert made is not None, "no table is no mapping"
    return LoadAware(made) if settings.load_aware else made


def replica(
    url: str | None,
    key: str | None,
    *,
    on_core_lost: OnCoreLost,
    core_patience_s: float,
    keep_records: int,
    records_file: str | Path | None,
) -> Opened:
    """Return a replica of the core at *url*, else of the one that the environment names (``Orla.remote``).

    Raises:
        ConfigError: An argument is wrong, what answers is no orla_lg server, or it does not take this replica.
        BackendUnavailable: No server answers.
    """
    choice("on_core_lost", on_core_lost, ON_CORE_LOST)
    if not is_number(core_patience_s) or core_patience_s <= 0:
        raise ConfigError(f"core_patience_s must be a number of seconds above 0, got {shown(core_patience_s)}")
    found = config.server()
    if url is None and found is not None:
        url = found.url
    if url is None:
        raise ConfigError(
            f"no server is named: give Orla.remote('http://HOST:PORT', key=...), or set {config.SERVER} (and "
            f"{config.SERVER_KEY}, if the server has keys)"
        )
    journal, version = _journal(keep_records, records_file), _version()
    wanted, stores = named(url)
    if key is None and (found is None or are_named(url, found.url)):
        key = config.server_key()
    secret = None if key is None else Secret(key, "key: the server's key").reveal()
    link = Link(wanted, secret, [directory_at(store) for store in stores])
    patience_s = min(FAIL_PATIENCE_S if on_core_lost == "fail" else WELCOME_PATIENCE_S, core_patience_s)
    with contextlib.ExitStack() as undo:
        undo.callback(link.stop)
        try:
            welcome = link.open(hello(link, version), patience_s)
        except Unwelcome as error:  # a class of the link's own
            raise ConfigError(str(error)) from error.__cause__
        serving = LinkedServing(
            link, welcome, adapter_of=adapter_at, key_in=config.key_in, version=version, keep_records=keep_records,
            journal=journal, on_core_lost=on_core_lost, core_patience_s=float(core_patience_s),
            link_to=lambda pool: Link((), secret, pool=pool),
        )  # fmt: skip
        serving.resources.masking.learn(secret)
        link.start(serving.cores.home, welcome)
        undo.pop_all()
    return Opened(serving, serving.clients)


def adapter_at(backend: Backend) -> BackendAdapter:
    """Return the adapter of a backend whose URL an HTTP client takes, which knows more rules than ``Backend``."""
    check_url(backend)
    return adapter_of(backend)


def check_backends(mapper: Mapper | None, names: Sequence[str]) -> None:
    """Check that the backends exist which a mapper names.

    Raises:
        MappingError: One does not.
    """
    if faults := faults_of(mapper, names):
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        raise MappingError("; ".join(faults[:MOST_FAULTS]) + more)


def _journal(keep_records: int, records_file: str | Path | None) -> Journal | None:
    whole("keep_records", keep_records, most=MOST_CALLS)
    return None if records_file is None else Journal(checked_path("records_file", records_file))


def _version() -> str:
    try:
        return metadata.version("orla_lg")
    except metadata.PackageNotFoundError:  # run from its sources
        return ""
