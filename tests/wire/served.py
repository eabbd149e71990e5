"""How a stand-in is served: a thread of the test process, a log of what arrived, and an end when a client leaves."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tests.wire.machine import Machine

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Seen:
    """One request, as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    raw: bytes = field(repr=False)

    @property
    def key(self) -> str:
        """The bearer token that came along."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def body(self) -> Any:
        """What the bytes mean; raises ``ValueError`` if they are no JSON."""
        return json.loads(self.raw)


Handler = Callable[[Seen], Awaitable[Any]]


class Events:
    """Server-sent events, as engines frame them; a stream of another kind says so in *media_type*."""

    def __init__(self, events: AsyncIterator[str], media_type: str = "text/event-stream; charset=utf-8") -> None:
        self.events, self.media_type = events, media_type

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", self.media_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self.events:
            await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def event(data: Any) -> str:
    """Return one server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return f"data: {text}\n\n"


class WireServer:
    """A stand-in; what an engine has of its own are its routes, and how it says no."""

    def __init__(self, machine: Machine | None = None) -> None:
        self.machine = machine or Machine()
        self.requests: list[Seen] = []
        self.faults: list[BaseException] = []
        """What went wrong inside the stand-in; leaving it raises the first."""
        self.broken: str | None = None
        """Answered to everything instead, with status 200, once set."""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            self._app, interface="asgi3", lifespan="off", log_level="critical", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="wire-server", daemon=True)

    # What an engine has of its own

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        """Return what answers each method and path."""
        raise NotImplementedError

    def asked_for_nothing(self, *wires: str) -> Mapping[tuple[str, str], Handler]:
        """Return routes for the paths of other wires, as far as a probe looks: an empty request is malformed."""

        async def malformed(seen: Seen) -> Response:
            assert seen.body == {}, "this stand-in answers chat completions only"
            return JSONResponse({"error": {"message": "model: Field required", "type": "BadRequestError"}}, 400)

        return {("POST", f"/v1/{wire}"): malformed for wire in wires}

    def refusal(self, seen: Seen) -> Response | None:
        """Return what a request without the right key gets."""
        return None

    def unknown(self, seen: Seen, known_path: bool) -> Response:
        """Return what an unknown path gets, or a known one with another method; this is FastAPI's."""
        status, detail = (405, "Method Not Allowed") if known_path else (404, "Not Found")
        return JSONResponse({"detail": detail}, status)

    # What a test does

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self.wait(lambda: self._server.started)
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        self._socket.close()
        if self.faults:
            raise self.faults[0]

    def asked(self, path: str) -> list[Seen]:
        """Return the requests for a path."""
        return [seen for seen in self.requests if seen.path == path]

    def wait(self, condition: Callable[[], Any]) -> None:
        """Wait until *condition* holds."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "waited in vain for the stand-in"
            time.sleep(0.002)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let nobody begin while the block runs."""
        limit, self.machine.limit = self.machine.limit, 0
        try:
            yield
        finally:
            self.machine.limit = limit
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self.machine.wake)

    # Serving

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._socket])

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        headers = {name.lower(): value for name, value in request.headers.items()}
        seen = Seen(request.method, request.url.path, dict(request.query_params), headers, await request.body())
        self.requests.append(seen)

        async def answer() -> None:
            try:
                response = await self._answer(seen)
                await response(scope, receive, send)
            except Exception as fault:
                self.faults.append(fault)
                raise

        async with asyncio.TaskGroup() as group:
            answering, leaving = group.create_task(answer()), group.create_task(_gone(receive))
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            answering.cancel()
            leaving.cancel()

    async def _answer(self, seen: Seen) -> Any:
        if self.broken is not None:
            return Response(self.broken, media_type="text/html")
        if (refused := self.refusal(seen)) is not None:
            return refused
        routes = self.routes()
        handler = routes.get((seen.method, seen.path))
        if handler is None:
            return self.unknown(seen, any(path == seen.path for _, path in routes))
        return await handler(seen)


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
