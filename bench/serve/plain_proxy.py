"""A proxy of Starlette, uvicorn and aiohttp that hands on what it gets: what the libraries cost without us."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

import aiohttp
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from bench.lib.flags import port

JSON = {"content-type": "application/json"}


class Proxy:
    """One engine behind one route."""

    def __init__(self, engine: str, session: aiohttp.ClientSession) -> None:
        self._url, self._session = f"{engine}/chat/completions", session

    async def call(self, request: Request) -> Response:
        answer = await self._session.post(self._url, data=await request.body(), headers=JSON)
        kind = answer.headers.get("content-type")
        if "event-stream" not in (kind or ""):
            return Response(await answer.read(), answer.status, media_type=kind)
        return StreamingResponse(self._parts(answer), media_type=kind)

    async def _parts(self, answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        try:
            while data := await answer.content.readany():
                yield data
            answer.release()
        finally:
            answer.close()


async def ready(_request: Request) -> Response:
    return PlainTextResponse("ready")


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("--config", help="not read")
    parser.add_argument("--port", type=port, required=True)
    args = parser.parse_args()
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        proxy = Proxy(args.engine, session)
        routes = [Route("/v1/chat/completions", proxy.call, methods=["POST"]), Route("/readyz", ready)]
        config = uvicorn.Config(
            Starlette(routes=routes), port=args.port, log_level="warning", access_log=False, http="httptools",
            loop="none", ws="none", lifespan="off",
        )  # fmt: skip
        await uvicorn.Server(config).serve()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
