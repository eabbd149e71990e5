"""A core that says what is wrong inside, or a replica that has what cannot be said: a connection is lost, no link."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orla_lg import BackendUnavailable, ConfigError, Orla
from orla_lg.link.messages import Enter, Graph, Hello, Message, Missed, Ready, Signal, View, Welcome
from tests.link.conftest import links
from tests.link.scripted import ScriptedCore, eventually
from tests.link.test_calls import graph, hi
from tests.link.test_reconnect import Run, held
from tests.stub_engine import StubEngine

Replica = Callable[..., Orla]


def broken(welcome: Welcome, name: str) -> Message:
    view = dict(welcome.views[0])
    return {
        "a count without an end": View([{**view, "waiting": float("inf")}]),
        "a count that is none": View([{**view, "in_flight": float("nan")}]),
        "limits of a newer release": welcome._replace(limits={"galaxies": {"calls": 3}}),
        "limits that are no table": welcome._replace(limits={"run": [1]}),
        "a backend that is no table": welcome._replace(backends=[1]),
        "a pool that is no table": welcome._replace(pool="east", pools=[1]),
        "views that are none": welcome._replace(views=["a"]),
    }[name]


BROKEN = (
    "a count without an end", "a count that is none", "limits of a newer release", "limits that are no table",
    "a backend that is no table", "a pool that is no table", "views that are none",
)  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_inside_costs_a_connection_and_no_more(
    core: ScriptedCore, engine: StubEngine, replica: Replica, name: str
) -> None:
    core.pool = "east"
    orla = replica()
    core.wait(Ready)
    core.line.send(broken(core.welcome(), name))
    core.wait(Ready, 2)
    assert orla.wrap(graph(engine)).invoke(hi())["messages"]


@pytest.mark.parametrize("name", [name for name in BROKEN if not name.startswith("a count")])
def test_a_welcome_that_is_wrong_inside_is_tried_again(
    core: ScriptedCore, engine: StubEngine, replica: Replica, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    core.pool = "east"
    orla = replica()
    core.wait(Ready)
    right = core.welcome
    wrong = broken(right(), name)
    monkeypatch.setattr(core, "welcome", lambda: wrong)
    core.drop()
    core.wait(Hello, 3)
    assert links(), "the link's thread has ended"
    monkeypatch.setattr(core, "welcome", right)
    core.wait(Ready, 2)
    assert orla.wrap(graph(engine)).invoke(hi())["messages"]


def test_what_cannot_be_said_of_a_run_does_not_keep_the_link_down(
    core: ScriptedCore, engine: StubEngine, replica: Replica
) -> None:
    orla = replica()
    with held(engine):
        run = Run(orla.wrap(graph(engine)))
        core.wait(Enter)
        orla.core.serving.progress.run_started("\ud800", thread="\ud800")  # goes on without the core
        core.drop()
        core.wait(Ready, 2)
        assert [each.run for each in core.all(Signal) if each.what == "run_started"]
    assert run.result()
    orla.core.serving.progress.run_ended("\ud800", "completed")


def test_a_graph_that_is_too_large_does_not_keep_the_link_down(core: ScriptedCore, replica: Replica) -> None:
    orla = replica()
    reports: Any = orla.core.serving.cores.home.reports
    huge = Graph("huge", {f"stage {number:0200}": [[], [], False] for number in range(6000)}, {}, {})
    orla.core.serving.progress._tell_graph(reports, huge)
    core.drop()
    core.wait(Ready, 2)
    eventually(lambda: orla.core.serving.link.up)


@pytest.mark.parametrize("url", ["http://a..b:8081", "https://.example", "http://" + "a" * 64 + ":1", "http://a\0b"])
def test_a_name_that_no_resolver_takes_is_a_wrong_url(url: str) -> None:
    with pytest.raises(ConfigError, match="URL"):
        Orla.remote(url)


def test_an_address_that_a_core_gives_and_no_resolver_takes_is_passed_by(
    core: ScriptedCore, engine: StubEngine, replica: Replica
) -> None:
    core.pool, core.cores = "", {"": ["https://a..b", "https://.example", "http://127.0.0.1:9/a\0b"]}
    orla = replica()
    core.wait(Ready)
    core.drop()
    core.wait(Ready, 2)
    assert links()
    assert orla.wrap(graph(engine)).invoke(hi())["messages"]


def test_close_while_a_granted_call_is_at_its_engine_ends_it(
    core: ScriptedCore, engine: StubEngine, replica: Replica
) -> None:
    orla = replica()
    with held(engine, status=500) as gate:
        run = Run(orla.wrap(graph(engine, max_retries=0)))
        core.wait(Enter)
        eventually(lambda: engine.chats)
        orla.close()
        gate.open()
        run.join(10.0)
    assert not run.is_alive(), "it waits for a core that it has parted from"
    assert run.error is not None


def test_a_grant_for_a_backend_that_was_taken_out_meanwhile_goes_back(
    core: ScriptedCore, engine: StubEngine, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    orla, core.grants = replica(), False
    serving: Any = orla.core.serving
    leaves = serving.leaves

    def late(call: Any) -> bool:
        serving.cores.home.served.leave()
        return bool(leaves(call))

    monkeypatch.setattr(serving, "leaves", late)
    run = Run(orla.wrap(graph(engine, max_retries=0)))
    core.line.send(core.grant(core.wait(Enter).call))
    missed = core.wait(Missed)
    assert missed.elsewhere and not engine.chats
    core.refuse(missed.call, "cause", "nowhere else")
    with pytest.raises(BackendUnavailable, match="taken out"):
        run.result()
