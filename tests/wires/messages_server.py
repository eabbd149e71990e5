"""A stand-in for a server that speaks Anthropic's Messages, and chat completions beside it, with the same answers.

Field by field as the API's documents and the SDK's types describe it. What it answers is a script's to say, else a
story, a call of the first tool, or what a schema asks for.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.wire.answers import answer_to
from tests.wire.machine import Job, Machine, tokens_of
from tests.wire.served import Events, Handler, Seen, WireServer, event

MODEL = "stand-in"
BOTH = frozenset({"chat", "messages"})
MANY_TOKENS = 10**6
_FINISH = {"end_turn": "stop", "max_tokens": "length", "stop_sequence": "stop", "tool_use": "tool_calls"}


def text(said: str) -> dict[str, Any]:
    """Return a block of text."""
    return {"type": "text", "text": said}


def thinking(thought: str) -> dict[str, Any]:
    """Return a block of what a model thought."""
    return {"type": "thinking", "thinking": thought, "signature": ""}


def tool_use(name: str, called: str = "", /, **given: Any) -> dict[str, Any]:
    """Return a block that calls a tool."""
    return {"type": "tool_use", "id": called or f"toolu_{secrets.token_hex(8)}", "name": name, "input": given}


@dataclass(frozen=True)
class Answer:
    """What a script answers."""

    content: tuple[dict[str, Any], ...] = ()
    stop_reason: str | None = None
    """``None`` follows from the content."""
    stop_sequence: str | None = None
    error: tuple[int, str, str] | None = None
    """Status, type and message of an error, instead of an answer."""
    breaks_after: int | None = None
    """So many events of a stream come before the error does; its status then stays 200."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """With an error."""


Script = Callable[[dict[str, Any]], Answer | None]
"""Gets the request as it came, on either wire; ``None`` leaves the answer to the stand-in."""


class MessagesServer(WireServer):
    """An engine that speaks Messages.

    Args:
        script: What it answers.
        speaks: On which wires; another's path is not found.
        key: What it wants to be shown.
        name: Of each answer; a new one for each by default.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        speaks: frozenset[str] = BOTH,
        key: str | None = None,
        name: str | None = None,
        machine: Machine | None = None,
    ) -> None:
        super().__init__(machine or Machine(token_s=0.0))
        self.script, self.speaks, self.key, self.name = script, speaks, key, name

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        routes: dict[tuple[str, str], Handler] = {("GET", "/v1/models"): self._models}
        if "messages" in self.speaks:
            routes[("POST", "/v1/messages")] = self._messages
            routes[("POST", "/v1/messages/count_tokens")] = self._count_tokens
        if "chat" in self.speaks:
            routes[("POST", "/v1/chat/completions")] = self._chat
        return routes

    def refusal(self, seen: Seen) -> Response | None:
        if self.key is None or self.key in (seen.key, seen.headers.get("x-api-key")):
            return None
        if "/messages" in seen.path:
            return _error(401, "authentication_error", "invalid x-api-key")
        return JSONResponse({"error": {"message": "Invalid API Key", "type": "authentication_error"}}, 401)

    @property
    def served(self) -> list[Seen]:
        """The model calls that came with a prompt, in their order."""
        calls = ("/v1/messages", "/v1/chat/completions")
        return [seen for seen in self.requests if seen.path in calls and _json(seen).get("messages")]

    async def _models(self, seen: Seen) -> Response:
        card = {"id": MODEL, "object": "model", "created": 1_795_000_000, "owned_by": "stand-in"}
        return JSONResponse({"object": "list", "data": [card]})

    async def _count_tokens(self, seen: Seen) -> Response:
        return JSONResponse({"input_tokens": len(_tokens(seen.body))})

    # Messages

    async def _messages(self, seen: Seen) -> Any:
        body = _json(seen)
        if (refused := _refused(body, seen)) is not None:
            return refused
        answer = self._answer_to(body, _tool_of(body), bool(_results_in(body)))
        if answer.error and not (body.get("stream") and answer.breaks_after is not None):
            return _error(*answer.error, headers=answer.headers)
        job = Job(self.name or f"msg_{secrets.token_hex(12)}", body, allowed=body["max_tokens"], tokens=_tokens(body))
        if body.get("stream"):
            return Events(self._events(job, answer))
        async with self.machine.turn(job):
            content = [block async for block, piece, last in self._pieces(job, answer) if last]
            message = {**_message(job), "content": content, **_end(job, answer), "usage": _usage(job)}
            return JSONResponse(message, headers={"request-id": f"req_{job.name}"})

    async def _events(self, job: Job, answer: Answer) -> AsyncIterator[str]:
        sent = 0
        async with self.machine.turn(job):
            async for data in self._stream(job, answer):
                if answer.error and sent == answer.breaks_after:
                    _, kind, message = answer.error
                    data = {"type": "error", "error": {"type": kind, "message": message}}
                    yield f"event: error\n{event(data)}"
                    return
                yield f"event: {data['type']}\n{event(data)}"
                sent += 1

    async def _stream(self, job: Job, answer: Answer) -> AsyncIterator[dict[str, Any]]:
        nothing = {"content": [], "stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": {**_message(job), **nothing, "usage": _usage(job, made=1)}}
        index, begun = 0, False
        async for block, piece, last in self._pieces(job, answer):
            kind = block["type"]
            if not begun:
                begun = True
                empty = {"tool_use": {"input": {}}, "thinking": {"thinking": "", "signature": ""}}
                yield {
                    "type": "content_block_start",
                    "index": index,
                    "content_block": {**block, **empty.get(kind, {"text": ""})},
                }
                yield {"type": "ping"}
                if kind == "tool_use":
                    yield _delta(index, type="input_json_delta", partial_json="")
            if piece:
                name, key = {
                    "text": ("text_delta", "text"),
                    "thinking": ("thinking_delta", "thinking"),
                    "tool_use": ("input_json_delta", "partial_json"),
                }[kind]
                yield _delta(index, type=name, **{key: piece})
            if last:
                if kind == "thinking":
                    yield _delta(index, type="signature_delta", signature=block["signature"])
                yield {"type": "content_block_stop", "index": index}
                index, begun = index + 1, False
        yield {"type": "message_delta", "delta": _end(job, answer), "usage": _usage(job)}
        yield {"type": "message_stop"}

    # What is answered

    def _answer_to(self, body: dict[str, Any], tool: dict[str, Any] | None, has_results: bool) -> Answer:
        if self.script is not None and (answer := self.script(body)) is not None:
            return answer
        asked: dict[str, Any] = {}
        if (schema := _schema_of(body)) is not None:
            asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
        elif tool is not None and not has_results:
            asked = {"tools": [{"function": tool}]}
        said, function = answer_to(asked, None)
        return Answer((text(said) if function is None else tool_use(function, **json.loads(said)),))

    async def _pieces(self, job: Job, answer: Answer) -> AsyncIterator[tuple[dict[str, Any], str, bool]]:
        """Yield each block as far as it was made, its next piece, and whether that is its last."""
        for block in answer.content:
            if job.finish == "length":
                return
            kind = block["type"]
            whole = json.dumps(block["input"]) if kind == "tool_use" else block[kind]
            made = ""
            async for piece in self.machine.pieces(job, whole):
                made += piece
                yield block, piece, False
            yield (block if kind == "tool_use" else {**block, kind: made}), "", True

    # Chat completions

    async def _chat(self, seen: Seen) -> Any:
        body = _json(seen)
        if not body.get("messages"):
            return JSONResponse({"error": {"message": "messages", "type": "invalid_request_error", "code": 400}}, 400)
        tools = body.get("tools") if body.get("tool_choice") != "none" else None
        answer = self._answer_to(
            body, tools[0]["function"] if tools else None, body["messages"][-1]["role"] == "tool"
        )
        if answer.error and not (body.get("stream") and answer.breaks_after is not None):
            status, kind, message = answer.error
            failed = {"error": {"message": message, "type": kind, "param": None, "code": status}}
            return JSONResponse(failed, status, headers=dict(answer.headers))
        tokens = tokens_of(body["messages"], body.get("tools"))
        name = self.name or f"chatcmpl-{secrets.token_hex(8)}"
        job = Job(name, body, allowed=body.get("max_tokens"), tokens=tokens)
        if body.get("stream"):
            return Events(self._chunks(job, answer))
        async with self.machine.turn(job):
            content = [block async for block, piece, last in self._pieces(job, answer) if last]
            choice = {"index": 0, "message": _chat_message(content), **_chat_end(job, answer)}
            return JSONResponse({**_top(job, "chat.completion"), "choices": [choice], "usage": _chat_usage(job)})

    async def _chunks(self, job: Job, answer: Answer) -> AsyncIterator[str]:
        top, sent, calls, begun = _top(job, "chat.completion.chunk"), 0, -1, False
        async with self.machine.turn(job):
            yield event({**top, "choices": [_choice({"role": "assistant", "content": ""})]})
            async for block, piece, last in self._pieces(job, answer):
                if answer.error and sent == answer.breaks_after:
                    status, kind, message = answer.error
                    yield event({"error": {"message": message, "type": kind, "code": status}})
                    return
                sent += 1
                if block["type"] == "tool_use":
                    function: dict[str, Any] = {"arguments": piece}
                    call: dict[str, Any] = {"function": function}
                    if not begun:
                        calls, begun = calls + 1, True
                        call |= {"id": block["id"], "type": "function"}
                        function["name"] = block["name"]
                    yield event({**top, "choices": [_choice({"tool_calls": [{"index": calls, **call}]})]})
                elif piece:
                    key = "content" if block["type"] == "text" else "reasoning_content"
                    yield event({**top, "choices": [_choice({key: piece})]})
                begun = begun and not last
            yield event({**top, "choices": [_choice({}, **_chat_end(job, answer))]})
            if (job.body.get("stream_options") or {}).get("include_usage"):
                yield event({**top, "choices": [], "usage": _chat_usage(job)})
            yield event("[DONE]")


def _json(seen: Seen) -> dict[str, Any]:
    try:
        body = seen.body
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _refused(body: dict[str, Any], seen: Seen) -> Response | None:
    """Return the first objection."""
    if not seen.headers.get("anthropic-version"):
        return _error(400, "invalid_request_error", "anthropic-version: header is required")
    for name in ("model", "messages", "max_tokens"):
        if name not in body:
            return _error(400, "invalid_request_error", f"{name}: Field required")
    if body["model"] != MODEL:
        return _error(404, "not_found_error", f"model: {body['model']}")
    if not body["messages"]:
        return _error(400, "invalid_request_error", "messages: at least one message is required")
    called: set[str] = set()
    for number, message in enumerate(body["messages"]):
        blocks = message["content"] if isinstance(message["content"], list) else []
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        if called - results:
            why = f"messages.{number}: `tool_use` ids were found without `tool_result` blocks immediately after"
            return _error(400, "invalid_request_error", why)
        called = {block["id"] for block in blocks if block["type"] == "tool_use"}
    return None


def _tool_of(body: dict[str, Any]) -> dict[str, Any] | None:
    """Return the tool that is called unless a script says otherwise."""
    choice, tools = body.get("tool_choice") or {}, body.get("tools") or []
    if not tools or choice.get("type") == "none":
        return None
    tool = next((tool for tool in tools if tool["name"] == choice.get("name")), tools[0])
    return {"name": tool["name"], "parameters": tool.get("input_schema")}


def _results_in(body: dict[str, Any]) -> list[Any]:
    content = body["messages"][-1]["content"]
    return [block for block in content if block["type"] == "tool_result"] if isinstance(content, list) else []


def _schema_of(body: dict[str, Any]) -> dict[str, Any] | None:
    form = (body.get("output_config") or {}).get("format") or {}
    chat: dict[str, Any] = (body.get("response_format") or {}).get("json_schema") or {}
    return form.get("schema") or chat.get("schema")


def _tokens(body: dict[str, Any]) -> list[int]:
    system = body.get("system") or []
    first = [{"role": "system", "content": system}] if system else []
    return tokens_of([*first, *body["messages"]], body.get("tools")) or [0]


def _message(job: Job) -> dict[str, Any]:
    return {"id": job.name, "type": "message", "role": "assistant", "model": job.body["model"]}


def _delta(index: int, **delta: Any) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _end(job: Job, answer: Answer) -> dict[str, Any]:
    calls = any(block["type"] == "tool_use" for block in answer.content)
    usual = "max_tokens" if job.finish == "length" else "tool_use" if calls else "end_turn"
    return {"stop_reason": answer.stop_reason or usual, "stop_sequence": answer.stop_sequence}


def _usage(job: Job, made: int | None = None) -> dict[str, Any]:
    return {
        "input_tokens": len(job.tokens) - job.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": job.cached,
        "output_tokens": job.made if made is None else made,
    }


def _error(status: int, kind: str, message: str, headers: Mapping[str, str] | None = None) -> Response:
    request_id = f"req_{secrets.token_hex(12)}"
    body = {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    return JSONResponse(body, status, headers={"request-id": request_id, **(headers or {})})


def _top(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.name, "object": kind, "created": int(time.time()), "model": job.body.get("model", MODEL)}


def _choice(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": None, **more}


def _chat_message(content: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for block in content:
        if block["type"] == "tool_use":
            function = {"name": block["name"], "arguments": json.dumps(block["input"])}
            message.setdefault("tool_calls", []).append({"id": block["id"], "type": "function", "function": function})
        else:
            key = "content" if block["type"] == "text" else "reasoning_content"
            message[key] = (message.get(key) or "") + block[block["type"]]
    return message


def _chat_end(job: Job, answer: Answer) -> dict[str, Any]:
    end = _end(job, answer)
    return {"finish_reason": _FINISH.get(end["stop_reason"], "stop"), "stop_reason": end["stop_sequence"]}


def _chat_usage(job: Job) -> dict[str, Any]:
    prompt = len(job.tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": job.made,
        "total_tokens": prompt + job.made,
        "prompt_tokens_details": {"cached_tokens": job.cached},
    }
