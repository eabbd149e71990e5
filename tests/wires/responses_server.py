"""A stand-in for a server of OpenAI's Responses API: what it answers is scripted, its wire is the real one."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.wire.answers import UNBOUND, answer_to, value_for
from tests.wire.machine import Job, Machine
from tests.wire.served import Events, Handler, Seen, WireServer

MODEL = "stand-in"
_FIELDS = frozenset({
    "background", "client_metadata", "context_management", "conversation", "include", "input", "instructions",
    "max_output_tokens", "max_tool_calls", "metadata", "model", "parallel_tool_calls", "previous_response_id",
    "prompt", "prompt_cache_key", "prompt_cache_retention", "reasoning", "safety_identifier", "service_tier",
    "store", "stream", "stream_options", "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p",
    "truncation", "user",
})  # fmt: skip
_ECHOED: dict[str, Any] = {
    "background": False, "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "previous_response_id": None, "prompt_cache_key": None, "safety_identifier": None,
    "service_tier": "default", "store": True, "temperature": 1.0, "tool_choice": "auto", "tools": [],
    "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled", "user": None,
}  # fmt: skip
_PARTS = {
    "user": ("input_text", "input_image", "input_file"),
    "system": ("input_text", "input_image", "input_file"),
    "developer": ("input_text", "input_image", "input_file"),
    "assistant": ("output_text", "refusal"),
}


@dataclass(frozen=True)
class Turn:
    """What the model says in one answer, and how that goes."""

    thought: str = ""
    text: str = ""
    refusal: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    """Names and arguments."""
    cut: str | None = None
    """Why it is incomplete."""
    status: int = 200
    error: dict[str, Any] | None = None
    """Of another status than 200; else what the answer fails with after all it says."""
    breaks: str = ""
    """Instead of the last event: ``error`` for such an event, ``connection`` for nothing."""
    headers: dict[str, str] = field(default_factory=dict)


Script = Callable[[dict[str, Any]], Turn]


def usual_turn(body: dict[str, Any]) -> Turn:
    """Return a call of the first tool, once; else what a schema asks for, or a story."""
    form, bound, items = (body.get("text") or {}).get("format") or {}, body.get("max_output_tokens"), body["input"]
    thought = "let me see" if (body.get("reasoning") or {}).get("effort") not in (None, "none") else ""
    if form.get("type") == "json_schema":
        return Turn(thought, json.dumps(value_for(form["schema"])))
    if form.get("type") == "json_object":
        return Turn(thought, '{"setup": "why", "punchline": "because"}')
    answered = isinstance(items, list) and items[-1].get("type") == "function_call_output"
    if (functions := _callable(body)) and not answered:
        arguments = value_for(functions[0].get("parameters") or {"type": "object"})
        if isinstance(arguments.get("input"), int) and (numbers := re.findall(r"\d+", json.dumps(items))):
            arguments["input"] = int(numbers[-1])
        return Turn(thought, calls=((functions[0]["name"], json.dumps(arguments)),))
    story, _ = answer_to({}, bound)
    return Turn(thought, story, cut="max_output_tokens" if bound and bound < UNBOUND else None)


def _callable(body: dict[str, Any]) -> list[dict[str, Any]]:
    choice, tools = body.get("tool_choice"), [tool for tool in body.get("tools") or () if tool["type"] == "function"]
    if choice == "none":
        return []
    name = choice.get("name") if isinstance(choice, dict) else None
    return [tool for tool in tools if name in (None, tool["name"])]


class Refused(Exception):
    """A request that the API does not take."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class ResponsesServer(WireServer):
    """OpenAI's Responses API, from outside.

    Args:
        script: What the model says.
        key: What a request must bring along.
        machine: Takes turns and remembers prompts.
    """

    def __init__(
        self, script: Script = usual_turn, *, key: str | None = None, machine: Machine | None = None
    ) -> None:
        super().__init__(machine)
        self.script, self.key = script, key
        self.stored: dict[str, list[dict[str, Any]]] = {}
        """The conversations up to the answers that are kept."""

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("POST", "/v1/responses"): self._create, ("GET", "/v1/models"): self._models}

    def refusal(self, seen: Seen) -> Response | None:
        if self.key is None or seen.key == self.key:
            return None
        error = {"message": "Incorrect API key provided.", "type": "invalid_request_error", "param": None}
        return JSONResponse({"error": {**error, "code": "invalid_api_key"}}, 401)

    def bodies(self) -> list[dict[str, Any]]:
        """Return what was asked so far, without requests that only ask whether this wire is spoken."""
        return [seen.body for seen in self.asked("/v1/responses") if seen.body]

    async def _models(self, seen: Seen) -> Response:
        card = {"id": MODEL, "object": "model", "created": 1_795_000_000, "owned_by": "stand-in"}
        return JSONResponse({"object": "list", "data": [card]})

    async def _create(self, seen: Seen) -> Any:
        try:
            body = _checked(seen)
            conversation = self._conversation(body)
        except Refused as refused:
            return JSONResponse(refused.body, refused.status)
        turn = self.script({**body, "input": conversation})
        if turn.status != 200:
            return JSONResponse({"error": turn.error}, turn.status, turn.headers)
        answer = _Answer(body, turn)
        job = Job(answer.id, {"messages": [*map(_message, conversation)], "tools": body.get("tools")})
        if not body.get("stream"):
            async with self.machine.turn(job):
                return JSONResponse(self._kept(body, conversation, answer.whole(job)))
        return Events(self._stream(body, conversation, answer, job))

    def _conversation(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        asked = body["input"]
        items = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        if (previous := body.get("previous_response_id")) is None:
            return items
        if previous not in self.stored:
            message = f"Previous response with id '{previous}' not found."
            raise Refused(400, message, "previous_response_id", "previous_response_not_found")
        return [*self.stored[previous], *items]

    def _kept(self, body: dict[str, Any], items: list[dict[str, Any]], whole: dict[str, Any]) -> dict[str, Any]:
        if body.get("store") is not False:
            self.stored[whole["id"]] = [*items, *whole["output"]]
        return whole

    async def _stream(
        self, body: dict[str, Any], items: list[dict[str, Any]], answer: _Answer, job: Job
    ) -> AsyncIterator[str]:
        numbers = itertools.count()

        def written(event: dict[str, Any]) -> str:
            data = json.dumps({**event, "sequence_number": next(numbers)}, separators=(",", ":"), ensure_ascii=False)
            return f"event: {event['type']}\ndata: {data}\n\n"

        for kind in ("response.created", "response.in_progress"):
            yield written({"type": kind, "response": answer.begun()})
        async with self.machine.turn(job):
            for event in answer.events():
                if event["type"].endswith(".delta"):
                    await asyncio.sleep(self.machine.token_s)
                yield written(event)
        if answer.turn.breaks == "error":
            yield written({"type": "error", "param": None, **(answer.turn.error or {})})
        elif not answer.turn.breaks:
            whole = self._kept(body, items, answer.whole(job))
            yield written({"type": f"response.{whole['status']}", "response": whole})


def _message(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item as text with a role, for the cache."""
    kind = item.get("type") or "message"
    if kind == "message":
        content = item["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        return {"role": item["role"], "content": "".join(part.get("text") or part["type"] for part in parts)}
    return {
        "role": kind,
        "content": json.dumps({key: item[key] for key in sorted(item) if key not in ("id", "status")}),
    }


class _Answer:
    def __init__(self, body: dict[str, Any], turn: Turn) -> None:
        self.id = f"resp_{secrets.token_hex(24)}"
        self.turn = turn
        self._body = body
        self._created = int(time.time())
        reasoning = body.get("reasoning") or {}
        self._summarized = bool(reasoning.get("summary"))
        self._items = [*self._made()]

    def _made(self) -> Iterator[dict[str, Any]]:
        turn = self.turn
        if turn.thought:
            said = {"id": f"rs_{secrets.token_hex(24)}", "type": "reasoning", "summary": []}
            if self._summarized:
                yield {**said, "summary": [{"type": "summary_text", "text": turn.thought}]}
            else:
                yield {**said, "content": [{"type": "reasoning_text", "text": turn.thought}]}
        parts: list[dict[str, Any]] = []
        if turn.text:
            parts.append({"type": "output_text", "text": turn.text, "annotations": [], "logprobs": []})
        if turn.refusal:
            parts.append({"type": "refusal", "refusal": turn.refusal})
        if parts:
            message = {"type": "message", "role": "assistant", "status": "completed", "content": parts}
            yield {"id": f"msg_{secrets.token_hex(24)}", **message}
        for name, arguments in turn.calls:
            call = {"type": "function_call", "status": "completed", "name": name, "arguments": arguments}
            yield {"id": f"fc_{secrets.token_hex(24)}", "call_id": f"call_{secrets.token_hex(12)}", **call}

    def begun(self) -> dict[str, Any]:
        echoed = {key: self._body.get(key, default) for key, default in _ECHOED.items()}
        text, reasoning = self._body.get("text") or {}, self._body.get("reasoning") or {}
        return {
            "id": self.id, "object": "response", "created_at": self._created, "status": "in_progress",
            "error": None, "incomplete_details": None, "model": self._body["model"], "output": [], **echoed,
            "reasoning": {"effort": None, "summary": None, **reasoning},
            "text": {"format": {"type": "text"}, "verbosity": "medium", **text}, "usage": None,
        }  # fmt: skip

    def whole(self, job: Job) -> dict[str, Any]:
        turn = self.turn
        thought = len(turn.thought.split())
        said = (
            sum(len(text.split()) for text in (turn.text, turn.refusal, *(args for _, args in turn.calls))) + thought
        )
        usage = {
            "input_tokens": len(job.tokens),
            "input_tokens_details": {"cached_tokens": job.cached, "cache_write_tokens": 0},
            "output_tokens": said,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": len(job.tokens) + said,
        }
        whole = {**self.begun(), "output": self._items, "usage": usage}
        if turn.error is not None:
            return {**whole, "status": "failed", "error": turn.error, "usage": None}
        if turn.cut is not None:
            items = [*self._items[:-1], {**self._items[-1], "status": "incomplete"}]
            return {**whole, "status": "incomplete", "incomplete_details": {"reason": turn.cut}, "output": items}
        return {**whole, "status": "completed", "completed_at": int(time.time())}

    def events(self) -> Iterator[dict[str, Any]]:
        for at, item in enumerate(self._items):
            empty = {key: [] for key in ("content", "summary") if key in item} | (
                {"arguments": ""} if "arguments" in item else {}
            )
            yield {
                "type": "response.output_item.added", "output_index": at,
                "item": {**item, **empty, "status": "in_progress"},
            }  # fmt: skip
            place = {"item_id": item["id"], "output_index": at}
            if item["type"] == "function_call":
                for piece in pieces(item["arguments"]):
                    yield {"type": "response.function_call_arguments.delta", **place, "delta": piece}
                done = {"arguments": item["arguments"]}
                yield {"type": "response.function_call_arguments.done", **place, **done}
            for index, part in enumerate(item.get("content") or ()):
                yield from _part_events(part, "response.content_part", {**place, "content_index": index})
            for index, part in enumerate(item.get("summary") or ()):
                yield from _part_events(part, "response.reasoning_summary_part", {**place, "summary_index": index})
            yield {"type": "response.output_item.done", "output_index": at, "item": item}


def _part_events(part: dict[str, Any], name: str, place: dict[str, Any]) -> Iterator[dict[str, Any]]:
    kind = part["type"]
    key, said = ("refusal", "refusal") if kind == "refusal" else ("text", kind)
    said = "reasoning_summary_text" if kind == "summary_text" else said
    extra = {"logprobs": []} if kind == "output_text" else {}
    yield {"type": f"{name}.added", **place, "part": {**part, key: ""}}
    for piece in pieces(part[key]):
        yield {"type": f"response.{said}.delta", **place, "delta": piece, **extra}
    yield {"type": f"response.{said}.done", **place, key: part[key], **extra}
    yield {"type": f"{name}.done", **place, "part": part}


def pieces(text: str) -> list[str]:
    """Return a text as it is streamed."""
    return re.findall(r"\s*\S+|\s+", text)


# What the API takes


def _checked(seen: Seen) -> dict[str, Any]:
    try:
        body = seen.body
    except ValueError as error:
        raise Refused(400, "We could not parse the JSON body of your request.") from error
    for key in body:
        if key not in _FIELDS:
            raise Refused(400, f"Unknown parameter: '{key}'.", key, "unknown_parameter")
    if body.get("model") != MODEL:
        raise Refused(400, f"The requested model '{body.get('model')}' does not exist.", "model", "model_not_found")
    if not isinstance(body.get("input"), str | list):
        raise Refused(400, "Missing required parameter: 'input'.", "input", "missing_required_parameter")
    for at, item in enumerate(body["input"] if isinstance(body["input"], list) else ()):
        _check_item(item, f"input[{at}]")
    for at, tool in enumerate(body.get("tools") or ()):
        if tool.get("type") == "function" and not tool.get("name"):
            where = f"tools[{at}].name"
            raise Refused(400, f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
    form = (body.get("text") or {}).get("format") or {}
    if form.get("type") == "json_schema" and not (form.get("name") and form.get("schema")):
        raise Refused(400, "Missing required parameter: 'text.format.name'.", "text.format.name")
    return dict(body)


_NEEDED: dict[str, tuple[str, ...]] = {
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": ("id", "summary"),
}


def _check_item(item: dict[str, Any], where: str) -> None:
    kind = item.get("type") or "message"
    if kind == "message":
        allowed = _PARTS.get(item.get("role", ""))
        if allowed is None:
            raise Refused(400, f"Invalid value: '{item.get('role')}'.", f"{where}.role", "invalid_value")
        for at, part in enumerate(item["content"] if isinstance(item["content"], list) else ()):
            if part.get("type") not in allowed:
                path = f"{where}.content[{at}].type"
                raise Refused(400, f"Invalid value: '{part.get('type')}'.", path, "invalid_value")
        return
    if kind not in _NEEDED:
        raise Refused(400, f"Invalid value: '{kind}'.", f"{where}.type", "invalid_value")
    for key in _NEEDED[kind]:
        if key not in item:
            path = f"{where}.{key}"
            raise Refused(400, f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
