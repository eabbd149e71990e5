"""What crosses as flat tables comes out as it went in; what is no such table is a broken link, and no other error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ormsgpack
import pytest

from orla_lg import Backend, ConfigError, Cost, Hints, Limit, Limits, Orla
from orla_lg.core.call import NO_HINTS, Assignment, Considered
from orla_lg.core.engine.backend import Capability, Probe, Support
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.speed import Speed
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.lookahead.structure import Edge, GraphStructure
from orla_lg.core.mapping import Mappings, foretold
from orla_lg.core.placement.view import BackendView, served_names
from orla_lg.link import messages, views
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import Grant, View
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.table import stage_mapper
from tests.conftest import at
from tests.stub_engine import StubEngine


def crossed(value: Any) -> Any:
    """Return a value as the other side reads it."""
    return ormsgpack.unpackb(ormsgpack.packb(value))


BACKEND = Backend(
    "main", "http://host/v1", "m", "vllm", "a-secret-key", ("alias",), 4, 100, Cost(1.0, 2.0, 0.5), 0.7,
    isolate_tenants=True, forward_headers=("X-Team",), forward_query=("tier",), admin_key="another-secret",
)  # fmt: skip

PROBE = Probe(
    ("m", "n"), {Capability.TOOLS: Support.UNSUPPORTED}, 4096, 8, 100_000, 4000, vision=True, version="1",
    incarnation="i", advice={Capability.PIN: "start it so"}, aliases={"n": "m"}, wires=frozenset({"messages"}),
)  # fmt: skip


def test_backends_without_their_keys() -> None:
    flat = crossed(views.flat_backend(BACKEND, api_key_env="K", warms=True))
    assert "secret" not in repr(flat)
    read = views.read_backend({**flat, "of a newer peer": 1}, {"K": "the-replicas-key"}.get)
    assert (read.backend, read.warms, read.backend.api_key) == (BACKEND, True, "the-replicas-key")
    with pytest.raises(ConfigError, match="'K' is not set"):
        views.read_backend(flat, {}.get)


def test_views_and_probes() -> None:
    view = BackendView(
        "main", served_names(BACKEND, PROBE), PROBE, BACKEND.cost, 0.7, 3, 2, 4, speed=Speed(1.0, 2.0, 3.0, 4.0),
        load=EngineStats(1, 2, 0.5), paused=True, waiting_for_prefix=1, model="m",
    )  # fmt: skip
    seen = views.read_view(crossed(views.flat_view(view, "gone")), BACKEND)
    assert (seen.view, seen.fault) == (view, "gone")
    newer = crossed(views.flat_probe(PROBE))
    newer["capabilities"] |= {"teleport": "native", "tools": "perhaps"}
    assert views.read_probe(newer).capabilities == {}


def test_mappings_as_far_as_they_show() -> None:
    class Chooses:
        def map(self, call: Any, backends: Any) -> None:
            return None

    class Foretells(Chooses):
        def foretell(self, stage: str) -> None:
            return None

    table = {"writer": ["main", "other"], "a|b": {"to": "other", "temperature": 0.5}, "*": "main"}
    mappings = Mappings(stage_mapper(table))
    mappings.variants = {
        "mixed": stage_mapper({"writer": Foretells(), "*": "main"}) or Foretells(),
        "aware": LoadAware(stage_mapper(table) or Foretells()),
        "own": Chooses(),
    }
    read = views.read_mapping(crossed(views.flat_mapping(mappings)))
    assert read.shared is not None and set(read.variants) == {"mixed", "aware", "own"}
    for stage in ("writer", "b", "other stage"):
        assert foretold(read.shared, stage) == foretold(mappings.shared or Chooses(), stage)
        told = foretold(read.variants["aware"], stage)
        assert told is not None and told.backends
    mixed = foretold(read.variants["mixed"], "writer")
    assert mixed is not None and mixed.open and not mixed.backends
    assert foretold(read.variants["mixed"], "x") == foretold(mappings.variants["mixed"], "x")
    own = foretold(read.variants["own"], "x")
    assert own is not None and own.open and own.by == "Chooses, at each call"


def test_hints_limits_assignments_and_graphs() -> None:
    hints = Hints(priority=3, deadline_s=2, tenant="acme", cache="flush")
    assert views.read_hints(crossed(views.flat_hints(hints))) == hints
    assert views.read_hints(crossed(views.flat_hints(NO_HINTS))) is NO_HINTS
    limits = Limits(Limit(calls=3), {"a": Limit(tokens=5, per_s=60.0)}, {"*": Limit(cost_usd=0.5)})
    layer = LimitScope(limits, object(), " of graph 'support'")
    read = views.read_layer(crossed(views.flat_layer(layer)))
    assert (read.limits, read.key, read.where, read.of_run) == (limits, layer.where, layer.where, False)
    assignment = Assignment(
        "main",
        "m",
        "own",
        "because",
        ("other",),
        {"temperature": 0.5},
        (Considered("main", {"waiting": 2}, "taken"),),
    )
    assert views.read_assignment(crossed(views.flat_assignment(assignment))) == assignment
    structure = GraphStructure(
        {"a": Edge(frozenset({"b"}), frozenset({"c", "__end__"}), open=True)}, {"b": frozenset({"a"})}
    )
    _, *fields = crossed(messages.flat(views.flat_graph("g", structure, {"a": "main"})))
    assert views.read_graph(messages.Graph(*fields)) == ("g", structure, {"a": "main"})


def test_statistics(engine: StubEngine, make_orla: Callable[..., Orla]) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"}, limits=Limits(tenants={"acme": Limit(calls=3)}))
    now = orla.statistics()
    assert views.read_statistics(crossed(views.flat_statistics(now))) == now


@pytest.mark.parametrize(
    "read",
    [
        lambda: views.read_view({"name": "main", "speed": {"service_s": 1}, "load": 3}, BACKEND),
        lambda: views.read_statistics({"calls": "many"}),
        lambda: views.read_graph(messages.Graph("g", {"a": [1]}, {}, {})),
        lambda: views.read_mapping({"tables": [{"where": "shared", "rules": {"a": {"to": ["b"], "nonsense": 1}}}]}),
        lambda: messages.read(["Grant", "c", "no epoch", 1, None, None]),
        lambda: messages.read(["Grant", "c", 1]),
        lambda: messages.read(["View", "views"]),
    ],
)
def test_what_is_none_is_a_broken_link(read: Callable[[], Any]) -> None:
    with pytest.raises((LinkBroken, TypeError, AttributeError)):  # the link takes all of them for one
        read()


def test_older_and_newer_messages() -> None:
    assert messages.read(["Unheard", 1]) is None
    assert messages.read(["View", [], 2, "newer"]) == View([], 2)
    older: Mapping[str, Any] = {"call": "c", "epoch": 1, "attempt": 1, "backend": "b", "model": None}
    assert messages.read(["Grant", *older.values()]) == Grant(**older)
