"""A server that answers chat completions with the bytes that a test gives it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

MODEL = "m"
EVENTS = "text/event-stream"
JSON = "application/json"


@dataclass(frozen=True)
class Answer:
    body: bytes
    kind: str = JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


Rule = Callable[[Asked], Answer]


class RawEngine:
    """From ``with`` to its end, each chat completion is answered by ``rule``; ``asked`` lists them."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.asked: list[Asked] = []
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(b"")

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers["content-length"])))

            def _answer(self, body: bytes) -> None:
                parts = urlsplit(self.path)
                if parts.path.endswith("/models"):
                    self._send(Answer(json.dumps({"data": [{"id": MODEL}]}).encode()))
                    return
                if body == b"{}":  # a probe asks which wires there are
                    self._send(Answer(b"", status=404))
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.command, parts.path, parts.query, headers, json.loads(body or b"{}"))
                engine.asked.append(asked)
                self._send(engine.rule(asked))

            def _send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in {"content-type": answer.kind, **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def whole(message: Any = None, *, finish: str = "stop", **top: Any) -> Answer:
    """Return an answer in one piece."""
    choice = {"index": 0, "message": message or {"role": "assistant", "content": "hi"}, "finish_reason": finish}
    return Answer(
        json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": USAGE, **top}).encode()
    )


def events(deltas: Sequence[Any], *, usage: Any = None, done: bool = True, finish: str = "stop") -> Answer:
    """Return a stream of these deltas, each in a chunk."""
    chunks: list[Any] = [
        {
            "id": "x",
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
        }
        for delta in deltas
    ]
    chunks.append({"id": "x", "choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    if usage is not None:
        chunks.append({"id": "x", "choices": [], "usage": usage})
    return stream_of(chunks, done=done)


def stream_of(chunks: Sequence[Any], *, done: bool = True) -> Answer:
    """Return a stream of these chunks; bytes are sent as they are."""
    data = [chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode() for chunk in chunks]
    return Answer(b"".join(b"data: " + each + b"\n\n" for each in [*data, *([b"[DONE]"] if done else [])]), EVENTS)


USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def either(plain: Answer, stream: Answer) -> Rule:
    """Return a rule: *stream* for requests that ask for one."""
    return lambda asked: stream if asked.body.get("stream") else plain
