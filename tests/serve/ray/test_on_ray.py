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
from orla_lg_llamacpp.embedded import free_port
from tests.serve.ray.ground import BOUND, Command, Ground, await_flow, check_calls
from tests.serve_kills.processes import asked, until

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with Ground(tmp_path_factory.mktemp("ray")) as made:
        yield made


@pytest.fixture(scope="module")
def command(ground: Ground) -> Command:
    made = ground.command("--config", str(ground.config()))
    made.until_followed()
    return made


@pytest.fixture(scope="module")
def replicas(ground: Ground, command: Command) -> list[Any]:
    url = command.core().url
    return [ground.replica(url), ground.replica(url)]


def ray_of(ground: Ground) -> Any:
    """Return Ray, with this process as one of the cluster's drivers."""
    import ray

    if not ray.is_initialized():
        ray.init(address=ground.address, log_to_driver=False, logging_level="ERROR")
    return ray


def test_it_says_what_runs_where_and_what_ray_opens(ground: Ground, command: Command) -> None:
    core, standby = (command.now()[f"orla-core-chat-{number}"] for number in (0, 1))
    assert (core.state, core.epoch, standby.state) == ("ready", 1, "standby")
    assert core.node != standby.node, "a standby is kept off its core's node"
    assert ground.node_of(core) is not ground.cluster.head_node, "it has no such label"
    assert "listens on all interfaces" in command.text and "the actors go on" in command.text
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text() not in command.text


def test_the_dashboards_table_names_what_they_are(ground: Ground, command: Command) -> None:
    ray = ray_of(ground)
    shown = {each["Name"]: each for each in ray._private.state.actors().values()}
    assert {"orla-core-chat-0", "orla-core-chat-1"} <= set(shown)
    assert {each["ActorClassName"] for name, each in shown.items() if name.startswith("orla-")} == {"OrlaCore"}


def test_a_second_command_finds_them_and_does_not_make_more(ground: Ground, command: Command) -> None:
    with Command(ground.folder, f"--on=ray={ground.address}", "--config", str(ground.folder / "orla.toml")) as second:
        second.until_followed()
        assert {each.pid for each in second.now().values()} == {each.pid for each in command.now().values()}
        assert second.interrupt() == 0
        assert "the actors go on" in second.lines[-1]


def test_an_actor_killed_is_begun_again_and_calls_go_on(ground: Ground, command: Command, replicas: Any) -> None:
    await_flow(replicas)
    core = command.core()
    os.kill(core.pid, signal.SIGKILL)
    began_s = time.monotonic()
    after = command.core(core.epoch)
    await_flow(replicas)
    print(f"calls flow {time.monotonic() - began_s:.1f} s after the kill of an actor")
    assert after.name != core.name, "the standby"
    assert command.other_process(core).state == "standby"
    check_calls(ground)


def test_a_core_on_a_dead_node_grants_nothing_beside_the_next(
    ground: Ground, command: Command, replicas: Any
) -> None:
    core = command.core()
    node = ground.node_of(core)
    for each in replicas:
        each.calls_take(2.0)
    until(lambda: ground.engine.account()["running"] >= BOUND, "long calls fill the engine")
    ground.kill(node, "raylet")
    served = ground.engine.account()["served"]
    until(lambda: ground.engine.account()["served"] > served, "the core of a dead node still grants: its lease holds")
    os.kill(core.pid, signal.SIGSTOP)
    after = command.core(core.epoch)
    os.kill(core.pid, signal.SIGCONT)
    for each in replicas:
        each.calls_take(0.02)
    await_flow(replicas)
    again = command.other_process(core)
    assert again.node != core.node and after.epoch > core.epoch
    assert asked(f"{core.url}/readyz") is None or again.url == core.url, "the old one takes no calls"
    await_flow(replicas)
    check_calls(ground)


def test_beside_ray_serve(ground: Ground, command: Command, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="Ray Serve is not installed: `make test-ray` installs it")
    port = free_port()
    app = subprocess.Popen(
        [sys.executable, "-m", "tests.serve.ray.serve_app", ground.address, ground.engine.url, str(port)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert app.stdout is not None and app.stdout.readline().strip() == "serves"
        file = ground.config("beside.toml", "beside", standbys=0, url=f"http://127.0.0.1:{port}/v1")
        file.write_text(file.read_text().replace('engine = "vllm"', 'engine = "openai"'))
        beside = ground.command("--config", str(file))
        beside.until_followed()
        served = ground.engine.account()["served"]
        with Orla.remote(beside.core().url) as orla:
            assert len(answers(orla, 8)) == 8
            assert {record.backend for record in orla.records()} == {"main"}
        assert ground.engine.account()["served"] == served + 8
        assert beside.interrupt() == 0
        stopped = Command(tmp_path, f"--on=ray={ground.address}", "--stop", "--config", str(file))
        with stopped:
            assert stopped.process.wait(30) == 0, stopped.text
            assert "orla-core-chat-0" in stopped.text
    finally:
        app.kill()
        app.wait(20)


def answers(orla: Orla, calls: int) -> list[Any]:
    model = ChatOpenAI(model="scripted", base_url="http://127.0.0.1:9/v1", api_key="none", max_retries=0)  # type: ignore[arg-type]

    def ask(state: MessagesState) -> Any:
        return {"messages": [model.invoke(state["messages"])]}

    graph = orla.wrap(StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask"))
    return [graph.invoke({"messages": [("user", f"hello {number}")]}) for number in range(calls)]


def test_calls_go_on_without_the_head(ground: Ground, command: Command, replicas: Any) -> None:
    ray = ray_of(ground)
    handles = {name: ray.get_actor(name, "orla") for name in command.now()}
    core = command.core()
    ground.kill(ground.cluster.head_node, "gcs_server")
    await_flow(replicas)
    said = ray.get([each.status.remote() for each in handles.values()], timeout=20)
    assert sorted(each["state"] for each in said) == ["ready", "standby"]
    os.kill(core.pid, signal.SIGKILL)  # nothing begins it again now
    began_s = time.monotonic()
    await_flow(replicas)
    print(f"calls flow {time.monotonic() - began_s:.1f} s after the kill of a core without a head")
    check_calls(ground)
