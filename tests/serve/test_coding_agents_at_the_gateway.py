"""The requests of coding agents, as recorded from Codex 0.171.0 and Claude Code 2.1.332 (texts shortened).

``make test-coding-agents`` has the agents themselves take a turn; these tests replay what one such turn asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.coding_agents.turns import SAID, engine_for
from tests.serve.running_gateway import Gateway, running_gateway

RECORDED = Path(__file__).parent / "recorded"
SESSION = "session-1"
ALL_ARMS = [("codex", "chat"), ("codex", "responses"), ("claude_code", "chat"), ("claude_code", "messages")]


def recorded(agent: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RECORDED / f"{agent}.json").read_text())
    return found


def calls_of(agent: str) -> list[dict[str, Any]]:
    return [request for request in recorded(agent) if request["method"] == "POST"]


@pytest.fixture(scope="module")
def gateways() -> Iterator[dict[tuple[str, str], Gateway]]:
    """A gateway before each kind of engine, by the agent that calls and the wire that the engine speaks."""
    with ExitStack() as stack:
        engines = {arm: stack.enter_context(engine_for(*arm)) for arm in ALL_ARMS}
        yield {arm: stack.enter_context(running_gateway(engine)) for arm, engine in engines.items()}


@pytest.fixture
def gateway(gateways: dict[tuple[str, str], Gateway], agent: str, spoken: str) -> Gateway:
    chosen = gateways[agent, spoken]
    chosen.engine.requests.clear()
    chosen.engine.machine.forget()
    chosen.forget()
    return chosen


ARMS = pytest.mark.parametrize(("agent", "spoken"), ALL_ARMS)


def sent(gateway: Gateway, request: dict[str, Any], **changed: Any) -> httpx.Response:
    headers = {name: value for name, value in request["headers"].items() if name != "accept-encoding"}
    headers["accept-encoding"] = request["headers"].get("accept-encoding", "identity")
    body = None if request["body"] is None else {**request["body"], **changed}
    return httpx.request(request["method"], gateway.root + request["path"], headers=headers, json=body)


def events(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    """Return the events of a stream, each with its name."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in lines:
            found.append((lines.get("event", ""), json.loads(lines["data"])))
    return found


@ARMS
def test_the_calls_of_a_session_are_one_workflow(gateway: Gateway, agent: str, spoken: str) -> None:
    first, second = calls_of(agent)
    begun, ended = events(sent(gateway, first)), events(sent(gateway, second))
    assert all(name == event["type"] for name, event in begun + ended)
    called, said = json.dumps([event for _, event in begun]), json.dumps([event for _, event in ended])
    assert ("exec_command" if agent == "codex" else '"name": "Bash"') in called
    assert SAID.split()[0] in said
    one, two = gateway.records(2)
    assert SESSION in one.workflow and one.workflow == two.workflow
    assert (one.error, two.error, one.external, two.external) == (None, None, False, False)
    assert one.prompt_tokens and two.cached_tokens and two.cached_tokens >= one.prompt_tokens // 2


LAST = {"codex": "response.completed", "claude_code": "message_stop"}


@ARMS
def test_a_stream_ends_as_the_agent_waits_for(gateway: Gateway, agent: str, spoken: str) -> None:
    seen = events(sent(gateway, calls_of(agent)[0]))
    names = [name for name, _ in seen]
    assert names[-1] == LAST[agent]
    if agent == "codex":
        whole = seen[-1][1]["response"]
        assert names[0] == "response.created" and "response.output_item.done" in names
        assert whole["usage"]["input_tokens"] > 0
        assert any(item["type"] == "function_call" for item in whole["output"])
    else:
        assert names[0] == "message_start" and names.count("message_delta") == 1
        (ending,) = [event for name, event in seen if name == "message_delta"]
        assert ending["delta"]["stop_reason"] == "tool_use" and ending["usage"]["output_tokens"] > 0


@pytest.mark.parametrize(("agent", "spoken"), [("codex", "chat"), ("claude_code", "chat")])
def test_tools_that_no_engine_knows_are_left_out(gateway: Gateway, agent: str, spoken: str) -> None:
    """A namespace of tools, a search on the web, a placeholder for tools to come: the others reach the engine."""
    sent(gateway, calls_of(agent)[0])
    (body,) = gateway.engine.bodies()
    names = [tool["function"]["name"] for tool in body["tools"]]
    described = [tool for tool in calls_of(agent)[0]["body"]["tools"] if not tool.get("defer_loading")]
    assert names == [tool["name"] for tool in described if tool.get("type", "function") == "function"]
    assert len(names) in (7, 11)


@pytest.mark.parametrize(("agent", "spoken"), [("claude_code", "chat")])
@pytest.mark.parametrize("path", ["/", "/api/hello"])
def test_a_look_at_the_server_fails_softly(gateway: Gateway, agent: str, spoken: str, path: str) -> None:
    assert httpx.head(gateway.root + path).status_code in (200, 404)


@pytest.mark.parametrize(("agent", "spoken"), [("codex", "chat")])
def test_a_socket_for_responses_is_refused_at_once(gateway: Gateway, agent: str, spoken: str) -> None:
    """Some versions of Codex ask for one first, and fall back when it is refused."""
    upgrade = {
        "connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
        "sec-websocket-key": "MDEyMzQ1Njc4OWFiY2RlZg==",
    }  # fmt: skip
    answer = httpx.get(gateway.url + "/responses", headers=upgrade, timeout=5)
    assert 400 <= answer.status_code < 500


@ARMS
def test_whole_answers(gateway: Gateway, agent: str, spoken: str) -> None:
    answer = sent(gateway, calls_of(agent)[1], stream=False)
    assert answer.status_code == 200, answer.text
    assert SAID in answer.text
    assert answer.headers["content-type"].startswith("application/json")


NEWER: dict[str, dict[str, Any]] = {
    "codex": {
        "tools": [
            {"type": "function", "name": "exec_command", "parameters": {"type": "object", "properties": {}}},
            {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
            {"type": "local_shell"}, {"type": "a_tool_of_tomorrow", "name": "hm"},
        ],
        "include": ["reasoning.encrypted_content", "a.thing.of.tomorrow"],
        "context_management": [{"type": "compaction"}],
        "tool_choice": {
            "type": "allowed_tools", "mode": "auto",
            "tools": [{"type": "function", "name": "exec_command"}, {"type": "web_search"}],
        },
        "field_of_tomorrow": {"deep": [1, None]},
    },
    "claude_code": {
        "tools": [
            {"name": "Bash", "input_schema": {"type": "object", "properties": {}}},
            {"type": "web_search_20260209", "name": "web_search", "max_uses": 8},
            {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
            {"type": "a_tool_of_tomorrow", "name": "hm"},
            {"name": "Later", "defer_loading": True, "input_schema": {"type": "object"}},
        ],
        "thinking": {"type": "of_tomorrow"},
        "context_management": {"edits": [{"type": "compact_20270101"}]},
        "output_config": {"effort": "ludicrous", "task_budget": {"type": "tokens", "total": 64000}},
        "field_of_tomorrow": {"deep": [1, None]},
    },
}  # fmt: skip


@pytest.mark.parametrize("spoken", ["chat"])
@pytest.mark.parametrize(("agent", "field"), [(agent, field) for agent, newer in NEWER.items() for field in newer])
def test_what_a_newer_agent_asks_is_not_refused(gateway: Gateway, agent: str, spoken: str, field: str) -> None:
    answer = sent(gateway, calls_of(agent)[0], **{field: NEWER[agent][field]})
    events(answer)
    (body,) = gateway.engine.bodies()
    if field == "tools":
        names = [tool["function"]["name"] for tool in body["tools"]]
        assert names == {"codex": ["exec_command"], "claude_code": ["Bash", "Later"]}[agent]


@pytest.mark.parametrize(("agent", "spoken"), [("codex", "chat")])
def test_a_conversation_that_no_engine_keeps_is_refused_with_the_field(
    gateway: Gateway, agent: str, spoken: str
) -> None:
    """Leaving it out would answer another question than was asked."""
    answer = sent(gateway, calls_of(agent)[0], previous_response_id="resp_1")
    assert answer.status_code == 400
    assert "previous_response_id" in answer.json()["error"]["message"]


@ARMS
def test_the_callers_key_does_not_reach_the_engine(gateway: Gateway, agent: str, spoken: str) -> None:
    sent(gateway, calls_of(agent)[0])
    for seen in gateway.engine.requests:
        assert "the-key" not in json.dumps(seen.headers)


@pytest.mark.parametrize(("agent", "spoken"), [("claude_code", "chat"), ("claude_code", "messages")])
def test_a_key_as_an_api_key_is_taken_too(gateway: Gateway, agent: str, spoken: str) -> None:
    request = calls_of(agent)[0]
    headers = {name: value for name, value in request["headers"].items() if name != "authorization"}
    events(sent(gateway, {**request, "headers": {**headers, "x-api-key": "the-key"}}))
