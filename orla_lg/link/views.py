"""What the core is and serves, as the flat tables of messages, and back: backends, views, mappings, statistics.

Both directions stand side by side, so that each table is written once; the keys are the fields' names. A newer peer
may send more than is known here, which is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, lru_cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from orla_lg.core.boundary.stage_rules import StageRules
from orla_lg.core.call import NO_HINTS, Assignment, Call, Considered, Hints
from orla_lg.core.engine.backend import Backend, Capability, Cost, Probe, Support
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.speed import Speed
from orla_lg.core.guard.labels import label_names
from orla_lg.core.limits.limits import Limit, Limits, LimitScope
from orla_lg.core.lookahead.structure import Edge, GraphStructure
from orla_lg.core.mapping import Mapper, Mappings, Planned, parts_of
from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.placement.view import BackendView, nothing, served_names
from orla_lg.errors import ConfigError, shown
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import Flat, Graph
from orla_lg.mappers.table import ExplicitMapper, Rule, StageTable, named, tables_of

T = TypeVar("T")

KEEP_LAYERS = 256
"""Of limits, so many are kept as they are said: they come with each call."""

SHARED = "shared"
"""Where the mapping for all calls stands among the tables of ``Welcome.mapping``; others are variants, by name."""


def _known(kind: type[Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return those entries of a table that are fields of a class."""
    names = {each.name for each in fields(kind) if each.init}
    return {name: value for name, value in flat.items() if name in names}


def _made(kind: Callable[..., T], what: str, table: Mapping[str, Any]) -> T:
    try:
        return kind(**table)
    except (TypeError, ValueError) as error:
        raise LinkBroken(f"the server sent {what} that is none: {error}") from error


# Backends

_OF_BACKEND = (
    "name", "url", "model", "engine", "max_concurrency", "capacity", "quality", "isolate_tenants",
    "assemble", "early_tools",
)  # fmt: skip
_LISTS = ("aliases", "forward_headers", "forward_query")


@dataclass(frozen=True, slots=True)
class ServedBackend:
    """A backend as a server told of it."""

    backend: Backend
    """With the replica's own key."""
    api_key_env: str | None
    warms: bool
    """Whether prompts are prefilled there before their calls come."""


def flat_backend(backend: Backend, *, api_key_env: str | None = None, warms: bool = False) -> Flat:
    """Return what a replica must know of a backend; never its keys."""
    table: Flat = {name: getattr(backend, name) for name in _OF_BACKEND}
    table |= {name: list(getattr(backend, name)) for name in _LISTS}
    return {**table, "cost": asdict(backend.cost), "api_key_env": api_key_env, "warms": warms}


def read_backend(flat: Mapping[str, Any], key_in: Callable[[str], str | None]) -> ServedBackend:
    """Return a backend; *key_in* gives the key in one of the replica's environment variables.

    Raises:
        ConfigError: The variable is not set, or the server's backend cannot be right here.
        LinkBroken: It is no backend.
    """
    name, variable = flat.get("name"), flat.get("api_key_env")
    key = key_in(variable) if isinstance(variable, str) and variable else None
    if variable and not key:
        raise ConfigError(
            f"backend {shown(name)}: the environment variable {shown(variable)} is not set; the server sends "
            "no keys, each process that calls the engine has it in its own environment"
        )
    table = {each: flat[each] for each in (*_OF_BACKEND, *_LISTS) if each in flat}
    table["cost"] = _made(Cost, "a backend's prices", _known(Cost, flat.get("cost") or {}))
    try:
        backend = Backend(**table, api_key=key)
    except (TypeError, AttributeError) as error:
        raise LinkBroken(f"the server sent a backend that is none: {error}") from error
    return ServedBackend(backend, variable or None, bool(flat.get("warms")))


# Views


def flat_view(view: BackendView, fault: str | None = None) -> Flat:
    """Return how a backend is seen now; *fault*: why its engine does not answer."""
    return {
        "name": view.name,
        "probe": None if view.probe is None else flat_probe(view.probe),
        "waiting": view.waiting,
        "in_flight": view.in_flight,
        "max_concurrency": view.max_concurrency,
        "circuit": str(view.circuit),
        "paused": view.paused,
        "speed": asdict(view.speed),
        "load": None if view.load is None else asdict(view.load),
        "waiting_for_prefix": view.waiting_for_prefix,
        "fault": fault,
    }


def changed_views(before: Sequence[Flat], now: Sequence[Flat]) -> list[Flat]:
    """Return what is new in views, for a peer that has those of before: of each backend what changed, by name."""
    known = {flat["name"]: flat for flat in before}
    found = []
    for flat in now:
        was = known.get(flat["name"], {})
        if was != flat:
            found.append({"name": flat["name"], **{key: each for key, each in flat.items() if was.get(key) != each}})
    return found


def flat_probe(probe: Probe) -> Flat:
    """Return what an engine said of itself."""
    table: Flat = {each.name: getattr(probe, each.name) for each in fields(Probe)}
    for name in ("capabilities", "advice"):
        table[name] = {str(key): str(value) for key, value in table[name].items()}
    return {**table, "models": list(probe.models), "aliases": dict(probe.aliases), "wires": sorted(probe.wires)}


def read_probe(flat: Mapping[str, Any]) -> Probe:
    """Return what an engine said of itself, without capabilities that are not known here."""
    table = _known(Probe, flat)
    able, ways = {str(each) for each in Capability}, {str(each) for each in Support}
    support = table.get("capabilities", {}).items()
    table["capabilities"] = {Capability(name): Support(way) for name, way in support if name in able and way in ways}
    table["advice"] = {Capability(name): text for name, text in table.get("advice", {}).items() if name in able}
    table["models"], table["wires"] = tuple(table.get("models", ())), frozenset(table.get("wires", ()))
    return _made(Probe, "what an engine said of itself", table)


@dataclass(frozen=True, slots=True)
class PushedView:
    """A backend at the core, as it was pushed last."""

    view: BackendView
    fault: str | None

    def for_call(self, resident: Callable[[], int]) -> BackendView:
        """Return the view on behalf of a call."""
        return replace(self.view, resident=resident)


def read_view(flat: Mapping[str, Any], backend: Backend) -> PushedView:
    """Return how a backend is seen.

    Raises:
        LinkBroken: It is no view.
    """
    probe = None if flat.get("probe") is None else read_probe(flat["probe"])
    load, circuit = flat.get("load"), flat.get("circuit", Circuit.CLOSED)
    view = BackendView(
        name=backend.name,
        models=served_names(backend, probe),
        probe=probe,
        cost=backend.cost,
        quality=backend.quality,
        waiting=int(flat.get("waiting", 0)),
        in_flight=int(flat.get("in_flight", 0)),
        max_concurrency=flat.get("max_concurrency"),
        circuit=Circuit(circuit) if circuit in list(Circuit) else Circuit.CLOSED,
        paused=bool(flat.get("paused")),
        speed=_made(Speed, "a speed", _known(Speed, flat.get("speed") or {})),
        load=None if load is None else _made(EngineStats, "a load", _known(EngineStats, load)),
        waiting_for_prefix=int(flat.get("waiting_for_prefix", 0)),
        model=backend.model,
        resident=nothing,
    )
    return PushedView(view, flat.get("fault"))


# Mappings, as far as they show beforehand


def flat_mapping(mappings: Mappings) -> Flat:
    """Return what the shared mapping and its variants say beforehand."""
    mappers = {SHARED: mappings.shared, **mappings.variants}
    return {"tables": [_flat_mapper(where, mapper) for where, mapper in mappers.items() if mapper is not None]}


def _flat_mapper(where: str, mapper: Mapper) -> Flat:
    tables = tables_of(mapper)
    rules = tables[0].rules if len(tables) == 1 else None
    whole = rules is not None and all(getattr(part, "inner", part) is tables[0] for part in _outer(mapper))
    return {
        "where": where,
        "rules": {} if rules is None else {stage: _flat_rule(rule) for stage, rule in rules.items()},
        "open": "" if whole else type(mapper).__name__,
    }


def _outer(mapper: Mapper) -> list[Mapper]:
    """Return what a mapper consists of, without what the entries of its tables are decided by."""
    return [part for part in parts_of(mapper) if part is mapper or isinstance(part, ExplicitMapper | StageTable)]


def _flat_rule(rule: Rule) -> Flat:
    return {"to": list(rule.to), **rule.parameters}


class ForeseenMapper:
    """What is known here of a mapping that the core decides by: its tables; the rest it decides at each call.

    It maps calls itself only while they go on without the core.
    """

    def __init__(self, rules: Mapping[str, Mapping[str, Any]], by: str) -> None:
        sure = ExplicitMapper({stage: dict(entry) for stage, entry in rules.items() if entry.get("to")})
        self._rules = StageRules({stage: sure.rules[stage] if stage in sure.rules else Rule() for stage in rules})
        self._by = by

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        found = self._rules.find(call.identity.stage)
        return None if found is None or not found.entry.to else named(found.name, found.entry)

    def foretell(self, stage: str) -> Planned | None:
        """Return what the core will say of a stage, as far as that is known."""
        found = self._rules.find(stage)
        if found is None:
            return Planned(stage, (), f"{self._by}, at each call", open=True) if self._by else None
        if not found.entry.to:
            return Planned(stage, (), f"mapping[{found.name!r}], at each call", open=True)
        return Planned(stage, found.entry.to, f"mapping[{found.name!r}]", open=bool(self._by))


def read_mapping(flat: Mapping[str, Any]) -> Mappings:
    """Return the shared mapping and its variants, as far as they are known.

    Raises:
        LinkBroken: It is no mapping.
    """
    made = Mappings(None)
    for table in flat.get("tables", ()):
        where, rules, by = table.get("where"), table.get("rules") or {}, str(table.get("open") or "")
        try:
            whole = not by and rules and all(rule.get("to") for rule in rules.values())
            mapper: Mapper = ExplicitMapper(rules) if whole else ForeseenMapper(rules, by)
        except (ConfigError, AttributeError) as error:
            raise LinkBroken(f"the server sent a mapping that is none: {error}") from error
        if where == SHARED:
            made.shared = mapper
        else:
            made.variants[str(where)] = mapper
    return made


# What goes with a call


def flat_hints(hints: Hints) -> Flat:
    """Return what hints say."""
    if hints is NO_HINTS:
        return {}
    flat = {name: value for name in _HINTS if (value := getattr(hints, name)) is not None}
    return flat | {name: float(flat[name]) for name in ("priority", "deadline_s") if name in flat}  # of any kind


_HINTS = tuple(each.name for each in fields(Hints))


def read_hints(flat: Mapping[str, Any]) -> Hints:
    """Return hints.

    Raises:
        ConfigError: A value is not allowed.
    """
    return Hints(**_known(Hints, flat)) if flat else NO_HINTS


def flat_assignment(assignment: Assignment) -> Flat:
    """Return where a call is wanted."""
    return {
        "backend": assignment.backend,
        "model": assignment.model,
        "mapper": assignment.mapper,
        "reason": assignment.reason,
        "alternatives": list(assignment.alternatives),
        "parameters": dict(assignment.parameters),
        "considered": flat_considered(assignment.considered),
    }


def read_assignment(flat: Mapping[str, Any]) -> Assignment:
    """Return where a call is wanted.

    Raises:
        LinkBroken: It is no assignment.
    """
    table = _known(Assignment, flat)
    table["alternatives"] = tuple(table.get("alternatives", ()))
    table["considered"] = read_considered(table.get("considered", ()))
    return _made(Assignment, "an assignment", table)


def flat_considered(considered: Sequence[Considered]) -> list[Flat]:
    """Return what was weighed."""
    return [{"backend": each.backend, "numbers": dict(each.numbers), "verdict": each.verdict} for each in considered]


def read_considered(flat: Sequence[Mapping[str, Any]]) -> tuple[Considered, ...]:
    """Return what was weighed."""
    return tuple(_made(Considered, "what was weighed", _known(Considered, each)) for each in flat) if flat else ()


# Limits


def flat_limits(limits: Limits) -> Flat:
    """Return limits as the table that ``Limits.of`` reads."""
    table: Flat = {} if limits.run is None else {"run": _flat_limit(limits.run)}
    for kind in ("stages", "tenants"):
        if entries := getattr(limits, kind):
            table[kind] = {name: _flat_limit(limit) for name, limit in entries.items()}
    return table


def _flat_limit(limit: Limit) -> Flat:
    return {each.name: value for each in fields(Limit) if (value := getattr(limit, each.name)) is not None}


@lru_cache(maxsize=KEEP_LAYERS)
def flat_layer(layer: LimitScope) -> Flat:
    """Return the limits of a graph or a run; a key that means nothing elsewhere becomes its place's name."""
    key = layer.key if isinstance(layer.key, str) else layer.where
    return {"key": key, "where": layer.where, "of_run": layer.of_run, "limits": flat_limits(layer.limits)}


def read_layer(flat: Mapping[str, Any]) -> LimitScope:
    """Return the limits of a graph or a run.

    Raises:
        ConfigError: They are wrong.
    """
    limits = Limits.of(flat.get("limits") or {})
    return LimitScope(limits, str(flat.get("key")), str(flat.get("where", "")), of_run=bool(flat.get("of_run")))


# Graphs


def flat_graph(name: str, structure: GraphStructure, homes: Mapping[str, str]) -> Graph:
    """Return a graph's structure as a message."""
    edges = {stage: [sorted(edge.always), sorted(edge.perhaps), edge.open] for stage, edge in structure.edges.items()}
    return Graph(
        name, edges, _sorted(structure.joins), dict(homes), _sorted(structure.labels), _sorted(structure.declassifies)
    )


def _sorted(sets: Mapping[str, frozenset[str]]) -> dict[str, list[str]]:
    return {stage: sorted(names) for stage, names in sets.items()}


def _sets(lists: Mapping[str, Sequence[str]]) -> dict[str, frozenset[str]]:
    return {stage: frozenset(names) for stage, names in lists.items()}


def read_graph(graph: Graph) -> tuple[str, GraphStructure, Mapping[str, str]]:
    """Return a graph's name, its structure, and where its stages go.

    Raises:
        LinkBroken: It is no structure.
    """
    try:
        edges = {
            stage: Edge(frozenset(always), frozenset(perhaps), bool(is_open))
            for stage, (always, perhaps, is_open) in graph.edges.items()
        }
        labels = [
            {stage: label_names(f"labels of stage {shown(stage)}", names) for stage, names in table.items()}
            for table in (graph.labels, graph.declassifies)
        ]
        structure = GraphStructure(edges, _sets(graph.joins), *labels)
    except (TypeError, ValueError) as error:
        raise LinkBroken(f"graph {shown(graph.name)} has no structure: {error}") from error
    return graph.name, structure, graph.homes


# Statistics


@cache
def _statistics() -> TypeAdapter[Statistics]:
    return TypeAdapter(Statistics)


def flat_statistics(statistics: Statistics) -> Flat:
    """Return statistics as plain values."""
    flat: Flat = _statistics().dump_python(statistics, mode="json")
    return flat


def read_statistics(flat: Any) -> Statistics:
    """Return statistics.

    Raises:
        LinkBroken: They are none.
    """
    try:
        return _statistics().validate_python(flat)
    except ValidationError as error:
        raise LinkBroken(f"the server sent statistics that are none: {error}") from error


@dataclass(slots=True)
class Known:
    """What a server told of itself last."""

    epoch: int = 0
    version: str = ""
    replicas: int = 1
    replica_lease_s: float = 10.0
    tenants: Sequence[str] | None = None
    seen: dict[str, PushedView] = field(default_factory=dict)
