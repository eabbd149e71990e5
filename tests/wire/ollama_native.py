"""Ollama's own API of the stand-in, line by line as its server (``server/routes.go``) writes it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import secrets
import time
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.wire.machine import Job, Machine

NDJSON = "application/x-ndjson"
MID_STREAM = "an error was encountered while running the model"
DIMENSIONS = 8


@dataclass(frozen=True)
class Said:
    """What the model of a stand-in says."""

    text: str = ""
    thinking: str = ""
    calls: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """Name and arguments of each."""

    @property
    def written(self) -> str:
        """What the model writes after its thinking; calls are written as their arguments."""
        return " ".join(json.dumps(arguments) for _, arguments in self.calls) if self.calls else self.text


Script = Callable[[dict[str, Any]], Said]
"""The model: what it says to a request, which it gets in chat completions' form."""


@dataclass
class Turn:
    """One request on its way through the engine, and what came of it."""

    model: str
    job: Job
    said: Said
    began_ns: int = field(default_factory=time.monotonic_ns)

    def top(self) -> dict[str, Any]:
        return {"model": self.model, "created_at": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"}

    def figures(self, cached_counts: bool) -> dict[str, Any]:
        """Return the end of an answer; Go leaves zeros out."""
        job, took = self.job, time.monotonic_ns() - self.began_ns
        figures = {
            "total_duration": took, "load_duration": took // 10, "prompt_eval_count": len(job.tokens),
            "prompt_eval_duration": took // 4, "eval_count": job.made, "eval_duration": took // 2,
        }  # fmt: skip
        cached = {"prompt_eval_cached_count": job.cached} if cached_counts else {}
        return {"done": True, "done_reason": job.finish, **{k: v for k, v in figures.items() if v}, **cached}


class NativeApi:
    """``/api/chat`` and its like.

    Args:
        machine: The engine's inside.
        script: The model.
        cached_counts: It says how much of a prompt was cached.
        thinks: Its models can think.
    """

    def __init__(self, machine: Machine, script: Script, *, cached_counts: bool, thinks: bool) -> None:
        self.machine, self.script, self.cached_counts, self.thinks = machine, script, cached_counts, thinks
        self.fails_after: int | None = None
        """After so many lines a stream brings an error."""

    def refused(self, body: dict[str, Any], *, tools: bool) -> Response | None:
        """Return the answer to a request that Go or the server does not take."""
        if (wrong := _go_says(body)) is not None:
            return JSONResponse({"error": wrong}, 400)
        model = body["model"]
        if body.get("tools") and not tools:
            return JSONResponse({"error": f"registry.ollama.ai/library/{model} does not support tools"}, 400)
        if body.get("think") and not self.thinks:
            return JSONResponse({"error": f'"{model}" does not support thinking'}, 400)
        return None

    async def chat(self, body: dict[str, Any]) -> Any:
        """Answer ``/api/chat``."""
        messages = [_for_model(message) for message in body["messages"]]
        turn = self._turn(body, {"messages": messages, "tools": body.get("tools")})
        if body.get("stream") is False:
            return await self._whole(turn, _message)
        return self._lines(turn, _message)

    async def generate(self, body: dict[str, Any]) -> Any:
        """Answer ``/api/generate`` with a prompt."""
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        turn = self._turn(body, {"messages": [*system, {"role": "user", "content": body["prompt"]}]})
        if body.get("stream") is False:
            return await self._whole(turn, _response)
        return self._lines(turn, _response)

    def _turn(self, body: dict[str, Any], asked: dict[str, Any]) -> Turn:
        form, most = body.get("format"), (body.get("options") or {}).get("num_predict", -1)
        if isinstance(form, dict):
            asked["response_format"] = {"type": "json_schema", "json_schema": {"schema": form}}
        elif form == "json":
            asked["response_format"] = {"type": "json_object"}
        asked["max_tokens"] = most if most >= 0 else None
        if (think := body.get("think")) is not None:
            asked["reasoning_effort"] = {False: "none", True: "medium"}.get(think, think)
        job = Job(secrets.token_hex(4), {**asked, "model": body["model"]}, allowed=asked["max_tokens"])
        return Turn(body["model"], job, self.script(job.body))

    async def _pieces(self, turn: Turn) -> AsyncIterator[tuple[str, str]]:
        """Yield text and thinking, piece after piece."""
        if turn.said.thinking:
            async for piece in self.machine.pieces(turn.job, turn.said.thinking):
                yield "", piece
        async for piece in self.machine.pieces(turn.job, turn.said.written):
            yield ("" if turn.said.calls else piece), ""

    async def _whole(self, turn: Turn, says: Any) -> Response:
        async with self.machine.turn(turn.job):
            pieces = [piece async for piece in self._pieces(turn)]
            if self.fails_after is not None:
                return JSONResponse({"error": MID_STREAM}, 500)
            text, thinking = ("".join(part) for part in zip(*pieces, strict=True))
            said = says(turn.said.text if turn.said.calls else text, thinking, _calls(turn.said))
            return JSONResponse({**turn.top(), **said, **self._end(turn, says)})

    def _lines(self, turn: Turn, says: Any) -> Any:
        return _Lines(self._stream(turn, says), self.fails_after)

    async def _stream(self, turn: Turn, says: Any) -> AsyncIterator[dict[str, Any]]:
        async with self.machine.turn(turn.job):
            async for text, thinking in self._pieces(turn):
                if text or thinking:  # else the parser of calls holds it back
                    yield {**turn.top(), **says(text, thinking, []), "done": False}
            if calls := _calls(turn.said):
                yield {**turn.top(), **says(turn.said.text, "", calls), "done": False}
            yield {**turn.top(), **says("", "", []), **self._end(turn, says)}

    def _end(self, turn: Turn, says: Any) -> dict[str, Any]:
        figures = turn.figures(self.cached_counts)
        if says is _response:
            head = {name: figures.pop(name) for name in ("done", "done_reason")}
            return {**head, "context": turn.job.tokens, **figures}
        return figures

    def embed(self, body: dict[str, Any]) -> Response:
        """Answer ``/api/embed``."""
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        counts = {"total_duration": 14143917, "load_duration": 1019500, "prompt_eval_count": _words(texts)}
        return JSONResponse({"model": body["model"], "embeddings": [vector_of(each) for each in texts], **counts})

    def embeddings(self, body: dict[str, Any]) -> Response:
        """Answer ``/api/embeddings``."""
        return JSONResponse({"embedding": [3 * each for each in vector_of(body["prompt"])]})


class _Lines:
    """JSON lines; an error before the first has a status of its own, a later one is a line."""

    def __init__(self, lines: AsyncIterator[dict[str, Any]], fails_after: int | None) -> None:
        self.lines, self.fails_after = lines, fails_after

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.fails_after == 0:
            await JSONResponse({"error": MID_STREAM}, 500)(scope, receive, send)
            return
        headers = [(b"content-type", NDJSON.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sent = 0
        async for line in self.lines:
            if sent == self.fails_after:
                line = {"error": MID_STREAM}
            data = json.dumps(line, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})
            if sent == self.fails_after:
                break
            sent += 1
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})


def _message(text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text}
    message |= {"thinking": thinking} if thinking else {}
    return {"message": message | ({"tool_calls": calls} if calls else {})}


def _response(text: str, thinking: str, calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"response": text, **({"thinking": thinking} if thinking else {})}


def _calls(said: Said) -> list[dict[str, Any]]:
    return [
        {"id": f"call_{secrets.token_hex(4)}", "function": {"index": n, "name": name, "arguments": dict(arguments)}}
        for n, (name, arguments) in enumerate(said.calls)
    ]


def _for_model(message: dict[str, Any]) -> dict[str, Any]:
    return {"role": message["role"].lower(), "content": message.get("content") or ""}


def vector_of(text: str) -> list[float]:
    """Return a vector of length 1."""
    raw = [zlib.crc32(f"{n} {text}".encode()) / 2**32 - 0.5 for n in range(DIMENSIONS)]
    return [each / math.hypot(*raw) for each in raw]


def _words(texts: list[str]) -> int:
    return sum(len(text.split()) for text in texts)


def _go_says(body: dict[str, Any]) -> str | None:
    """Return what Go's decoder finds wrong with a request."""
    for message in body.get("messages") or []:
        if not isinstance(message.get("content") or "", str):
            kind = "array" if isinstance(message["content"], list) else type(message["content"]).__name__
            return f"json: cannot unmarshal {kind} into Go struct field ChatRequest.messages.content of type string"
        for call in message.get("tool_calls") or []:
            if not isinstance(call["function"].get("arguments"), dict):
                return "json: cannot unmarshal into Go struct field ChatRequest.messages.tool_calls of type object"
    holders = [body, *(body.get("messages") or [])]
    for image in [image for holder in holders for image in holder.get("images") or []]:
        try:
            base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            return "illegal base64 data at input byte 0"
    think = body.get("think")
    if not (think is None or isinstance(think, bool) or think in ("high", "medium", "low", "max")):
        return f'invalid think value: {think!r} (must be "high", "medium", "low", "max", true, or false)'
    return None
