"""The body of an execute: looked at, said as a chat completion, and as what a call of the gateway says of itself."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from orla_lg.errors import shown
from orla_lg.serve.gateway.answers import RequestRefused
from orla_lg.serve.gateway.identity import MAX_NAME_CHARS, MAX_TAGS
from orla_lg.wires.reading import is_number
from orla_lg.wires.wire import Body

CACHE_POLICIES = ("preserve", "flush", "auto")
ACCURACY_POLICIES = ("prefer", "strict")
MAX_NAMES = 64
"""Of labels, or of tools that are asked about."""

_TEXTS = (
    "backend", "stage_id", "prompt", "workflow_id", "cache_policy", "reasoning_effort", "accuracy_policy", "skill_id",
    "scheduling_policy", "request_scheduling_policy",
)  # fmt: skip
_OBJECTS = ("response_format", "chat_template_kwargs", "scheduling_hints", "cache_hints", "tags")
_LISTS = ("messages", "tools", "data_labels")
_PASSED = ("max_tokens", "temperature", "top_p", "chat_template_kwargs", "reasoning_effort")
"""Named and meant as in chat completions."""

_ROLES = {"human": "user", "ai": "assistant", "function": "tool"}
"""LangChain's names of roles, which its messages of other kinds come with."""


def checked(body: Body) -> None:
    """Refuse a body that is no execute; fields that are not known are passed over.

    Raises:
        RequestRefused: Naming the field.
    """
    for names, kind, title in ((_TEXTS, str, "a text"), (_OBJECTS, Mapping, "an object"), (_LISTS, list, "a list")):
        _check(body, "", names, kind, title)
    if not body.get("backend"):
        raise RequestRefused(400, "backend is missing; it is the name of a backend, or auto")
    if not body.get("prompt") and not body.get("messages"):
        raise RequestRefused(400, "there is neither a prompt nor messages")
    for where, message in _objects("messages", body.get("messages")):
        if not isinstance(message.get("role"), str):
            raise _refused(f"{where}.role", "a text", message.get("role"))
        _check(message, f"{where}.", ("content",), str | list, "a text or a list of parts")
        _check(message, f"{where}.", ("tool_call_id",), str, "a text")
        _check(message, f"{where}.", ("tool_calls",), list, "a list")
        for call, each in _objects(f"{where}.tool_calls", message.get("tool_calls")):
            if not (isinstance(name := _called(each).get("name"), str) and name):
                raise _refused(f"{call}: its name", "a text", name)
            _check(each, f"{call}.", ("id",), str, "a text")
    for where, tool in _objects("tools", body.get("tools")):
        if not (isinstance(tool.get("name"), str) and tool["name"]):
            raise _refused(f"{where}.name", "a name", tool.get("name"))
        _check(tool, f"{where}.", ("description",), str, "a text")
        _check(tool, f"{where}.", ("inputSchema",), Mapping, "a JSON schema")
    if (form := body.get("response_format")) is not None:
        _check(form, "response_format.", ("name",), str, "a text")
        if not isinstance(form.get("schema"), Mapping):
            raise _refused("response_format.schema", "a JSON schema", form.get("schema"))
    _check_words(body)
    checked_labels(body)


def _check(holder: Body, where: str, names: Iterable[str], kind: Any, title: str) -> None:
    for name in names:
        if holder.get(name) is not None and not isinstance(holder[name], kind):
            raise _refused(f"{where}{name}", title, holder[name])


def _objects(where: str, said: Sequence[Any] | None) -> Iterator[tuple[str, Body]]:
    for place, each in enumerate(said or ()):
        if not isinstance(each, Mapping):
            raise _refused(f"{where}[{place}]", "an object", each)
        yield f"{where}[{place}]", each


def _check_words(body: Body) -> None:
    for name, words in (("cache_policy", CACHE_POLICIES), ("accuracy_policy", ACCURACY_POLICIES)):
        if body.get(name) and body[name] not in words:
            raise _refused(name, f"one of {', '.join(words)}", body[name])
    accuracy = body.get("accuracy")
    if accuracy is not None and not (is_number(accuracy) and 0 <= accuracy <= 1):
        raise _refused("accuracy", "a number from 0 to 1", accuracy)
    for name in ("priority", "request_priority"):
        said = (body.get("scheduling_hints") or {}).get(name)
        if said is not None and not (is_number(said) and math.isfinite(said)):
            raise _refused(f"scheduling_hints.{name}", "a number", said)
    flushes = (body.get("cache_hints") or {}).get("flush_on_complete")
    if flushes is not None and not isinstance(flushes, bool):
        raise _refused("cache_hints.flush_on_complete", "true or false", flushes)


def checked_labels(body: Body) -> None:
    """Refuse tags and data labels that are none.

    Raises:
        RequestRefused: Naming the field.
    """
    checked_names("data_labels", body.get("data_labels") or ())
    tags = body.get("tags") or {}
    if not isinstance(tags, Mapping):
        raise _refused("tags", "an object", tags)
    if len(tags) > MAX_TAGS:
        raise RequestRefused(400, f"there are at most {MAX_TAGS} tags, got {len(tags)}")
    for key, value in tags.items():
        if not (isinstance(value, str) and len(key) + len(value) <= MAX_NAME_CHARS):
            most = f"a text, of at most {MAX_NAME_CHARS} characters with its name"
            raise _refused(f"tags.{key:.60}", most, value)


def checked_names(field: str, said: Any) -> list[str]:
    """Return a list of names.

    Raises:
        RequestRefused: It is none, or too long.
    """
    if not isinstance(said, list | tuple):
        raise _refused(field, "a list", said)
    if len(said) > MAX_NAMES:
        raise RequestRefused(400, f"{field} has at most {MAX_NAMES} names, got {len(said)}")
    for place, each in enumerate(said):
        if not (isinstance(each, str) and each):
            raise _refused(f"{field}[{place}]", "a name", each)
    return list(said)


def _refused(name: str, expected: str, value: object) -> RequestRefused:
    return RequestRefused(400, f"{name} must be {expected}, got {shown(value)}")


# As a chat completion


def as_chat(body: Body) -> dict[str, Any]:
    """Return an execute as a chat completion's request, without its model."""
    said: dict[str, Any] = {"messages": list(_messages(body))}
    said |= {name: body[name] for name in _PASSED if body.get(name) not in (None, "")}
    if tools := body.get("tools"):
        said["tools"] = [_tool(tool) for tool in tools]
    if (form := body.get("response_format")) is not None:
        schema = {"name": form.get("name") or "answer", "schema": form["schema"], "strict": bool(form.get("strict"))}
        said["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.get("stream"):
        said["stream"] = True
    return said


def _messages(body: Body) -> Iterator[dict[str, Any]]:
    for message in body.get("messages") or ():
        role = message.get("role")
        said: dict[str, Any] = {"role": _ROLES.get(role, role), "content": message.get("content") or ""}
        if called := message.get("tool_call_id"):
            said["tool_call_id"] = called
        if calls := message.get("tool_calls"):
            said["tool_calls"] = [_call(call) for call in calls]
        yield said
    if prompt := body.get("prompt"):
        yield {"role": "user", "content": prompt}


def _called(call: Body) -> Body:
    """Return what a tool call of v1 calls, which it says as MCP does."""
    held = (call.get(key) for key in ("McpCallToolParams", "params"))
    return next((each for each in held if isinstance(each, Mapping)), call)


def _call(call: Body) -> dict[str, Any]:
    params = _called(call)
    arguments = params.get("arguments")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments or {})
    function = {"name": params["name"], "arguments": written}
    return {"id": call.get("id") or "", "type": "function", "function": function}


def _tool(tool: Body) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool["name"]}
    if description := tool.get("description"):
        function["description"] = description
    if (schema := tool.get("inputSchema")) is not None:
        function["parameters"] = schema
    return {"type": "function", "function": function}


# As the origin of a call


def origin(body: Body) -> dict[str, Any]:
    """Return what an execute says of where it comes from, in the keys that the gateway reads (``source_of``)."""
    hints = body.get("scheduling_hints") or {}
    priority = hints.get("request_priority")
    said = {
        "workflow_run": body.get("workflow_id"),
        "stage": body.get("stage_id"),
        "cache": body.get("cache_policy"),
        "priority": hints.get("priority") if priority is None else priority,
        "tags": body.get("tags"),
        "labels": body.get("data_labels"),
    }
    return {"metadata": {"orla": {name: value for name, value in said.items() if value not in (None, "", [], {})}}}


def flushes(body: Body) -> bool | None:
    """Return whether the workflow's cache is to go when the workflow is complete; ``None`` where nothing is said."""
    said: bool | None = (body.get("cache_hints") or {}).get("flush_on_complete")
    return said


def names(tools: Sequence[Body] | None) -> list[str]:
    """Return the names of the tools that a model may call."""
    return [tool["name"] for tool in tools or ()]
