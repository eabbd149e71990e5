"""What an execute says: as a chat completion, as its origin, and what of it is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.serve.api.v1.request import as_chat, checked, flushes, names, origin
from orla_lg.serve.api.v1.wire import ExecuteWire
from orla_lg.serve.gateway.answers import RequestRefused
from orla_lg.serve.gateway.identity import BadHint, source_of
from orla_lg.serve.gateway.settings import GatewaySettings

PLAIN = {"backend": "light", "prompt": "hello"}
TOOL = {"name": "add", "description": "Adds.", "inputSchema": {"type": "object"}, "outputSchema": {"type": "number"}}


def test_messages_and_tools_go_both_ways_as_mcp_has_them() -> None:
    called = {"id": "c1", "McpCallToolParams": {"name": "add", "arguments": {"a": 1}}}
    body = {
        **PLAIN, "tools": [TOOL, {"name": "now"}],
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "human", "content": "1 + 1?"},
            {"role": "assistant", "content": "", "tool_calls": [called, {"params": {"name": "now"}}, {"name": "x"}]},
            {"role": "tool", "content": "2", "tool_call_id": "c1", "tool_name": "add"},
        ],
    }  # fmt: skip
    checked(body)
    said = as_chat(body)
    assert [message["role"] for message in said["messages"]] == ["system", "user", "assistant", "tool", "user"]
    calls = said["messages"][2]["tool_calls"]
    assert calls[0] == {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert [call["function"]["name"] for call in calls] == ["add", "now", "x"]
    assert said["messages"][3] == {"role": "tool", "content": "2", "tool_call_id": "c1"}
    assert said["messages"][4] == {"role": "user", "content": "hello"}
    function = {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}
    assert said["tools"] == [
        {"type": "function", "function": function},
        {"type": "function", "function": {"name": "now"}},
    ]


def test_parameters_pass_and_what_is_not_the_engines_does_not() -> None:
    body = {
        **PLAIN, "max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "reasoning_effort": "low", "stream": True,
        "chat_template_kwargs": {"enable_thinking": False}, "response_format": {"name": "n", "schema": {"a": 1}},
        "tags": {"team": "a"}, "data_labels": ["pii"], "workflow_id": "w", "scheduling_policy": "priority",
        "cache_policy": "preserve", "accuracy": 0.5, "something": "newer",
    }  # fmt: skip
    checked(body)
    said = as_chat(body)
    assert said.pop("messages") == [{"role": "user", "content": "hello"}]
    schema = {"name": "n", "schema": {"a": 1}, "strict": False}
    assert said == {
        "max_tokens": 5, "temperature": 0.0, "top_p": 0.5, "reasoning_effort": "low", "stream": True,
        "chat_template_kwargs": {"enable_thinking": False},
        "response_format": {"type": "json_schema", "json_schema": schema},
    }  # fmt: skip


def test_its_origin_is_read_as_any_call_of_the_gateway_s() -> None:
    body = {
        **PLAIN, "workflow_id": "run 7", "stage_id": "triage", "cache_policy": "flush",
        "scheduling_hints": {"priority": 3, "request_priority": 5},
    }  # fmt: skip
    source = source_of({}, origin(body), (None, None), GatewaySettings())
    assert source.workflow is not None and source.workflow.startswith("run-7~") and source.stage == "triage"
    assert source.hints.priority == 5 and source.hints.cache == "flush"
    assert source_of({}, origin(PLAIN), (None, None), GatewaySettings()).workflow is None
    stage_alone = origin({**PLAIN, "scheduling_hints": {"priority": 3}})
    assert source_of({}, stage_alone, (None, None), GatewaySettings()).hints.priority == 3
    assert flushes({"cache_hints": {"flush_on_complete": False}}) is False and flushes(PLAIN) is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"backend": ""}, "backend is missing"),
        ({"backend": 1}, "backend must be a text"),
        ({"prompt": None}, "neither a prompt nor messages"),
        ({"messages": "x"}, "messages must be a list"),
        ({"messages": ["x"]}, "messages[0] must be an object"),
        ({"tools": [{}]}, "tools[0].name must be a name"),
        ({"response_format": {"name": "x"}}, "response_format.schema must be"),
        ({"cache_policy": "keep"}, "cache_policy must be one of preserve, flush, auto"),
        ({"accuracy": 2}, "accuracy must be a number from 0 to 1"),
        ({"accuracy_policy": "x"}, "accuracy_policy must be one of"),
        ({"scheduling_hints": {"priority": "high"}}, "scheduling_hints.priority must be a number"),
        ({"cache_hints": {"flush_on_complete": 1}}, "flush_on_complete must be true or false"),
        ({"data_labels": [1]}, "data_labels[0] must be a name"),
        ({"data_labels": ["x"] * 65}, "at most 64 names"),
        ({"tags": {"team": 1}}, "tags.team must be a text"),
    ],
)
def test_what_is_wrong_is_refused_by_its_name(more: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        checked({**PLAIN, **more})
    assert said in str(refused.value) and refused.value.status == 400


NAMES = st.sampled_from([
    "backend", "stage_id", "prompt", "messages", "tools", "max_tokens", "response_format", "chat_template_kwargs",
    "scheduling_hints", "workflow_id", "cache_policy", "cache_hints", "reasoning_effort", "accuracy",
    "accuracy_policy", "tags", "data_labels", "skill_id", "stream", "role", "content", "tool_call_id", "tool_calls",
    "name", "arguments", "inputSchema", "schema", "priority", "id", "McpCallToolParams", "params",
])  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


OBJECTS = st.dictionaries(NAMES, JSON, max_size=4)
BODIES = st.fixed_dictionaries({}, optional={
    "messages": st.lists(OBJECTS, max_size=3), "tools": st.lists(OBJECTS | st.just({"name": "add"}), max_size=2),
    "response_format": OBJECTS, "scheduling_hints": OBJECTS, "tags": st.dictionaries(st.text(), st.text()),
    "data_labels": st.lists(st.text(max_size=3)), "stream": JSON, "workflow_id": st.text(), "max_tokens": JSON,
})  # fmt: skip


@given(st.dictionaries(NAMES, JSON, max_size=6) | BODIES)
def test_any_object_is_refused_by_name_or_said_as_a_chat_completion(body: dict[str, Any]) -> None:
    body.setdefault("backend", "light")
    body.setdefault("prompt", "hello")
    try:
        checked(body)
        source_of({}, origin(body), (None, None), GatewaySettings())
    except (RequestRefused, BadHint) as refused:
        assert str(refused)
        return
    said = json.loads(json.dumps(as_chat(body)))
    assert said["messages"] and all(isinstance(each["role"], str) for each in said["messages"])
    assert ExecuteWire().ask_of(body).model == body["backend"] and ExecuteWire().streams(body) in (True, False)
    assert names(body.get("tools")) is not None and flushes(body) in (True, False, None)
