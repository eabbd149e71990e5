"""A stand-in for Ollama's server, field by field as its documents and the Go types of version 0.33 describe it."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.wire.answers import answer_to
from tests.wire.machine import Job, Machine, tokens_of
from tests.wire.ollama_native import NativeApi, Said, Script, vector_of
from tests.wire.served import Events, Handler, Seen, WireServer, event

MODEL = "stand-in:latest"
STREAM = "text/event-stream"
DIGEST = "2ae6f6dd7a3dd734790bbbf58b8909a606e0e7e97e94b7604e0aa7ae4490e6d8"
DETAILS = {
    "parent_model": "", "format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "7.2B",
    "quantization_level": "Q4_0",
}  # fmt: skip


@dataclass(frozen=True)
class OllamaFlags:
    """How it was started, and what its model is."""

    version: str = "0.33.3"
    cached_counts: bool = True
    """From 0.33.3 on."""
    loaded: bool = True
    """Before anybody asks."""
    keep_alive_s: float = 300.0
    context_length: int = 4096
    context_shift: bool = False
    """The model can shift its context: a prompt too long is cut without a word."""
    capabilities: tuple[str, ...] | None = ("completion", "tools")
    """``None`` as in versions that do not tell."""
    parameters: str = ""
    max_queue: int = 512
    load_s: float = 0.01
    names: tuple[str, ...] = (MODEL, "other:7b")
    wires: tuple[str, ...] = ()
    """Beside chat completions; none, as in versions before they came."""
    native: bool = True
    """It has an API of its own; else it is some other server that speaks chat completions alone."""


class OllamaServer(WireServer):
    """Ollama, from outside.

    Args:
        flags: How it was started.
        machine: Its inside.
        script: Its model; without one, a story, or what tools and schemas ask for.
    """

    def __init__(
        self, flags: OllamaFlags | None = None, machine: Machine | None = None, script: Script | None = None
    ) -> None:
        super().__init__(machine or Machine(running=1, block=1, blocks=4096))  # OLLAMA_NUM_PARALLEL
        self.flags = flags or OllamaFlags()
        self.script = script
        cached, can = self.flags.cached_counts, self.flags.capabilities or ()
        self.api = NativeApi(self.machine, self._said, cached_counts=cached, thinks="thinking" in can)
        self.expires_s: float | None = None
        """When the model leaves, as ``time.monotonic``; ``None`` while it is not loaded."""
        self.loads = 0
        self.stay_s = self.flags.keep_alive_s
        """The loaded model's own: what it was last told, until it is loaded anew."""
        if self.flags.loaded:
            self._stay()

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        openai: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/v1/embeddings"): self._embeddings,
        }
        if not self.flags.native:
            return openai
        return {
            **self.asked_for_nothing(*self.flags.wires),
            ("GET", "/"): self._running,
            ("GET", "/api/version"): self._version,
            ("GET", "/api/tags"): self._tags,
            ("GET", "/api/ps"): self._ps,
            ("POST", "/api/show"): self._show,
            ("POST", "/api/chat"): self._native_chat,
            ("POST", "/api/generate"): self._generate,
            ("POST", "/api/embed"): self._native_embed,
            ("POST", "/api/embeddings"): self._native_embed,
            **openai,
        }

    def unknown(self, seen: Seen, known_path: bool) -> Response:
        return Response("404 page not found", 404, media_type="text/plain")

    # Models come and go

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory; it does not leave while somebody uses it."""
        busy = bool(self.machine.running or self.machine.waiting)
        if self.expires_s is not None and self.expires_s <= time.monotonic() and not busy:
            self.expires_s = None
            self.machine.forget()
        return self.expires_s is not None

    def _stay(self) -> None:
        self.expires_s = time.monotonic() + (self.stay_s if self.stay_s >= 0 else 10.0**9)

    async def _load(self, keep_alive: Any = None) -> None:
        if not self.loaded:
            self.loads += 1
            self.stay_s = self.flags.keep_alive_s
            await asyncio.sleep(self.flags.load_s)
        if keep_alive is not None:
            self.stay_s = _seconds(keep_alive)
        self._stay()

    # What it says of itself

    async def _running(self, seen: Seen) -> Response:
        return Response("Ollama is running", media_type="text/plain")

    async def _version(self, seen: Seen) -> Response:
        return JSONResponse({"version": self.flags.version})

    async def _models(self, seen: Seen) -> Response:
        each = ({"id": name, "object": "model", "created": 1_717_000_000} for name in self.flags.names)
        return JSONResponse({"object": "list", "data": [card | {"owned_by": "library"} for card in each]})

    async def _tags(self, seen: Seen) -> Response:
        entry = {"modified_at": "2026-06-04T14:38:31.83753-07:00", "size": 5137025024, "digest": DIGEST}
        models = [{"name": name, "model": name, **entry, "details": DETAILS} for name in self.flags.names]
        return JSONResponse({"models": models})

    async def _ps(self, seen: Seen) -> Response:
        if not self.loaded:
            return JSONResponse({"models": []})
        assert self.expires_s is not None
        expires = datetime.now(UTC) + timedelta(seconds=min(self.expires_s - time.monotonic(), 10.0**9))
        entry = {
            "name": MODEL, "model": MODEL, "size": 5137025024, "digest": DIGEST, "details": DETAILS,
            "expires_at": expires.isoformat(), "size_vram": 5137025024, "context_length": self.flags.context_length,
        }  # fmt: skip
        return JSONResponse({"models": [entry]})

    async def _show(self, seen: Seen) -> Response:
        name, flags = seen.body.get("model") or seen.body.get("name"), self.flags
        if not name:
            return JSONResponse({"error": "model is required"}, 400)
        if not self._knows(name):
            return JSONResponse({"error": f"model '{name}' not found"}, 404)
        info = {"general.architecture": "llama", "llama.context_length": 131072}
        told: dict[str, Any] = {"details": DETAILS, "model_info": info}
        told |= {"parameters": flags.parameters} if flags.parameters else {}
        told |= {"capabilities": list(flags.capabilities)} if flags.capabilities is not None else {}
        return JSONResponse(told)

    def _knows(self, name: str) -> bool:
        return name in self.flags.names or f"{name}:latest" in self.flags.names

    # What it can be told

    async def _generate(self, seen: Seen) -> Response:
        body = seen.body
        if not self._knows(body.get("model", "")):
            return JSONResponse({"error": f"model '{body.get('model')}' not found"}, 404)
        if body.get("prompt"):
            return await self._natively(body, self.api.generate)
        done = {"model": body["model"], "created_at": datetime.now(UTC).isoformat(), "response": "", "done": True}
        if body.get("keep_alive") == 0:
            if self.expires_s is not None:
                self.expires_s = time.monotonic()
            return JSONResponse(done | {"done_reason": "unload"})
        await self._load(body.get("keep_alive"))
        return JSONResponse(done | {"done_reason": "load"})

    # Its own API

    async def _native_chat(self, seen: Seen) -> Any:
        body = seen.body
        if not self._knows(body.get("model", "")):
            return JSONResponse({"error": f"model '{body.get('model')}' not found"}, 404)
        if body.get("messages"):
            return await self._natively(body, self.api.chat)
        await self._load(body.get("keep_alive"))
        done = {"model": body["model"], "created_at": datetime.now(UTC).isoformat(), "done": True}
        return JSONResponse(done | {"message": {"role": "assistant", "content": ""}, "done_reason": "load"})

    async def _natively(self, body: dict[str, Any], answer: Callable[[dict[str, Any]], Awaitable[Any]]) -> Any:
        can = self.flags.capabilities
        if (refused := self.api.refused(body, tools=can is None or "tools" in can)) is not None:
            return refused
        await self._load(body.get("keep_alive"))
        return await answer(body)

    async def _native_embed(self, seen: Seen) -> Any:
        body = seen.body
        if not self._knows(body.get("model", "")):
            return JSONResponse({"error": f'model "{body.get("model")}" not found, try pulling it first'}, 404)
        await self._load(body.get("keep_alive"))
        return self.api.embeddings(body) if seen.path.endswith("embeddings") else self.api.embed(body)

    def _said(self, asked: dict[str, Any]) -> Said:
        """Return what the model says to a request in chat completions' form."""
        if self.script is not None:
            return self.script(asked)
        text, function = answer_to(asked, asked.get("max_tokens"))
        return Said(text) if function is None else Said(calls=((function, json.loads(text)),))

    # Chat completions

    async def _chat(self, seen: Seen) -> Any:
        try:
            body = seen.body
        except ValueError as error:
            return _error(str(error), 400)
        if (refused := self._refused(body)) is not None:
            return refused
        await self._load()  # keep_alive is not heeded here
        name = f"chatcmpl-{random.randrange(999)}"
        job = Job(name, body, allowed=body.get("max_tokens"), tokens=self._fitting(body))
        if body.get("stream"):
            return Events(self._stream(job), STREAM)
        async with self.machine.turn(job):
            return JSONResponse(await self._whole(job))

    def _refused(self, body: dict[str, Any]) -> Response | None:
        messages, model = body.get("messages"), body.get("model", "")
        if not isinstance(messages, list):
            kind = type(messages).__name__
            why = f"json: cannot unmarshal {kind} into Go struct field ChatCompletionRequest.messages"
            return _error(why, 400)
        if not messages:
            return _error("[] is too short - 'messages'", 400)
        if not self._knows(model):
            return _error(f"model '{model}' not found", 404)
        if body.get("tools") and self.flags.capabilities is not None and "tools" not in self.flags.capabilities:
            return _error(f"registry.ollama.ai/library/{model} does not support tools", 400)
        if len(tokens_of(messages, body.get("tools"))) >= self.flags.context_length and not self.flags.context_shift:
            return _error("the prompt is longer than the context length currently available to the model", 400)
        machine = self.machine
        if len(machine.running) >= machine.limit and len(machine.waiting) >= self.flags.max_queue:
            return _error("server busy, please try again.  maximum pending requests exceeded", 503)
        return None

    def _fitting(self, body: dict[str, Any]) -> list[int]:
        tokens, limit = tokens_of(body["messages"], body.get("tools")), self.flags.context_length
        return tokens if len(tokens) < limit else tokens[-limit // 2 :]

    async def _whole(self, job: Job) -> dict[str, Any]:
        said = self._said(job.body)
        thought = [piece async for piece in self.machine.pieces(job, said.thinking)] if said.thinking else []
        made = "".join([piece async for piece in self.machine.pieces(job, said.written)])
        message: dict[str, Any] = {"role": "assistant", "content": made}
        message |= {"reasoning": "".join(thought)} if thought else {}
        if said.calls and job.finish == "stop":
            message |= {"content": said.text, "tool_calls": _calls(said)}
        choice = {"index": 0, "message": message, "finish_reason": _reason(job, said)}
        return {**_top(job, "chat.completion"), "choices": [choice], "usage": self._usage(job)}

    async def _stream(self, job: Job) -> AsyncIterator[str]:
        async with self.machine.turn(job):
            top, roles = _top(job, "chat.completion.chunk"), itertools.chain(["assistant"], itertools.repeat(""))
            said = self._said(job.body)
            if said.thinking:
                async for piece in self.machine.pieces(job, said.thinking):
                    delta = {**_role(next(roles)), "content": "", "reasoning": piece}
                    yield event({**top, "choices": [_delta(delta)]})
            pieces = self.machine.pieces(job, said.written)
            if said.calls:  # they come whole
                async for _ in pieces:
                    pass
                delta = {**_role(next(roles)), "content": said.text, "tool_calls": _calls(said)}
                yield event({**top, "choices": [_delta(delta)]})
            else:
                async for piece in pieces:
                    yield event({**top, "choices": [_delta({**_role(next(roles)), "content": piece})]})
            yield event({**top, "choices": [_delta({}, _reason(job, said))]})
            if (job.body.get("stream_options") or {}).get("include_usage"):
                yield event({**top, "choices": [], "usage": self._usage(job)})
            yield event("[DONE]")

    async def _embeddings(self, seen: Seen) -> Response:
        given = seen.body["input"]
        texts = [given] if isinstance(given, str) else given
        data = [{"object": "embedding", "index": n, "embedding": vector_of(text)} for n, text in enumerate(texts)]
        words = sum(len(text.split()) for text in texts)
        usage = {"prompt_tokens": words, "total_tokens": words}
        return JSONResponse({"object": "list", "model": seen.body["model"], "data": data, "usage": usage})

    def _usage(self, job: Job) -> dict[str, Any]:
        prompt = len(job.tokens)
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": job.made}
        usage["total_tokens"] = prompt + job.made
        if self.flags.cached_counts:
            usage["prompt_tokens_details"] = {"cached_tokens": job.cached}
        return usage


def _seconds(keep_alive: Any) -> float:
    """Return a duration as Go reads it, of one unit."""
    if isinstance(keep_alive, str):
        unit = keep_alive.lstrip("-.0123456789")
        return float(keep_alive.removesuffix(unit)) * {"s": 1, "m": 60, "h": 3600}[unit]
    return float(keep_alive)


def _role(role: str) -> dict[str, str]:
    return {"role": role} if role else {}


def _calls(said: Said) -> list[dict[str, Any]]:
    return [_call(index, name, arguments) for index, (name, arguments) in enumerate(said.calls)]


def _call(index: int, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    told = {"name": name, "arguments": json.dumps(arguments, separators=(",", ":"))}
    return {"id": f"call_{secrets.token_hex(4)}", "index": index, "type": "function", "function": told}


def _reason(job: Job, said: Said) -> str | None:
    return "tool_calls" if said.calls and job.finish == "stop" else job.finish


def _top(job: Job, kind: str) -> dict[str, Any]:
    top = {"id": job.name, "object": kind, "created": int(time.time()), "model": job.body["model"]}
    return top | {"system_fingerprint": "fp_ollama"}


def _delta(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


def _error(message: str, status: int) -> Response:
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)
