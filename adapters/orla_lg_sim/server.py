"""The simulated engine as an OpenAI-compatible HTTP server, on this machine only."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from math import inf
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from orla_lg.errors import EngineError
from orla_lg_sim.chat import BadRequest, Chat, ChatReader
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.figures import exposition
from orla_lg_sim.live import LiveEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import Event, Kind
from orla_lg_sim.text import Tokenizer, WordTokenizer

LOOPBACK = "127.0.0.1"
DEFAULT_MODEL = "sim"
WORKFLOW_HEADER = "x-orla-workflow"
_START_TIMEOUT_S = 10.0


class SimService:
    """What the server's routes do; one engine, one model."""

    def __init__(self, reader: ChatReader, parameters: EngineParameters, speed: float) -> None:
        self.reader = reader
        self.parameters = parameters
        self.live = LiveEngine(SimEngine(parameters), speed)
        self._started_s = time.time()
        self._named: dict[str, str] = {}
        """Ids of requests by the names that their senders gave them."""

    # OpenAI's API

    async def models(self, _request: Request) -> Response:
        """List the one model."""
        entry = {"id": self.reader.model, "object": "model", "created": 0, "owned_by": "orla_lg"}
        entry["max_model_len"] = self.parameters.longest_tokens
        return JSONResponse({"object": "list", "data": [entry]})

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion, in a stream or in one piece."""
        chat = self.reader.read(await _body(request), request.headers.get(WORKFLOW_HEADER))
        if chat.stream:
            return StreamingResponse(self._events(chat), media_type="text/event-stream")
        end = await self._end(chat, request)
        said, reason = (end.tokens, chat.answer.finish_reason) if end.tokens >= 0 else (0, "abort")
        return JSONResponse(chat.completion(end, said, reason))

    async def _events(self, chat: Chat) -> AsyncIterator[str]:
        async with contextlib.aclosing(self._run(chat)) as events:
            async for event in events:
                if event.kind is Kind.FIRST_TOKEN:
                    yield _sse(chat.opening())
                if event.kind in (Kind.FIRST_TOKEN, Kind.TOKEN):
                    if chat.answer.pieces:
                        yield _sse(chat.token(event.tokens))
                elif event.kind is Kind.FINISHED:
                    yield _sse(chat.closing(chat.answer.finish_reason if event.tokens >= 0 else "abort"))
                    if chat.include_usage:
                        yield _sse(chat.usage_chunk(event))
        yield "data: [DONE]\n\n"

    async def _end(self, chat: Chat, request: Request) -> Event:
        """Wait for a request's last event; a client that leaves ends it."""
        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(self._abort_when_left(chat, request))
            end = None
            async with contextlib.aclosing(self._run(chat)) as events:
                async for event in events:
                    end = event
            watcher.cancel()
        assert end is not None
        return end

    async def _abort_when_left(self, chat: Chat, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.live.abort(chat.request.id)

    # As vLLM has them

    async def health(self, _request: Request) -> Response:
        """Say that it runs."""
        return Response(status_code=200)

    async def version(self, _request: Request) -> Response:
        """Say which version of the package it is, and whether it heeds priorities."""
        return JSONResponse({"version": f"sim-{version('orla-lg')}", "priority": self.parameters.priority})

    async def metrics(self, _request: Request) -> Response:
        """Tell load and counters."""
        return PlainTextResponse(exposition(self.live.catch_up(), self._started_s))

    async def tokenize(self, request: Request) -> Response:
        """Return the tokens of a chat's prompt, or of a text given as ``prompt``."""
        body = await _body(request)
        text = body.get("prompt")
        tokens = self.reader.tokenizer.encode(text) if isinstance(text, str) else self.reader.prompt(body)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.parameters.longest_tokens})

    async def abort(self, request: Request) -> Response:
        """End requests by their ids."""
        ids = (await _body(request)).get("request_ids")
        if not isinstance(ids, list):
            raise BadRequest("request_ids must be a list", param="request_ids")
        return JSONResponse({"aborted": [name for name in ids if self._abort(str(name))]})

    def _abort(self, name: str) -> bool:
        return self.live.abort(self._named.get(name, name))

    async def _run(self, chat: Chat) -> AsyncGenerator[Event]:
        """Yield what happens to a request, known by its name meanwhile; closing this aborts it."""
        self._named[chat.name] = chat.request.id  # of two with the same name the later has it
        try:
            async with contextlib.aclosing(self.live.run(chat.request)) as events:
                async for event in events:
                    yield event
        finally:
            if self._named.get(chat.name) == chat.request.id:
                del self._named[chat.name]

    # The cache, by workflow, by prefix, or all of it

    async def pin(self, request: Request) -> Response:
        """Keep a part of the cache, for ``ttl_s`` seconds or until it is released."""
        body = await _body(request)
        ttl_s = body.get("ttl_s")
        if ttl_s is not None and not (isinstance(ttl_s, int | float) and ttl_s > 0):
            raise BadRequest(f"ttl_s must be a positive number, got {ttl_s!r}", param="ttl_s")
        kept, until_s = self.live.catch_up().ownership, inf if ttl_s is None else self.live.now + ttl_s
        workflow = _workflow(body)
        if workflow is not None:
            return _effect("pinned", kept.pin_workflow(workflow, until_s))
        blocks = kept.pin(self._scope(body), until_s)
        return _effect("pinned" if blocks else "failed", blocks)

    async def release(self, request: Request) -> Response:
        """Make a part of the cache the next to be evicted."""
        body = await _body(request)
        kept, workflow = self.live.catch_up().ownership, _workflow(body)
        blocks = kept.release_workflow(workflow) if workflow is not None else kept.release(self._scope(body))
        return _effect("demoted", blocks)

    async def flush(self, request: Request) -> Response:
        """Forget a part of the cache."""
        body = await _body(request)
        kept, workflow = self.live.catch_up().ownership, _workflow(body)
        blocks = kept.flush_workflow(workflow) if workflow is not None else kept.flush(self._scope(body))
        return _effect("freed", blocks)

    async def stat(self, request: Request) -> Response:
        """Say what is in the cache, and of a workflow or a prefix how much of it."""
        engine = self.live.catch_up()
        pool, kept = engine.ownership.pool, engine.ownership
        said = {
            "block_tokens": self.parameters.block_tokens,
            "blocks": pool.blocks,
            "held": pool.held,
            "known": pool.known,
            "pinned": kept.pinned,
            "workflows": kept.workflows(),
        }
        if request.method == "POST":
            body = await _body(request)
            workflow = _workflow(body)
            if workflow is not None:
                said |= {"owned": len(kept.owned(workflow)), "alone": len(kept.alone(workflow))}
            elif "messages" in body:
                said["found"] = len(pool.find(self.reader.prefix(body)))
        return JSONResponse(said)

    def _scope(self, body: dict[str, Any]) -> list[int]:
        """Return the hashes that an order is about."""
        if "messages" in body:
            return self.reader.prefix(body)
        if body.get("all") is True:
            return self.live.engine.ownership.pool.all_known()
        raise BadRequest("say which part of the cache: workflow, messages, or all: true")


def application(service: SimService) -> Starlette:
    """Return the server's routes as an ASGI application."""

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        service.live.close()

    post, get = ["POST"], ["GET"]
    routes = [
        Route("/v1/models", service.models, methods=get),
        Route("/v1/chat/completions", service.chat, methods=post),
        Route("/health", service.health, methods=get),
        Route("/version", service.version, methods=get),
        Route("/metrics", service.metrics, methods=get),
        Route("/tokenize", service.tokenize, methods=post),
        Route("/v1/abort", service.abort, methods=post),
        Route("/v1/sim/kv/pin", service.pin, methods=post),
        Route("/v1/sim/kv/release", service.release, methods=post),
        Route("/v1/sim/kv/flush", service.flush, methods=post),
        Route("/v1/sim/kv/stat", service.stat, methods=[*get, *post]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={BadRequest: _refused})


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, BadRequest)
    return JSONResponse(error.as_body(), status_code=error.status)


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = await request.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _workflow(body: dict[str, Any]) -> str | None:
    value = body.get("workflow")
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"workflow must be a string, got {value!r}", param="workflow")
    return value


def _effect(effect: str, blocks: int) -> Response:
    return JSONResponse({"effect": effect, "blocks": blocks})


def _sse(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


class SimServer:
    """The server in a thread of its own, for tests and scripts; ``url`` is ready inside ``with``.

    Args:
        parameters: Of the engine.
        model: The name it serves.
        port: 0 takes any that is free.
        speed: Simulated seconds in a real one.
        tokenizer: Counts tokens; the default needs no files.
    """

    def __init__(
        self,
        parameters: EngineParameters | None = None,
        *,
        model: str = DEFAULT_MODEL,
        port: int = 0,
        speed: float = 1.0,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        parameters = parameters or EngineParameters()
        reader = ChatReader(model, parameters, tokenizer or WordTokenizer())
        self.service = SimService(reader, parameters, speed)
        self._socket = listen(port)
        self.port = int(self._socket.getsockname()[1])
        self.url = f"http://{LOOPBACK}:{self.port}/v1"
        self._server = server_of(self.service)
        self._thread = threading.Thread(target=self._serve, name="sim-engine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self._server.started:
            time.sleep(0.01)
            if time.monotonic() > deadline_s or not self._thread.is_alive():
                raise EngineError("the simulated engine's server did not start")
        return self

    def __exit__(self, *_exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(_START_TIMEOUT_S)
        self._socket.close()

    def _serve(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))


def listen(port: int) -> socket.socket:
    """Return a socket on this machine only.

    Raises:
        EngineError: The port is taken.
    """
    # The protocol is named because asyncio sends small pieces at once (TCP_NODELAY) only on a socket that has one.
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((LOOPBACK, port))
        made.listen()  # from now on who connects waits, instead of being refused until the server runs
    except OSError as error:
        made.close()
        raise EngineError(f"port {port} cannot be had: {error.strerror}; --port 0 takes any that is free") from error
    return made


def server_of(service: SimService) -> uvicorn.Server:
    """Return a server that ends what still runs after a second."""
    config = uvicorn.Config(
        application(service), log_level="warning", access_log=False, timeout_graceful_shutdown=1, lifespan="on"
    )
    return uvicorn.Server(config)
