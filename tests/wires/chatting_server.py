"""The scripted model of ``responses_server`` behind chat completions: for what must mean the same on both wires."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.wire.machine import Job, Machine
from tests.wire.served import Events, Handler, Seen, WireServer, event
from tests.wires.responses_server import MODEL, Script, Turn, pieces, usual_turn

REASONS = {None: "stop", "max_output_tokens": "length", "content_filter": "content_filter"}


class ChattingServer(WireServer):
    """An engine that speaks chat completions, and nothing else.

    Args:
        script: What the model says; it is asked as by the Responses API.
        machine: Takes turns and remembers prompts.
    """

    def __init__(self, script: Script = usual_turn, *, machine: Machine | None = None) -> None:
        super().__init__(machine)
        self.script = script

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        return {("POST", "/v1/chat/completions"): self._create, ("GET", "/v1/models"): self._models}

    def bodies(self) -> list[dict[str, Any]]:
        """Return what was asked so far."""
        return [seen.body for seen in self.asked("/v1/chat/completions")]

    async def _models(self, seen: Seen) -> Response:
        card = {"id": MODEL, "object": "model", "created": 1_795_000_000, "owned_by": "stand-in"}
        return JSONResponse({"object": "list", "data": [card]})

    async def _create(self, seen: Seen) -> Any:
        body = seen.body
        if body.get("model") != MODEL or not isinstance(body.get("messages"), list):
            error = {"message": "a model and messages are needed", "type": "BadRequestError", "code": 400}
            return JSONResponse({"error": error}, 400)
        turn = self.script(asked_of(body))
        if turn.status != 200:
            return JSONResponse({"error": turn.error}, turn.status, turn.headers)
        job = Job(f"chatcmpl-{secrets.token_hex(8)}", body)
        if body.get("stream"):
            return Events(self._stream(turn, job))
        async with self.machine.turn(job):
            message = {"role": "assistant", "content": turn.text or None, "reasoning_content": turn.thought or None}
            message |= {"refusal": turn.refusal or None, "tool_calls": [*_calls(turn)] or None}
            choice = {"index": 0, "message": message, "finish_reason": _reason(turn), "logprobs": None}
            whole = {**_top(job, "chat.completion"), "choices": [choice], "usage": _usage(turn, job)}
            return JSONResponse(whole)

    async def _stream(self, turn: Turn, job: Job) -> AsyncIterator[str]:
        top = _top(job, "chat.completion.chunk")
        async with self.machine.turn(job):
            for delta in ({"role": "assistant", "content": ""}, *_deltas(turn)):
                await asyncio.sleep(self.machine.token_s)
                yield event({**top, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        if turn.breaks == "connection":
            return
        if turn.error is not None:
            yield event({"error": turn.error})
        else:
            yield event({**top, "choices": [{"index": 0, "delta": {}, "finish_reason": _reason(turn)}]})
            if (job.body.get("stream_options") or {}).get("include_usage"):
                yield event({**top, "choices": [], "usage": _usage(turn, job)})
        yield event("[DONE]")


def asked_of(body: dict[str, Any]) -> dict[str, Any]:
    """Return a request as a script reads it."""
    items: list[dict[str, Any]] = []
    for message in body["messages"]:
        if message["role"] == "tool":
            items.append({"type": "function_call_output", "output": message["content"]})
            continue
        items.append({"role": message["role"], "content": message.get("content")})
        for call in message.get("tool_calls") or ():
            items.append({"type": "function_call", **call["function"], "call_id": call["id"]})
    form = body.get("response_format") or {}
    choice = body.get("tool_choice")
    bound = body.get("max_completion_tokens", body.get("max_tokens"))
    return {
        "input": items,
        "tools": [{"type": "function", **tool["function"]} for tool in body.get("tools") or ()],
        "tool_choice": choice["function"] if isinstance(choice, dict) else choice,
        "text": {"format": {**form.get("json_schema", {}), "type": form["type"]} if form else None},
        "max_output_tokens": bound,
        "reasoning": {"effort": body.get("reasoning_effort")},
    }


def _top(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.name, "object": kind, "created": int(time.time()), "model": job.body["model"]}


def _reason(turn: Turn) -> str:
    return "tool_calls" if turn.calls and turn.cut is None else REASONS[turn.cut]


def _calls(turn: Turn) -> Iterator[dict[str, Any]]:
    for name, arguments in turn.calls:
        function = {"name": name, "arguments": arguments}
        yield {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _deltas(turn: Turn) -> Iterator[dict[str, Any]]:
    for key, text in (("reasoning_content", turn.thought), ("content", turn.text), ("refusal", turn.refusal)):
        yield from ({key: piece} for piece in pieces(text))
    for index, call in enumerate(_calls(turn)):
        function = call["function"]
        yield {"tool_calls": [{**call, "index": index, "function": {**function, "arguments": ""}}]}
        for piece in pieces(function["arguments"]):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def _usage(turn: Turn, job: Job) -> dict[str, Any]:
    thought = len(turn.thought.split())
    said = sum(len(text.split()) for text in (turn.text, turn.refusal, *(args for _, args in turn.calls)))
    return {
        "prompt_tokens": len(job.tokens),
        "completion_tokens": said + thought,
        "total_tokens": len(job.tokens) + said + thought,
        "prompt_tokens_details": {"cached_tokens": job.cached},
        "completion_tokens_details": {"reasoning_tokens": thought},
    }
