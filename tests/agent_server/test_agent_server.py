"""Two of LangGraph's Agent Servers (``langgraph dev``) on one ``orla-lg serve``: one bound, and each run is told."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest

from tests.agent_server.processes import AgentServer, agent_servers
from tests.serve.processes import ROOT, environment, serving, until_ready

pytestmark = [
    pytest.mark.agent_server,
    pytest.mark.skipif(
        importlib.util.find_spec("langgraph_api") is None,
        reason="needs LangGraph's Agent Server: run make test-agent-server, or pip install 'langgraph-cli[inmem]'",
    ),
]

BOUND, JOBS = 3, 10


class House(NamedTuple):
    """An engine, a server before it, and two Agent Servers before that."""

    engine: str
    url: str
    agents: list[AgentServer]

    def account(self, query: str = "") -> dict[str, Any]:
        return dict(httpx.get(self.engine.removesuffix("/v1") + f"/account?{query}", trust_env=False).json())


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    engine = subprocess.Popen(
        [sys.executable, "-m", "tests.scripted_engine", "--chunks", "5"], cwd=ROOT, env=environment(folder),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert engine.stdout is not None
        url = engine.stdout.readline().strip()
        (folder / "orla.toml").write_text(
            f'[backends.one]\nurl = "{url}"\nmax_concurrency = {BOUND}\n[serve]\nlisten_address = "127.0.0.1:0"\n'
        )
        with serving(folder, ()) as served:
            until_ready(served)
            with agent_servers(folder, served.url, JOBS) as agents:
                yield House(url, served.url, agents)
    finally:
        engine.terminate()
        engine.wait(10)
        assert engine.stdout is not None
        engine.stdout.close()


def until(holds: Callable[[], object], why: object = "") -> None:
    until_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until_s, why
        time.sleep(0.02)


def test_the_bound_holds_at_the_engine_over_both(house: House) -> None:
    house.account("anew")
    threads = [(agents, agents.thread()) for agents in house.agents for _ in range(8)]
    with ThreadPoolExecutor(len(threads)) as pool:
        running = [
            pool.submit(agents.run, thread, f"call-b{number}-of-0.2- hello", graph=("asks", "asks_sync")[number % 2])
            for number, (agents, thread) in enumerate(threads)
        ]
        answers = [each.result().json() for each in running]
    assert all(each["messages"][-1]["type"] == "ai" for each in answers), answers
    account = house.account()
    assert account["most"] == BOUND and not account["twice"] and account["running"] == 0
    assert not [agents.log for agents in house.agents if "Blocking" in agents.log or "Traceback" in agents.log]


def test_records_carry_thread_and_run(house: House) -> None:
    agents = house.agents[0]
    thread, before = agents.thread(), len(agents.records)
    for _ in range(2):
        agents.run(thread, "hello")
    runs = [each["run_id"] for each in agents.client.get(f"/threads/{thread}/runs").json()]
    until(lambda: len(agents.records) == before + 2)
    found = agents.records[before:]
    assert {each["workflow"] for each in found} == {thread}
    assert sorted(each["run"] for each in found) == sorted(runs)
    assert {each["stage"] for each in found} == {"ask"}


def test_a_run_on_another_server_is_of_the_same_workflow(house: House) -> None:
    thread = house.agents[0].thread()
    house.agents[1].client.post("/threads", json={"thread_id": thread}).raise_for_status()
    for agents in house.agents:
        agents.run(thread, "hello")
        until(lambda agents=agents: agents.records and agents.records[-1]["workflow"] == thread)


def test_a_cancel_frees_the_grant(house: House) -> None:
    agents, other = house.agents
    thread = agents.thread()
    run = agents.run(thread, "call-c-of-60- hello", "runs").json()["run_id"]
    until(lambda: house.account()["running"] == 1)
    agents.client.post(f"/threads/{thread}/runs/{run}/cancel", params={"wait": "true"}).raise_for_status()
    until(lambda: house.account()["running"] == 0)
    house.account("anew")
    with ThreadPoolExecutor(BOUND) as pool:  # as many as there are places go at once
        list(pool.map(lambda number: other.run(other.thread(), f"call-d{number}-of-1- hi"), range(BOUND)))
    assert house.account()["most"] == BOUND


def events(answer: httpx.Response) -> list[tuple[str, Any]]:
    parts = [part for part in answer.text.replace("\r\n", "\n").split("\n\n") if "data:" in part]
    found = [dict(line.split(": ", 1) for line in part.splitlines() if ": " in line) for part in parts]
    return [(each["event"], json.loads(each["data"])) for each in found if "event" in each]


@pytest.mark.parametrize("mode", ["values", "updates", "messages-tuple", "messages", "events", "debug"])
def test_streaming_modes_pass_through(house: House, mode: str) -> None:
    agents = house.agents[0]
    seen = events(agents.run(agents.thread(), "hello", "runs/stream", stream_mode=[mode]))
    kinds = [kind for kind, _ in seen]
    assert "error" not in kinds, seen
    if mode.startswith("messages"):
        parts = [data for kind, data in seen if kind.startswith("messages") and kind != "messages/metadata"]
        assert len(parts) > 3, "token by token"
    else:
        assert mode in kinds
