"""A relay before a real engine, which prefills and decodes: the first answer of a run is exchanged for tool calls."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Self

from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

HOP = ("host", "content-length", "transfer-encoding", "connection", "date", "server")


class Relay:
    """Serves on a port of its own while entered.

    Args:
        engine: The engine's URL, with ``/v1``.
        answer: The message for prompts without results of tools.
    """

    def __init__(self, engine: str, answer: Mapping[str, Any]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._engine, self._answer = engine.removesuffix("/v1"), answer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.url = ""

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self._begin())
        return self

    def __exit__(self, *exc: object) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Any) -> Any:
        done: Future[Any] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(60.0)

    async def _begin(self) -> None:
        connector = TCPConnector(force_close=True, limit=0)
        self._http = ClientSession(connector=connector, timeout=ClientTimeout(None))
        app = web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_route("*", "/{path:.*}", self._forward)
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _end(self) -> None:
        await self._runner.cleanup()
        await self._http.close()

    async def _send(self, request: web.Request, data: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        url = self._engine + request.raw_path
        async with self._http.request(request.method, url, data=data or None, headers=headers) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
            return answer.status, kept, await answer.read()

    async def _forward(self, request: web.Request) -> web.Response:
        status, headers, data = await self._send(request, await request.read())
        return web.Response(status=status, headers=headers, body=data)

    async def _chat(self, request: web.Request) -> web.Response:
        data = await request.read()
        body = json.loads(data)
        status, headers, said = await self._send(request, data)
        if "tools" in body:
            self.bodies.append(body)
            if (
                status == 200
                and not any(each["role"] == "tool" for each in body["messages"])
                and len(body["tools"]) > 1
            ):
                whole = json.loads(said)
                whole["choices"][0] |= {"message": dict(self._answer), "finish_reason": "tool_calls"}
                said = json.dumps(whole).encode()
        return web.Response(status=status, headers=headers, body=said)
