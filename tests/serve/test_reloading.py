"""A configuration loaded again: what would change is said, all of it is done, or nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph

from orla_lg import AccessDenied, AccessPolicy, ConfigError, Orla, config
from orla_lg.core.policies import name_of
from orla_lg.serve.reloading import Changes, Reloader
from tests.stub_engine import Gate, Reply, StubEngine


class Reloaded:
    """A core from a file, and what loads the file again."""

    def __init__(self, file: Path, *engines: StubEngine) -> None:
        self.file, self.engines = file, engines
        self.write()
        self.orla = Orla.from_config(file)
        self.reloader = Reloader(self.orla, config.load(file), lambda backend: None)

    def write(self, top: str = "", mapping: str = '"*" = "light"', **backends: str) -> None:
        tables = {"light": f'url = "{self.engines[0].url}"', **backends}
        text = "".join(f"[backends.{name}]\n{table}\n" for name, table in tables.items())
        self.file.write_text(f"{top}\n{text}\n[mapping]\n{mapping}\n")

    def again(self) -> Changes:
        found = self.reloader.look()
        self.reloader.apply(found)
        return found

    def call(self, model: str = "auto") -> str:
        """Return the backend on which a wrapped graph's call ran."""
        before = len(self.orla.records())

        def node(state: MessagesState) -> dict[str, Any]:
            client = ChatOpenAI(model=model, api_key="x", base_url="http://127.0.0.1:9/v1", max_retries=0)
            return {"messages": [client.invoke(state["messages"])]}

        builder = StateGraph(MessagesState)
        builder.add_node("node", node)
        builder.add_edge(START, "node")
        builder.add_edge("node", END)
        self.orla.wrap(builder).invoke({"messages": [("user", "hello")]})
        return str(self.orla.records()[before].backend)


@pytest.fixture
def running(tmp_path: Path, engine: StubEngine, other_engine: StubEngine) -> Iterator[Reloaded]:
    made = Reloaded(tmp_path / "orla.toml", engine, other_engine)
    with made.orla:
        yield made


def test_nothing_changed_is_nothing(running: Reloaded) -> None:
    assert running.again().text() == "  nothing"


def test_backends_come_and_go_and_the_mapping_follows(running: Reloaded) -> None:
    assert running.call() == "light"
    heavy = f'url = "{running.engines[1].url}"\nmax_concurrency = 2'
    running.write(mapping='"*" = "heavy"', heavy=heavy)
    assert running.again().done == (
        f"backend 'heavy' is added: openai at {running.engines[1].url}",
        "mapping.*: 'light' becomes 'heavy'",
    )
    assert running.call() == "heavy" and len(running.engines[1].requests) > 0
    running.write()
    assert "backend 'heavy' is removed; calls that wait or run there go on" in running.again().done
    assert running.call() == "light"
    assert list(running.orla.statistics().backends) == ["light"]
    with pytest.raises(ConfigError, match="unknown backend 'heavy'"):
        running.orla.pause("heavy")


def test_calls_on_a_removed_backend_go_on_and_then_it_is_closed(running: Reloaded) -> None:
    heavy = f'url = "{running.engines[1].url}"\nmax_concurrency = 1'
    running.write(mapping='"*" = "heavy"', heavy=heavy)
    running.again()
    gate = Gate()
    running.engines[1].rule = lambda seen: Reply(gate=gate)
    threads = [threading.Thread(target=running.call) for _ in range(2)]
    for thread in threads:
        thread.start()
    running.engines[1].wait(lambda seen: seen.in_flight == 1)
    scheduler = running.orla.core.serving.schedulers["heavy"]
    while scheduler.queue.waiting < 1:
        threading.Event().wait(0.005)
    running.write()
    running.again()
    with pytest.raises(ConfigError, match=r"backends\.heavy: one of that name was removed, and has calls yet"):
        running.write(heavy=heavy)
        running.again()
    running.write()
    assert running.call() == "light"
    gate.open()
    for thread in threads:
        thread.join(20.0)
    assert sorted(str(record.backend) for record in running.orla.records()) == ["heavy", "heavy", "light"]
    asyncio.run(asyncio.wait_for(running.reloader.see_off(once=True), 10.0))
    assert not running.reloader.leaving and "heavy" not in running.orla.core.clients
    running.write(heavy=heavy)
    running.again()


def test_a_drained_backend_that_was_removed_comes_back_as_any_other(running: Reloaded) -> None:
    heavy = f'url = "{running.engines[1].url}"'
    running.write(mapping='"*" = "heavy"', heavy=heavy)
    running.again()
    assert running.orla.drain("heavy", timeout_s=5.0) and running.call() == "light"
    running.write()
    running.again()
    asyncio.run(asyncio.wait_for(running.reloader.see_off(once=True), 10.0))
    running.write(mapping='"*" = "heavy"', heavy=heavy)
    running.again()
    assert running.call() == "heavy"


def test_bounds_policies_limits_and_variants_change(running: Reloaded) -> None:
    running.write(
        'policy = "edf"\n[limits.run]\ncalls = 7\n[variants.cheap]\n"*" = "light"',
        light=f'url = "{running.engines[0].url}"\nmax_concurrency = 5\ncapacity = 9\nquality = 0.5',
    )
    found = running.again()
    scheduler = running.orla.core.serving.schedulers["light"]
    assert (scheduler.queue.max_concurrency, scheduler.queue.capacity, scheduler.backend.quality) == (5, 9, 0.5)
    assert name_of(scheduler.queue.policies.stage) == name_of(scheduler.queue.policies.of("any")) == "edf"
    assert running.orla.limits.run is not None and running.orla.limits.run.calls == 7
    assert "cheap" in running.orla.core.serving.mappings.variants
    assert not found.refused
    running.write()
    running.again()
    assert running.orla.limits.run is None and not running.orla.core.serving.mappings.variants
    assert name_of(scheduler.queue.policies.stage) == "workflow_fcfs"


def test_what_needs_a_restart_refuses_all(running: Reloaded) -> None:
    running.write('policy = "edf"\nmemory = "release_only"', light='url = "http://127.0.0.1:9/v1"')
    found = running.reloader.look()
    assert any("memory: 'default' becomes 'release_only'" in line for line in found.refused)
    assert any(line.startswith("backends.light.url: ") for line in found.refused)
    with pytest.raises(ConfigError, match=r"orla\.toml: nothing was changed; these need a restart") as raised:
        running.reloader.apply(found)
    assert "memory" in str(raised.value) and "backends.light.url" in str(raised.value)
    assert name_of(running.orla.core.serving.schedulers["light"].queue.policies.stage) == "workflow_fcfs"


def test_an_engine_gets_no_second_name_while_it_has_calls(running: Reloaded) -> None:
    running.file.write_text(f'[backends.other]\nurl = "{running.engines[0].url}/"\n')
    with pytest.raises(ConfigError, match="'light' has another name, 'other': both would fill one engine"):
        running.again()


@pytest.mark.parametrize(
    "text", ["[backends.light]\nurl = 3", "not toml", '[backends.light]\nurl = "http://h/v1"\n[mapping]\nx = "heavy"']
)
def test_a_wrong_file_changes_nothing(running: Reloaded, text: str) -> None:
    running.file.write_text(text)
    before = running.reloader.settings
    with pytest.raises(ConfigError, match=r"orla\.toml"):
        running.again()
    assert running.reloader.settings is before and running.call() == "light"


def test_access_policies_tags_and_labels_come_and_go(running: Reloaded) -> None:
    policy = '{{name = "stop", subjects = ["{}"], resources = ["backend:light"], action = "deny"}}'
    running.write("policies = [" + policy.format("team:red") + "]")
    assert "policies.stop" in running.again().text()
    assert running.call() == "light"
    running.write(
        'tags = {team = "red"}\nstages = {x = {labels = ["pii"]}}\npolicies = [' + policy.format("team:red") + "]"
    )
    assert {"tags.team", "stages.x"} <= {line.strip().partition(":")[0] for line in running.again().done}
    with pytest.raises(AccessDenied, match="stop"):
        running.call()
    guard = running.orla.core.serving.guard
    assert guard.source_of("stop") == "file" and guard.flow.follows
    running.orla.policies = [AccessPolicy("stop", ["*"], ["backend:light"], "deny")]  # the file's holds
    running.write()
    running.again()
    assert guard.source_of("stop") == "code" and not guard.tags
    running.orla.policies = []
    assert running.call() == "light"


OWN = """
class Own:
    def __init__(self):
        self.seen = 0

    def key(self, head, now):
        if FAILS:
            raise RuntimeError("not these")
        return (head.order,)

FAILS = False
"""


def test_a_policy_that_cannot_order_what_waits_changes_nothing(
    running: Reloaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    (running.file.parent / "own_policies_of_a_reload.py").write_text(OWN.replace("FAILS = False", "FAILS = True"))
    gate = Gate()
    running.engines[0].rule = lambda seen: Reply(gate=gate)
    running.write(light=f'url = "{running.engines[0].url}"\nmax_concurrency = 1')
    running.again()
    threads = [threading.Thread(target=running.call) for _ in range(2)]
    for thread in threads:
        thread.start()
    scheduler = running.orla.core.serving.schedulers["light"]
    while scheduler.queue.waiting < 1:
        threading.Event().wait(0.005)
    running.write(
        'policy = "own_policies_of_a_reload:Own"',
        light=f'url = "{running.engines[0].url}"\nmax_concurrency = 1',
        heavy=f'url = "{running.engines[1].url}"',
    )
    with pytest.raises(ConfigError, match="the policy cannot order the calls that wait"):
        running.again()
    assert list(running.orla.statistics().backends) == ["light"]
    assert name_of(scheduler.queue.policies.stage) == "workflow_fcfs"
    gate.open()
    for thread in threads:
        thread.join(20.0)
