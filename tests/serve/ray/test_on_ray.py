"""Cores on a Ray cluster of several raylets: placed, and killed with their process, their node and the head.

One cluster serves all tests, in the order of the file: a head takes seconds to start.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from orla_lg.errors import ConfigError
from orla_lg.link.whereabouts import here, is_gone
from orla_lg.serve.ray import command
from orla_lg.serve.ray.cluster import Cluster
from orla_lg.serve.ray.planning import ServersAsked, planned
from orla_lg.serve.ray.watching import ActorWatch
from tests.serve.ray.ground import BOUND, PATIENCE_S, Command, Ground, answered, await_flow, check_calls
from tests.serve_kills.processes import asked, until

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Ground(tmp_path_factory.mktemp("ray")) as made:
        yield made


@pytest.fixture(scope="module")
def app(ground: Ground) -> Iterator[Any]:
    """An application of Ray Serve, which begins while other tests run."""
    pytest.importorskip("fastapi", reason="Ray Serve is not installed: `make test-ray` installs it")
    port = ground.serve_url.removesuffix("/v1").rpartition(":")[2]
    words = [sys.executable, "-m", "tests.serve.ray.serve_app", ground.address, ground.engine.url, port]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait(20)


@pytest.fixture(scope="module")
def running(ground: Ground, app: Any) -> Command:
    made = ground.command("--config", str(ground.config()))
    made.until_followed()
    return made


@pytest.fixture(scope="module")
def replicas(ground: Ground, running: Command) -> list[Any]:
    url = running.core().url
    return [ground.replica(url), ground.replica(url)]


def ray_of(ground: Ground) -> Any:
    """Return Ray, with this process as one of the cluster's drivers."""
    import ray

    if not ray.is_initialized():
        ray.init(address=ground.address, log_to_driver=False, logging_level="ERROR")
    return ray


def test_it_says_what_runs_where_and_what_ray_opens(ground: Ground, running: Command) -> None:
    core, standby = (running.now()[f"orla-core-chat-{number}"] for number in (0, 1))
    gateway = running.now()["orla-gateway-0"]
    assert gateway.state == "ready" and answered(gateway)
    assert (core.state, core.epoch, standby.state) == ("ready", 1, "standby")
    assert core.node != standby.node, "a standby is kept off its core's node"
    assert ground.node_of(core) is not ground.cluster.head_node, "it has no such label"
    assert "listens on all interfaces" in running.text and "the actors go on" in running.text
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text() not in running.text


def test_the_dashboards_table_names_what_they_are(ground: Ground, running: Command) -> None:
    ray = ray_of(ground)
    shown = {each["Name"]: each for each in ray._private.state.actors().values()}
    assert {"orla-core-chat-0", "orla-core-chat-1"} <= set(shown)
    assert {each["ActorClassName"] for name, each in shown.items() if name.startswith("orla-")} == {
        "OrlaCore",
        "OrlaGateway",
    }


def test_a_second_start_finds_them_another_configuration_is_refused_and_stop_ends_them(ground: Ground) -> None:
    cluster = Cluster(ray_of(ground), ground.address, False, "", "")
    file = ground.config("other.toml", "other", standbys=0, gateways=0)

    def begun() -> int:
        watch = ActorWatch(cluster.ray, {})
        command._begin(cluster, "other", planned(ServersAsked(str(file)), cluster.nodes()), watch)
        return watch.seen["orla-core-chat-0"].pid

    pid = begun()
    assert begun() == pid
    file.write_text(file.read_text() + "# another text\n")
    with pytest.raises(
        ConfigError, match=f"another configuration; `orla-lg serve --on ray={ground.address} --stop` ends"
    ):
        begun()
    command._stop(cluster, "other", 1.0)
    until(lambda: is_gone(here(), pid), "the actor's process has ended")
    assert cluster.found("other") == {} and len(cluster.found("orla")) == 3


def test_an_actor_killed_is_begun_again_and_calls_go_on(ground: Ground, running: Command, replicas: Any) -> None:
    await_flow(replicas)
    core = running.core()
    os.kill(core.pid, signal.SIGKILL)
    began_s = time.monotonic()
    after = running.core(core.epoch)
    await_flow(replicas)
    print(f"calls flow {time.monotonic() - began_s:.1f} s after the kill of an actor")
    assert after.name != core.name, "the standby"
    assert running.other_process(core).state == "standby"
    check_calls(ground)


def test_a_core_on_a_dead_node_grants_nothing_beside_the_next(
    ground: Ground, running: Command, replicas: Any
) -> None:
    core = running.core()
    node = ground.node_of(core)
    for each in replicas:
        each.calls_take(2.0)
    until(lambda: ground.engine.account()["running"] >= BOUND, "long calls fill the engine")
    raylet = ground.kill(node, "raylet")
    served = ground.engine.account()["served"]
    until(lambda: ground.engine.account()["served"] > served, "the core of a dead node still grants: its lease holds")
    os.kill(core.pid, signal.SIGSTOP)
    after = running.core(core.epoch)
    os.kill(core.pid, signal.SIGCONT)
    for each in replicas:
        each.calls_take(0.02)
    await_flow(replicas)
    assert asked(f"{core.url}/readyz") is None, "what was thawed takes no calls"
    check_calls(ground)
    assert answered(running.now()["orla-gateway-0"])
    raylet.wait(20)
    again = running.other_process(core)
    assert again.node != core.node and after.epoch > core.epoch
    await_flow(replicas)
    check_calls(ground)


def test_beside_ray_serve(ground: Ground, running: Command, app: Any) -> None:
    assert app.stdout is not None and app.stdout.readline().strip() == "serves"
    served = ground.engine.account()["served"]
    with Orla.remote(running.core().url) as orla:
        assert len(answers(orla, 8)) == 8
        assert {record.backend for record in orla.records()} == {"serve"}
    assert ground.engine.account()["served"] >= served + 8


def answers(orla: Orla, calls: int) -> list[Any]:
    model = ChatOpenAI(model="scripted", base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)  # type: ignore[arg-type]

    def ask(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    graph = orla.wrap(StateGraph(MessagesState).add_node("served", ask).add_edge(START, "served"))
    return [graph.invoke({"messages": [("user", f"hello {number}")]}) for number in range(calls)]


def test_calls_go_on_without_the_head(ground: Ground, running: Command, replicas: Any) -> None:
    ray = ray_of(ground)
    handles = {name: ray.get_actor(name, "orla") for name in running.now()}
    ray.get([each.status.remote() for each in handles.values()], timeout=PATIENCE_S)  # from now on they are connected
    core = running.core()
    ground.kill(ground.cluster.head_node, "gcs_server")
    await_flow(replicas)
    said = ray.get([each.status.remote() for each in handles.values()], timeout=PATIENCE_S)
    assert sorted(each["state"] for each in said) == ["ready", "ready", "standby"]
    os.kill(core.pid, signal.SIGKILL)  # nothing begins it again now
    began_s = time.monotonic()
    await_flow(replicas)
    print(f"calls flow {time.monotonic() - began_s:.1f} s after the kill of a core without a head")
    check_calls(ground)
