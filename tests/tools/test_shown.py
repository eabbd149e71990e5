"""When a tool began early, and what that hid, as explain, the records file and LangSmith show it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_core.tracers.langchain import wait_for_all_tracers
from langsmith import utils

from orla_lg import Orla, cli
from tests.langsmith_collector import Collector
from tests.tools.conftest import Lab
from tests.tools.planned_engine import Answer

HELLO = {"messages": [HumanMessage("Hello")]}


def agent(lab: Lab) -> Any:
    @tool
    def look(x: int) -> str:
        """Look at x."""
        time.sleep(0.03)
        return f"seen {x}"

    lab.plan = [Answer((("look", {"x": 1}),), after={0: lambda: (lab.wait_for_starts(1), time.sleep(0.06))})]
    return create_agent(lab.model(), [look])


def test_explain_shows_the_tools_of_an_answer_and_of_a_run(
    lab: Lab, make_orla: Callable[..., Orla], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "records.jsonl"
    lab.orla = make_orla(lab.backend(), mapper={"*": "main"}, records_file=file)
    lab.orla.wrap(agent(lab), tools_safe={"look"}).invoke(HELLO)
    lab.orla.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    (early,) = [line for line in lines if "early_tool" in line]
    first = next(line for line in lines if "id" in line)
    assert (early["early_tool"], early["stage"], early["call"]) == ("look", "tools", first["id"])
    assert 0.02 < early["hidden_s"] <= early["began_before_s"] and early["waited_s"] == 0.0

    assert cli.main(["explain", first["id"], str(file)]) == 0
    assert "tool 'look' began while the answer came, which hid 0.0" in capsys.readouterr().out
    assert cli.main(["explain", "--run", "last", str(file)]) == 0
    out = capsys.readouterr().out
    assert "2 calls of 1 stage" in out and "1 tool began early, which hid 0.0" in out
    assert "tools: look" in out and "○ early tool" in out
    assert cli.main(["explain", "--run", "last", str(file), "--json"]) == 0
    assert [("early_tool" in json.loads(line)) for line in capsys.readouterr().out.splitlines()].count(True) == 1


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as running:
        monkeypatch.delenv("LANGCHAIN_TRACING_V2", raising=False)
        monkeypatch.setenv("LANGSMITH_TRACING", "true")
        monkeypatch.setenv("LANGSMITH_ENDPOINT", running.url)
        monkeypatch.setenv("LANGSMITH_API_KEY", "any")
        utils.get_env_var.cache_clear()
        yield running
        wait_for_all_tracers()
        utils.get_env_var.cache_clear()


def test_langsmiths_run_of_the_tool_says_when_it_began(
    lab: Lab, served: Callable[..., Any], collector: Collector
) -> None:
    from langchain_core.tracers.langchain import LangChainTracer
    from langsmith import Client

    client = Client(api_url=collector.url, api_key="any")
    graph = served(agent(lab), tools_safe={"look"})
    graph.invoke(HELLO, {"callbacks": [LangChainTracer(client=client)]})
    wait_for_all_tracers()
    client.flush()
    (traced,) = collector.of_type("tool")
    shown = traced["extra"]["metadata"]
    assert 0.02 < shown["orla_hidden_s"] < 1.0
    assert shown["orla_began_early"] < traced["start_time"] + "Z"
