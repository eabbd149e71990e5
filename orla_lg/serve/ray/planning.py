"""Which actors there are to be on a cluster, and where: read from ``[ray]``, before anything is started."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from orla_lg import config
from orla_lg.config_tables import RayPoolTable, RayTable
from orla_lg.core.boundary.checked import dotted
from orla_lg.errors import ConfigError, did_you_mean, shown
from orla_lg.link.redis_keys import is_shared
from orla_lg.serve.access.keys import PREFIX as KEYS
from orla_lg.serve.ray.shipping import ShippedSettings
from orla_lg.serve.settings import ListenAddress, ServeSettings, settings
from orla_lg.serve.store.opening import opened_store

PREFIX = "orla-"
"""Of the names of all our actors in their namespace."""

ANYWHERE = "0.0.0.0"

NODE_ID = "ray.io/node-id"
"""A label that each node has by itself."""

ANY = {NODE_ID: "!none"}
"""A selector that each node fits."""


class RayNode(NamedTuple):
    """A node of a cluster that is alive."""

    node_id: str
    address: str
    labels: Mapping[str, str]
    resources: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PlannedActor:
    """An actor that hosts one server: a core, or a standby of it."""

    name: str
    pool: str
    number: int
    """In its pool; 0 is begun first, and decides first."""
    shipped: ShippedSettings
    labels: Mapping[str, str]
    resources: Mapping[str, float]
    num_cpus: float


class Asked(NamedTuple):
    """What the command line says."""

    file: str | None = None
    """The configuration; ``None``: there is none."""
    listen_address: str | None = None
    port: int | None = None
    store: str | None = None
    pool: str | None = None
    """The only one that is meant; ``None``: all that the configuration has."""

    def core(self) -> config.Settings:
        """Return the configuration, as it is for no pool in particular."""
        return config.Settings((), {}) if self.file is None else config.load(self.file)

    def of(self, pool: str) -> ServeSettings:
        """Return the settings of one pool's servers; empty: of the only one, which has no name."""
        return settings(
            self.file, self.listen_address, self.port, self.store, pool or None, reads_file=self.file is not None
        )


def planned(asked: Asked, nodes: Sequence[RayNode]) -> list[PlannedActor]:
    """Return the actors that a configuration asks for, pool by pool, each pool's first core first.

    Raises:
        ConfigError: They cannot run on such a cluster.
    """
    core = asked.core()
    table = core.ray or RayTable.model_validate({})
    pools = [asked.pool] if asked.pool is not None else list(core.pools) or [core.serve.pool if core.serve else ""]
    if unknown := [name for name in table.pools if name not in (*core.pools, *pools)]:
        where = f"{core.source}: {dotted('ray', 'pools', unknown[0])}"
        raise ConfigError(f"{where}: there is no pool {shown(unknown[0])}{did_you_mean(unknown[0], pools)}")
    taken, actors = Counter[int](), list[PlannedActor]()
    for pool in pools:
        own, said = asked.of(pool), table.pools.get(pool) or RayPoolTable.model_validate({})
        _check(own, asked, nodes)
        host = own.listen.host if _is_said(own, asked) or machines(nodes) <= 1 else None
        _check_reach(own, host)
        labels = table.labels if said.labels is None else said.labels
        resources = table.resources if said.resources is None else said.resources
        _check_place(own, pool, labels, resources, nodes)
        for number in range(1 + (table.standbys if said.standbys is None else said.standbys)):
            port = own.listen.port and own.listen.port + taken[own.listen.port]
            taken[own.listen.port] += 1
            shipped = ShippedSettings(own.source, _text(own.source), host, port, asked.store, pool or None)
            name = "-".join(filter(None, (f"{PREFIX}core", pool, str(number))))
            actors.append(PlannedActor(name, pool, number, shipped, labels, resources, table.num_cpus))
    return actors


def machines(nodes: Sequence[RayNode]) -> int:
    """Return how many machines nodes are on: those with one address are on one."""
    return len({node.address for node in nodes})


def _text(source: str) -> str:
    return Path(source).read_text(encoding="utf-8") if source else ""


def _is_said(own: ServeSettings, asked: Asked) -> bool:
    """Whether something says at which host servers listen."""
    return (asked.listen_address or own.table.listen_address) is not None


def _check(own: ServeSettings, asked: Asked, nodes: Sequence[RayNode]) -> None:
    """Refuse addresses and stores that not all nodes reach.

    Raises:
        ConfigError: Naming the key, and what would be right.
    """
    if own.listen.path is not None:
        raise ConfigError(
            f"{own.where('listen_address')}: {own.listen} is of one machine and of one server; on Ray it is HOST:PORT"
        )
    if own.listen.is_any and not own.listen.port:
        raise ConfigError(f"{own.where('listen_address')}: {own.listen}: at every address it needs a port of its own")
    if own.listen.is_local and machines(nodes) > 1 and _is_said(own, asked):
        raise ConfigError(
            f"{own.where('listen_address')}: {own.listen} is reached from its own machine only, and the cluster has "
            f"{machines(nodes)}; left out, each server listens at its node's address"
        )
    if machines(nodes) > 1 and not is_shared(own.table.store):
        what = "that of this user's state folder is" if own.table.store is None else f"{own.table.store} is"
        raise ConfigError(
            f"{own.where('store')}: the cluster has nodes on {machines(nodes)} machines, and each must reach the store; "
            f'{what} a file of one machine. One that all reach is store = "redis://HOST:PORT/DB"'
        )


def _check_reach(own: ServeSettings, host: str | None) -> None:
    """Refuse, before anything is started, what each server would refuse on its node (``ServeSettings.check``)."""
    store = opened_store(own)
    try:
        has_keys = bool(store.scan(KEYS))
    finally:
        getattr(store, "close", int)()
    reached = own if host is not None else replace(own, listen=ListenAddress(ANYWHERE, own.listen.port))
    reached.check(has_keys=has_keys)


def _check_place(
    own: ServeSettings,
    pool: str,
    labels: Mapping[str, str],
    resources: Mapping[str, float],
    nodes: Sequence[RayNode],
) -> None:
    """Refuse a pool that no node could have: its actors would wait for ever.

    Raises:
        ConfigError: Naming the pool, and what nodes have.
    """
    where = f"{own.source or 'ray'}: the pool {pool!r}" if pool else f"{own.source or 'ray'}"
    if not any(matches(node.labels, labels) for node in nodes):
        has = "; ".join(sorted({_listed(node.labels) or "no labels" for node in nodes}))
        flags = ",".join(f"{key}={value}" for key, value in labels.items())
        raise ConfigError(
            f"{where}: no node of the cluster has the labels {_listed(labels)}; nodes have {has}. "
            f"`ray start --labels={flags}` gives a node some"
        )
    if not any(all(node.resources.get(each, 0.0) >= much for each, much in resources.items()) for node in nodes):
        raise ConfigError(f"{where}: no node of the cluster has the resources {_listed(resources)}")


def _listed(said: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in said.items() if not key.startswith("ray.io/"))


_SEVERAL = re.compile(r"in\((.*)\)")


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels are such as a selector asks for, by Ray's rules."""
    return all(_is_one(labels.get(key), said) for key, said in selector.items())


def _is_one(value: str | None, said: str) -> bool:
    plain = said.removeprefix("!")
    several = _SEVERAL.fullmatch(plain)
    allowed = {plain} if several is None else {each.strip() for each in several[1].split(",")}
    return (value in allowed) is not said.startswith("!")


def elsewhere(labels: Mapping[str, str], node_ids: Iterable[str]) -> tuple[dict[str, str], list[dict[str, object]]]:
    """Return a selector that keeps an actor off nodes, and what holds instead where there are no others."""
    plain = dict(labels)
    avoided = ", ".join(sorted(filter(None, node_ids)))
    if not avoided:
        return plain, []
    return {**plain, NODE_ID: f"!in({avoided})"}, [{"label_selector": plain}] if plain else [{"label_selector": ANY}]
