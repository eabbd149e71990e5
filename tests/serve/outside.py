"""Services of others, as tests need them: a small HTTP server that answers JSON by a function."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Answer = Callable[[Any], Any]


class OutsideService:
    """One that runs until its block ends; notes what it is asked.

    Args:
        answer: Returns what is answered to a question; bytes go as they are, an int is a status.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[Any] = []
        self.headers: list[dict[str, str]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                question = json.loads(self.rfile.read(length)) if length else None
                service.asked.append(question)
                service.headers.append({name.lower(): value for name, value in self.headers.items()})
                said = service.answer(question)
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(said if type(said) is int else 200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/ask"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
