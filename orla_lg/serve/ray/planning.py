"""Which actors there are to be on a cluster, and where: read from ``[ray]``, before anything is started."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from orla_lg import config
from orla_lg.config_tables import RayPoolTable, RayTable
from orla_lg.core.boundary.checked import dotted
from orla_lg.errors import ConfigError, did_you_mean, shown
from orla_lg.link.redis_keys import is_shared
from orla_lg.serve.access.keys import PREFIX as KEYS
from orla_lg.serve.parts import opened_store
from orla_lg.serve.ray.shipping import ShippedSettings
from orla_lg.serve.settings import ListenAddress, ServeSettings, settings

PREFIX = "orla-"
"""Of the names of all our actors in their namespace."""

ANYWHERE = "0.0.0.0"

MOST_PORT = 65_535

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
    labels: Sequence[Mapping[str, str]]
    """Labels that a node must have; where none has them, the next ones."""
    resources: Mapping[str, float]
    num_cpus: float


class ServersAsked(NamedTuple):
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


def planned(asked: ServersAsked, nodes: Sequence[RayNode]) -> list[PlannedActor]:
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
        fit = _fit(own, pool, labels, resources, nodes)
        many = 1 + (table.standbys if said.standbys is None else said.standbys)
        for number, selectors in enumerate(spread(labels, fit, many)):
            port = _next_port(own, taken)
            shipped = ShippedSettings(own.source, _text(own.source), host, port, asked.store, pool or None)
            name = "-".join(filter(None, (f"{PREFIX}core", pool, str(number))))
            actors.append(PlannedActor(name, pool, number, shipped, selectors, resources, table.num_cpus))
    if table.gateways:
        own = asked.of(pools[0])
        where = _cores(own, actors)
        for number, selectors in enumerate(spread({}, nodes, table.gateways)):
            port = _next_port(own, taken)
            shipped = replace(actors[0].shipped, port=port, before=where)
            actors.append(
                PlannedActor(f"{PREFIX}gateway-{number}", "", number, shipped, selectors, {}, table.num_cpus)
            )
    return actors


def _next_port(own: ServeSettings, taken: Counter[int]) -> int:
    """Return the next server's port; 0: whichever is free on its node.

    Raises:
        ConfigError: There is none left.
    """
    port = own.listen.port and own.listen.port + taken[own.listen.port]
    if port > MOST_PORT:
        raise ConfigError(
            f"{own.where('listen_address')}: {own.listen}: each further server takes the next port, and none is "
            f"beyond {MOST_PORT}"
        )
    taken[own.listen.port] += 1
    return port


def _cores(own: ServeSettings, actors: Sequence[PlannedActor]) -> str:
    """Return where gateways find the cores: in the store, or at the ports that they have on this machine.

    Raises:
        ConfigError: Nothing says that beforehand.
    """
    if own.table.store is not None and is_shared(own.table.store):
        return own.table.store
    found = [(each.shipped.host, each.shipped.port) for each in actors]
    if not all(host is not None and port for host, port in found):
        raise ConfigError(
            f"{own.where('listen_address')}: gateways look for cores at their ports, and a free one is not known "
            'beforehand: give a port, or store = "redis://HOST:PORT/DB"'
        )
    addresses = (ListenAddress(host or "", port) for host, port in found)
    return ",".join(each.url(tls=own.has_tls) for each in addresses)


def machines(nodes: Sequence[RayNode]) -> int:
    """Return how many machines nodes are on: those with one address are on one."""
    return len({node.address for node in nodes})


def _text(source: str) -> str:
    return Path(source).read_text(encoding="utf-8") if source else ""


def _is_said(own: ServeSettings, asked: ServersAsked) -> bool:
    """Whether something says at which host servers listen."""
    return (asked.listen_address or own.table.listen_address) is not None


def _check(own: ServeSettings, asked: ServersAsked, nodes: Sequence[RayNode]) -> None:
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
            f"{own.where('store')}: the cluster has nodes on {machines(nodes)} machines, and each must reach the "
            f'store; {what} a file of one machine. One that all reach is store = "redis://HOST:PORT/DB"'
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


def _fit(
    own: ServeSettings, pool: str, labels: Mapping[str, str], resources: Mapping[str, float], nodes: Sequence[RayNode]
) -> list[RayNode]:
    """Return the nodes that a pool's actors can be on; without one they would wait for ever.

    Raises:
        ConfigError: There is none; names the pool, and what nodes have.
    """
    where = " ".join(filter(None, (own.source or "Ray", f"pool {pool!r}" if pool else "")))
    named = [node for node in nodes if matches(node.labels, labels)]
    if not named:
        has = "; ".join(sorted({_listed(node.labels) or "no labels" for node in nodes}))
        flags = ",".join(f"{key}={value}" for key, value in labels.items())
        raise ConfigError(
            f"{where}: no node of the cluster has the labels {_listed(labels)}; nodes have {has}. "
            f"`ray start --labels={flags}` gives a node some"
        )
    fit = [node for node in named if all(node.resources.get(each, 0.0) >= much for each, much in resources.items())]
    if not fit:
        raise ConfigError(f"{where}: no node with the pool's labels has the resources {_listed(resources)}")
    return fit


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


def spread(labels: Mapping[str, str], nodes: Sequence[RayNode], actors: int) -> list[tuple[Mapping[str, str], ...]]:
    """Return for each of a pool's actors by which labels Ray is to place it: the first that a node has.

    Each has a node of its own as long as there are enough, and is begun again there; where that node is dead, on one
    that no other of them has, and at last on any that has the pool's labels.
    """
    own = [nodes[number % len(nodes)].node_id for number in range(actors)]
    found = list[tuple[Mapping[str, str], ...]]()
    for node_id in own:
        others = sorted(set(own) - {node_id})
        aside = [{**labels, NODE_ID: f"!in({', '.join(others)})"}] if others else []
        found.append(({**labels, NODE_ID: node_id}, *aside, dict(labels) or ANY))
    return found
