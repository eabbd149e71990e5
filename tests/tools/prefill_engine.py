"""An engine with a prefix cache and a pace: it answers as planned, and keeps account of what it prefilled."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

MODEL = "planned"
CHARS_PER_TOKEN = 4
BLOCK = 16
"""Tokens of a block of its cache: only whole ones are found again."""


@dataclass
class Request:
    """One request, as the engine saw it."""

    body: dict[str, Any]
    prompt_tokens: int
    cached_tokens: int
    at_s: float = field(default_factory=time.monotonic)

    @property
    def prefetch(self) -> bool:
        return self.body.get("max_tokens") == 1 and "tools" in self.body

    @property
    def messages(self) -> list[Any]:
        messages: list[Any] = self.body["messages"]
        return messages


def calls(*wanted: tuple[str, Mapping[str, Any]], name: str = "", text: str | None = None) -> dict[str, Any]:
    """Return an answer that calls tools."""
    made = [
        {"id": f"call{name}-{at}", "type": "function", "function": {"name": tool, "arguments": json.dumps(said)}}
        for at, (tool, said) in enumerate(wanted)
    ]
    return {"role": "assistant", "content": text, "tool_calls": made}


DONE = {"role": "assistant", "content": "done"}

Plan = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def once(answer: Mapping[str, Any]) -> Plan:
    """Return a plan: this answer first, and "done" once there are results."""
    return lambda body: DONE if any(each["role"] == "tool" for each in body["messages"]) else answer


def in_turn(*answers: Mapping[str, Any]) -> Plan:
    """Return a plan: one of these after the other and then "done", again and again."""
    numbers = itertools.count()
    return lambda body: [*answers, DONE][next(numbers) % (len(answers) + 1)]


class PrefillEngine:
    """Serves on a port of its own while entered.

    Args:
        plan: The answer to a body; not asked for prefetches.
        tokens_per_s: That it prefills; one request after the other, as on one device.
        refuses: Whether it answers a body with 400.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        tokens_per_s: float = 100_000.0,
        refuses: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        self.requests: list[Request] = []
        self._plan, self._tokens_per_s, self._refuses = plan, tokens_per_s, refuses
        self.prefetches_go_on = threading.Event()
        """While it is not set, prefetches take as long as it takes until it is."""
        self.prefetches_go_on.set()
        self._lock = threading.Lock()
        self._held: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    @property
    def prefetches(self) -> list[Request]:
        return [each for each in self.requests if each.prefetch]

    @property
    def calls(self) -> list[Request]:
        return [each for each in self.requests if "max_tokens" not in each.body]

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.prefetches_go_on.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _prefill(self, body: dict[str, Any]) -> Request:
        text = json.dumps([body.get("tools"), body["messages"]])[:-2]
        tokens = len(text) // CHARS_PER_TOKEN
        with self._lock:
            common = max((_in_common(text, held) for held in self._held), default=0)
            cached = min(tokens, common // CHARS_PER_TOKEN // BLOCK * BLOCK)
            made = Request(body, tokens, cached)
            self.requests.append(made)
        if made.prefetch:
            self.prefetches_go_on.wait(60.0)
        time.sleep((tokens - cached) / self._tokens_per_s)
        with self._lock:
            self._held.append(text)
        return made

    def _handler(engine) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self) -> None:
                known = self.path.endswith("/models")
                self._send(200 if known else 404, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if not self.path.endswith("/chat/completions"):
                    self._send(404, {"error": {"message": "not here"}})
                elif engine._refuses is not None and engine._refuses(body):
                    engine.requests.append(Request(body, 0, 0))
                    self._send(400, {"error": {"message": "not like this"}})
                else:
                    self._answer(body, engine._prefill(body))

            def _answer(self, body: dict[str, Any], made: Request) -> None:
                planned = "max_tokens" not in body  # else it is a prefetch, or a probe
                message = dict(engine._plan(body)) if planned else {"role": "assistant", "content": "x"}
                usage = {
                    "prompt_tokens": made.prompt_tokens, "completion_tokens": 8,
                    "total_tokens": made.prompt_tokens + 8,
                    "prompt_tokens_details": {"cached_tokens": made.cached_tokens},
                }  # fmt: skip
                shown = {"id": "chatcmpl-1", "created": 1, "model": MODEL}
                reason = "tool_calls" if message.get("tool_calls") else "stop"
                if not body.get("stream"):
                    choice = {"index": 0, "message": message, "finish_reason": reason}
                    self._send(200, {**shown, "object": "chat.completion", "choices": [choice], "usage": usage})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                told = {**shown, "object": "chat.completion.chunk"}
                for delta in _pieces(message):
                    self._event({**told, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                self._event({**told, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
                if (body.get("stream_options") or {}).get("include_usage"):
                    self._event({**told, "choices": [], "usage": usage})
                self._chunk(b"data: [DONE]\n\n")
                self.wfile.write(b"0\r\n\r\n")
                self.wfile.flush()

            def _event(self, payload: Any) -> None:
                self._chunk(f"data: {json.dumps(payload)}\n\n".encode())

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()

            def _send(self, status: int, payload: Any) -> None:
                content = json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                self.wfile.flush()

            def log_message(self, *said: Any) -> None:
                pass

            def handle(self) -> None:
                with suppress(ConnectionError, ValueError):  # hung up: what was computed is kept all the same
                    super().handle()

            def finish(self) -> None:
                with suppress(ConnectionError, ValueError):
                    super().finish()

        return Handler


def _pieces(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    pieces: list[dict[str, Any]] = [{"role": "assistant", "content": message.get("content") or ""}]
    for at, call in enumerate(message.get("tool_calls") or ()):
        function, text = call["function"], call["function"]["arguments"]
        pieces.append({"tool_calls": [{**call, "index": at, "function": {**function, "arguments": ""}}]})
        pieces += [
            {"tool_calls": [{"index": at, "function": {"arguments": text[first : first + 7]}}]}
            for first in range(0, len(text), 7)
        ]
    return pieces


def _in_common(one: str, other: str) -> int:
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[:middle] == other[:middle]:
            least = middle
        else:
            most = middle - 1
    return least
