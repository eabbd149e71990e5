"""What a call of the gateway costs, in lines of Python: the same on every machine, however busy it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from orla_lg import Orla
from orla_lg.serve.access.access import Access
from orla_lg.serve.access.keys import Keyring
from orla_lg.serve.gateway.calls import Gateway
from orla_lg.serve.gateway.routes import Shortcut
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.serve.http.guard import AccessLayer, HttpGuard
from orla_lg.serve.store.store import MemoryStore
from tests.conftest import at
from tests.effort import lines_run
from tests.stub_engine import StubEngine

HEADERS = [
    (b"host", b"localhost"), (b"content-type", b"application/json"), (b"user-agent", b"OpenAI/Python 3"),
    (b"authorization", b"Bearer none"), (b"x-stainless-lang", b"python"), (b"x-stainless-retry-count", b"0"),
    (b"x-session-id", b"s-1"), (b"x-orla-stage", b"plan"),
]  # fmt: skip


class Asgi:
    """One request after the other to an ASGI application, without a server."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def ask(self, body: dict[str, Any]) -> bytes:
        content, sent, ended = json.dumps(body).encode(), [], asyncio.Event()
        coming = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if coming:
                return coming.pop()
            await ended.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        length = (b"content-length", b"%d" % len(content))
        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
            "headers": [*HEADERS, length], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await self._app(scope, receive, send)
        assert sent[0]["status"] == 200
        return b"".join(message["body"] for message in sent[1:])


@pytest.mark.parametrize(("stream", "most"), [(False, 4600), (True, 5500)], ids=["whole", "streamed"])
def test_lines_of_a_call(engine: StubEngine, make_orla: Callable[..., Orla], stream: bool, most: int) -> None:
    orla = make_orla(at(engine))
    orla.connect()
    body = {"model": "main", "messages": [{"role": "user", "content": "hello"}], "stream": stream}
    with asyncio.Runner() as runner:
        access = Access(Keyring(MemoryStore()))
        gateway = Gateway(orla.core.serving, access, GatewaySettings())
        asgi = Asgi(AccessLayer(Shortcut(None, gateway), access, HttpGuard()))
        for _ in range(3):
            assert b"hello" in runner.run(asgi.ask(body))
        counts = [lines_run(lambda: runner.run(asgi.ask(body))) for _ in range(5)]
        runner.run(gateway.aclose())
    assert min(counts) <= most
