"""A loopback proxy before a real engine, which prefills and decodes: each token is exchanged for a planned piece.

``python -m bench.tools.proxy ENGINE`` prints its URL. What names no plan passes unchanged. The small model's template
knows no tools, so calls and results are sent to it as text. With ``--required`` only the final answer is exchanged:
the engine decodes tool calls by itself, held to their schema by the request's ``tool_choice``.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from typing import Any

import uvloop
from aiohttp import ClientResponse, ClientSession, ClientTimeout, TCPConnector, web

from bench.tools.engine import Planned, deltas, rendered
from tests.scripted_engine import SHOWN

OF_TOOLS = ("tools", "tool_choice", "parallel_tool_calls", "max_completion_tokens")
HOP = ("host", "content-length", "transfer-encoding", "connection", "date", "server")


def plain(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request whose tool calls and results are text."""
    roles = ("user" if each["role"] == "tool" else each["role"] for each in body["messages"])
    texts = ({"role": role, "content": rendered(each)} for role, each in zip(roles, body["messages"], strict=True))
    return {**{name: value for name, value in body.items() if name not in OF_TOOLS}, "messages": [*texts]}


class Proxy:
    def __init__(self, engine: str, http: ClientSession, *, required: bool) -> None:
        self._engine, self._http, self._required = engine, http, required

    async def forward(self, request: web.Request, changed: Mapping[str, Any] | None = None) -> web.StreamResponse:
        """Send a request on, and its answer back."""
        body = await request.read() if changed is None else json.dumps(changed).encode()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in HOP}
        url = self._engine + request.raw_path
        async with self._http.request(request.method, url, data=body or None, headers=headers) as answer:
            kept = {name: value for name, value in answer.headers.items() if name.lower() not in HOP}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for part in answer.content.iter_any():
                await response.write(part)
            return response

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Answer a call as its prompt plans."""
        body = await request.json()
        planned = Planned(body)
        if not planned.number or (self._required and not planned.is_final):
            return await self.forward(request)
        sent = body | {"tool_choice": "none"} if self._required else plain(body)
        if not planned.is_call:
            return await self.forward(request, sent)
        fields = {"max_tokens": planned.tokens, "ignore_eos": True, "stream": True}
        sent |= fields | {"stream_options": {"include_usage": True}}
        async with self._http.post(self._engine + request.raw_path, json=sent) as answer:
            if answer.status != 200:
                return web.Response(status=answer.status, body=await answer.read(), content_type="application/json")
            if body.get("stream"):
                return await self._streamed(request, planned, answer)
            message, usage = await exchanged(planned, answer)
            choice = {"index": 0, "message": message, "finish_reason": planned.finish}
            return web.json_response({**SHOWN, "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _streamed(self, request: web.Request, planned: Planned, answer: ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def say(delta: dict[str, Any] | None, finish: str | None = None, **more: Any) -> None:
            choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
            told = {**SHOWN, "object": "chat.completion.chunk", "choices": choices, **more}
            await response.write(f"data: {json.dumps(told)}\n\n".encode())

        _, usage = await exchanged(planned, answer, say)
        await say({}, planned.finish)
        await say(None, usage=usage)
        await response.write(b"data: [DONE]\n\n")
        return response


async def exchanged(planned: Planned, answer: ClientResponse, say: Any = None) -> tuple[dict[str, Any], Any]:
    """Read an engine's stream; *say* a piece of the planned answer for each token; return it, and the usage."""
    message, usage, left = None, None, list[dict[str, Any]]()
    async for line in answer.content:
        told = json.loads(line[6:]) if line.startswith(b"data: {") else {}
        usage = told.get("usage") or usage
        delta = told["choices"][0]["delta"] if told.get("choices") else {}
        if delta.get("content") or delta.get("tool_calls"):
            if message is None:  # the moment of the first token
                message = planned.message()
                left = deltas(message)
            if say is not None and left:
                await say(left.pop(0))
    if message is None:
        message = planned.message()
        left = deltas(message)
    for piece in left if say is not None else ():  # for tokens that made no text
        await say(piece)
    return message, usage


async def main(engine: str, *flags: str) -> None:
    # llama.cpp breaks connections that are used again after a stream
    async with ClientSession(connector=TCPConnector(force_close=True, limit=0), timeout=ClientTimeout(None)) as http:
        proxy, app = Proxy(engine, http, required="--required" in flags), web.Application(client_max_size=2**26)
        app.router.add_post("/v1/chat/completions", proxy.chat)
        app.router.add_route("*", "/{path:.*}", proxy.forward)
        runner = web.AppRunner(app, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
