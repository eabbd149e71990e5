"""A collector that speaks LangSmith's ingest protocol: ``GET /info`` and ``POST /runs/multipart``."""

from __future__ import annotations

import json
import threading
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

INGEST = {
    "use_multipart_endpoint": True,
    "size_limit": 100,
    "size_limit_bytes": 20_971_520,
    "scale_up_qsize_trigger": 1000,
    "scale_up_nthreads_limit": 16,
    "scale_down_nempty_trigger": 4,
}


class Collector:
    """Keeps every run it is sent, its parts put together."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        """Return the runs of a type (``llm``, ``chain``, ``tool``)."""
        return [run for run in self.runs.values() if run.get("run_type") == kind]

    def take(self, content_type: str, body: bytes) -> None:
        """Take in one multipart batch; parts are named ``post.<id>``, ``patch.<id>.outputs`` and so on."""
        whole = message_from_bytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
        for part in whole.get_payload():
            name = part.get_param("name", header="content-disposition")  # type: ignore[union-attr]
            _, run_id, *field = str(name).split(".")
            value = json.loads(part.get_payload(decode=True))  # type: ignore[union-attr,arg-type]
            with self._lock:
                run = self.runs.setdefault(run_id, {})
                if field:
                    run[field[0]] = value
                else:
                    run.update({key: each for key, each in value.items() if each is not None})

    def _handler(collector) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer({"version": "0", "batch_ingest_config": INGEST})

            def do_POST(self) -> None:
                collector.take(self.headers["Content-Type"], self._body())
                self._answer({})

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers["Content-Length"]))
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)

            def _answer(self, body: dict[str, Any]) -> None:
                data = json.dumps(body).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: object) -> None:
                pass

        return Handler
