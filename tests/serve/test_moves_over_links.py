"""A workflow of a replica is moved by the core: over the link, and with the prompt that the replica keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from orla_lg import ConfigError, Orla
from orla_lg.core.engine.backend import Backend, Capability, Probe, Support
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.link.messages import Grant, Keeps, Request, RequestDone, Signal, StopWarm
from orla_lg.link.messages import Warm as WarmOrder
from orla_lg.mappers.table import stage_mapper
from orla_lg.testing.virtual import StillAdapter
from tests.serve.in_thread import server
from tests.serve.replica import graph_of
from tests.serve.scripted import Core, Key, Replica, World, end, enter, first
from tests.stub_engine import StubEngine


class Warming(StillAdapter):
    def __init__(self) -> None:
        super().__init__(Probe(models=("m",), capabilities={Capability.WARM: Support.NATIVE}))

    async def warm(self, body: Any) -> Any:
        raise AssertionError("the core has no prompt to send")


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def started(world: World, **key: Any) -> tuple[Core, Replica]:
    core = Core(
        world,
        backends={
            Backend(name, f"http://{name}", engine="warm", model="m", max_concurrency=1): Warming() for name in "ab"
        },
        mapper=stage_mapper({"*": "a"}), warm_up=WarmUp(least_tokens=1, room=1.0),
    )  # fmt: skip
    core.start()
    replica = Replica(world, "r1", Key(**key))
    replica.connect(core)
    replica.tell(Signal("run_started", "run", {"thread": "t", "graph": "g"}))
    return core, replica


def a_call(call: str) -> Any:
    return enter(call, run="run", workflow="t", thread=True, chars=[8000, 8000], prompt_chars=16_000)


def test_its_replica_prefills_the_prompt_that_it_keeps_for_the_old_backend(world: World) -> None:
    core, replica = started(world)
    replica.tell(a_call("c1"), Keeps("c1", 16_000, 3), first("c1"), end("c1", prompt_tokens=4000))
    replica.tell(Request(1, "move", {"workflow": "t", "backend": "b", "tenant": None}))
    assert replica.got(RequestDone)[-1].value is True
    world.settle(0.1)
    (warm,) = replica.got(WarmOrder)
    assert (warm.workflow, warm.backend, warm.kept_for, warm.model, warm.prefix) == ("t", "b", "a", "m", 12)
    replica.tell(a_call("c2"))
    world.settle(0.1)
    granted = replica.got(Grant)[-1]
    assert (granted.call, granted.backend) == ("c2", "b") and granted.reason.startswith("moved from 'a'")
    assert [each.order for each in replica.got(StopWarm)] == [warm.order], "the call itself is there"
    replica.tell(first("c2"), end("c2"))
    core.serving.check_integrity()


def test_a_call_that_waits_is_granted_where_its_workflow_was_moved(world: World) -> None:
    core, replica = started(world)
    replica.tell(a_call("c1"), a_call("c2"))
    assert replica.grants() == ["c1"]
    replica.tell(Request(1, "move", {"workflow": "t", "backend": "b", "tenant": None}))
    world.settle(0.1)
    assert [(grant.call, grant.backend, grant.attempt) for grant in replica.got(Grant)] == [
        ("c1", "a", 1),
        ("c2", "b", 1),
    ]
    replica.tell(end("c1"), end("c2"))
    replica.tell(Signal("run_ended", "run", {"outcome": "done"}))
    core.serving.check_integrity()


def test_a_key_moves_within_its_tenants_and_backends(world: World) -> None:
    _, replica = started(world, key_id="k", tenants=("red",), backends=("a",))
    for more, kind in (
        ({"workflow": "t", "backend": "b"}, "ConfigError"), ({"workflow": "t", "backend": "x"}, "ConfigError"),
        ({"workflow": "t", "backend": "a", "tenant": "blue"}, "MappingError"), ({"backend": "a"}, "ConfigError"),
        ({"workflow": "t", "backend": "a"}, None),
    ):  # fmt: skip
        replica.tell(Request(1, "move", more))
        assert replica.got(RequestDone)[-1].error == kind, more


def test_orla_remote_moves_a_thread_of_any_replica(engine: StubEngine, tmp_path: Any) -> None:
    file = tmp_path / "orla.toml"
    file.write_text(f'[backends.a]\nurl = "{engine.url}"\n[backends.b]\nurl = "{engine.url}"\n[mapping]\n"*" = "a"\n')
    with server(file) as running, Orla.remote(running.url) as orla, Orla.remote(running.url) as other:
        graph, config = graph_of(orla, "a"), {"configurable": {"thread_id": "t"}}
        asyncio.run(graph.ainvoke({"messages": [("user", "hi")]}, config))
        assert other.move("t", "b") and not other.move("u", "b")
        with pytest.raises(ConfigError, match="unknown backend 'c'"):
            other.move("t", "c")
        asyncio.run(graph.ainvoke({"messages": [("user", "hi")]}, config))
        assert [record.backend for record in orla.records()] == ["a", "b"]
        assert orla.records()[-1].reason.startswith("moved from 'a'")
