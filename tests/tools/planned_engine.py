"""An engine that answers as planned: which tools it calls in each round, and what it waits for between its calls."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

MODEL = "planned"
PIECE_CHARS = 7


@dataclass(frozen=True)
class Answer:
    """One answer: text, and calls by tool and arguments."""

    calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
    text: str = ""
    after: Mapping[int, Callable[[], object]] = field(default_factory=dict)
    """What is done once the arguments of the call with this number are sent."""
    breaks_after: int | None = None
    """The connection is cut once the call with this number is sent."""

    def message(self, name: str) -> dict[str, Any]:
        calls = [
            {"id": f"call-{name}-{at}", "type": "function", "function": {"name": tool, "arguments": json.dumps(args)}}
            for at, (tool, args) in enumerate(self.calls)
        ]
        return {"role": "assistant", "content": self.text or None, **({"tool_calls": calls} if calls else {})}


Plan = Sequence[Answer] | Callable[[Mapping[str, Any]], Answer]


def rounds(body: Mapping[str, Any]) -> int:
    """Return how many answers since the last question called tools."""
    count = 0
    for message in body["messages"]:
        count = 0 if message["role"] == "user" else count + bool(message.get("tool_calls"))
    return count


class PlannedEngine:
    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, body: dict[str, Any]) -> tuple[str, Answer]:
        with self._lock:
            self.bodies.append(body)
            name = str(len(self.bodies))
        if callable(self._plan):
            return name, self._plan(body)
        nth = rounds(body)
        return name, self._plan[nth] if nth < len(self._plan) else Answer(text="done")

    def _handler(engine) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # an event in one packet

            def do_GET(self) -> None:
                self._whole(
                    {"object": "list", "data": [{"id": MODEL, "object": "model"}]}, self.path.endswith("models")
                )

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                if not self.path.endswith("/chat/completions"):
                    self._whole({"error": "not here"}, found=False)
                    return
                body = json.loads(content)
                name, answer = engine.answer(body)
                shown = {"id": f"chatcmpl-{name}", "created": 1, "model": MODEL}
                message = answer.message(name)
                reason = "tool_calls" if answer.calls else "stop"
                if not body.get("stream"):
                    for after in answer.after.values():
                        after()
                    choice = {"index": 0, "message": message, "finish_reason": reason}
                    self._whole({**shown, "object": "chat.completion", "choices": [choice], "usage": USAGE})
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self._stream(shown, message, reason, answer, body)

            def _stream(self, shown: Any, message: Any, reason: str, answer: Answer, body: Any) -> None:
                def send(delta: Any, finish: str | None = None) -> None:
                    choice = {"index": 0, "delta": delta, "finish_reason": finish}
                    self._event({**shown, "object": "chat.completion.chunk", "choices": [choice]})

                send({"role": "assistant", "content": ""})
                if answer.text:
                    send({"content": answer.text})
                for at, call in enumerate(message.get("tool_calls") or ()):
                    function = call["function"]
                    text = function["arguments"]
                    head = {**call, "index": at, "function": {"name": function["name"], "arguments": ""}}
                    send({"tool_calls": [head]})
                    for first in range(0, len(text), PIECE_CHARS):
                        piece = {"index": at, "function": {"arguments": text[first : first + PIECE_CHARS]}}
                        send({"tool_calls": [piece]})
                    if (after := answer.after.get(at)) is not None:
                        after()
                    if answer.breaks_after == at:
                        self.close_connection = True
                        self.connection.close()
                        return
                send({}, reason)
                if (body.get("stream_options") or {}).get("include_usage"):
                    self._event({**shown, "object": "chat.completion.chunk", "choices": [], "usage": USAGE})
                self._chunk(b"data: [DONE]\n\n")
                self.wfile.write(b"0\r\n\r\n")
                self.wfile.flush()

            def _event(self, payload: Any) -> None:
                self._chunk(f"data: {json.dumps(payload)}\n\n".encode())

            def _chunk(self, data: bytes) -> None:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()

            def _whole(self, payload: Any, found: bool = True) -> None:
                content = json.dumps(payload).encode()
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                self.wfile.flush()

            def log_message(self, *args: object) -> None: ...

            def handle(self) -> None:
                try:
                    super().handle()
                except (OSError, ValueError):  # the client left, or the connection was cut
                    self.close_connection = True

        return Handler


USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
