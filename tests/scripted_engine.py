"""An engine without a model that costs little: raw HTTP/1.1, the same answer each time, and an account of its calls.

For load and for faults, where ``tests.stub_engine`` is too slow and too honest. A prompt may carry a mark,
``call-ID-of-SECONDS-``: the answer then takes so long, deliveries are counted by id, and the calls at the engine at
once are counted; what carries no mark is answered at once and only counted as served. ``--late-s`` notices a hang-up
so much later, as a busy engine does: until then the call runs on, and its load says so.

``python -m tests.scripted_engine`` prints its URL and serves until it is stopped. ``GET /account`` gives the account
as JSON, and which calls run; ``?anew`` forgets the most at once then, ``?late_s=2`` sets how late hang-ups are
noticed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import uvloop

MODEL = "scripted"
MARK = re.compile(rb"call-([\w.]+)-of-([\d.]+)-")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
STREAM = re.compile(rb'"stream": ?true')
COUNTED = re.compile(rb'"include_usage": ?true')
USAGE = {
    "prompt_tokens": 400, "completion_tokens": 16, "total_tokens": 416,
    "prompt_tokens_details": {"cached_tokens": 384},
}  # fmt: skip
SHOWN = {"id": "chatcmpl-scripted", "created": 1_700_000_000, "model": MODEL}
TEXT = " ".join(f"word{n}" for n in range(16))
MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "us", "max_model_len": 131072}]}
METRICS = """vllm:num_requests_running RUNNING.0
vllm:num_requests_waiting 0.0
vllm:cache_config_info{block_size="16",num_gpu_blocks="32768"} 1.0
process_start_time_seconds 1.0
"""


def answered(body: bytes, kind: bytes = b"application/json", status: bytes = b"200 OK") -> bytes:
    """Return a whole response."""
    return b"HTTP/1.1 %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (status, kind, len(body), body)


def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
    """Return one event of a stream, as a chunk of the body."""
    told = json.dumps({**SHOWN, "object": "chat.completion.chunk", "choices": choices, **more})
    line = f"data: {told}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(line), line)


def delta(told: dict[str, str], finish: str | None = None) -> list[dict[str, Any]]:
    """Return the choices of an event."""
    return [{"index": 0, "delta": told, "finish_reason": finish}]


MESSAGE = {"role": "assistant", "content": TEXT}
CHOICE = {"index": 0, "message": MESSAGE, "finish_reason": "stop"}
WHOLE = answered(json.dumps({**SHOWN, "object": "chat.completion", "choices": [CHOICE], "usage": USAGE}).encode())
NOT_FOUND = answered(b'{"error":{"message":"not here","type":"not_found"}}', status=b"404 Not Found")
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST = event(delta({"role": "assistant", "content": ""}))
PARTS = [event(delta({"content": f"word{n} "})) for n in range(10)]
"""A hundred equal parts one after the other are taken for a fault by some who read them."""
STOP, COUNTS = event(delta({}, "stop")), event([], usage=USAGE)
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Account:
    """What came, and what was at the engine at once."""

    def __init__(self) -> None:
        self.served = self.running = self.hung_up = self.open = 0
        self.delivered = Counter[str]()
        self.calls = Counter[str]()
        """Those that run, by their marks."""
        self.most, self.most_s = 0, 0.0

    def begin(self, call: str) -> None:
        """Count a marked call in."""
        self.delivered[call] += 1
        self.calls[call] += 1
        self.running += 1
        if self.running > self.most:
            self.most, self.most_s = self.running, time.monotonic()

    def end(self, call: str) -> None:
        """Count a marked call out."""
        self.running -= 1
        self.calls[call] -= 1
        if not self.calls[call]:
            del self.calls[call]

    def asdict(self) -> dict[str, Any]:
        """Return it as JSON carries it."""
        twice = sorted(call for call, times in self.delivered.items() if times > 1)
        return {
            "served": self.served, "running": self.running, "open": self.open, "hung_up": self.hung_up,
            "delivered": len(self.delivered), "twice": twice, "most": self.most, "most_s": self.most_s,
            "calls": sorted(self.calls),
        }  # fmt: skip

    def anew(self) -> None:
        """Forget the most at once; what runs, runs on."""
        self.most = self.running


class Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    transport: asyncio.Transport

    def __init__(self, account: Account, chosen: argparse.Namespace) -> None:
        self._account, self._chosen = account, chosen
        self._loop = asyncio.get_running_loop()
        self._unread = bytearray()
        self._body = b""
        self._timer: asyncio.TimerHandle | None = None
        self._ends_s = 0.0
        self._marked = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self._account.open += 1

    def data_received(self, data: bytes) -> None:
        """Answer the request that is whole now."""
        self._unread += data
        if (head := self._unread.find(b"\r\n\r\n")) < 0:
            return
        found = LENGTH.search(self._unread, 0, head)
        end = head + 4 + (int(found[1]) if found else 0)
        if len(self._unread) >= end:
            target = bytes(self._unread[: self._unread.find(b"\r\n")]).split(b" ")[1]
            self._body = bytes(self._unread[head + 4 : end])
            del self._unread[:end]
            self._answer(target)

    def _answer(self, target: bytes) -> None:
        path, _, query = target.partition(b"?")
        if path.endswith(b"/chat/completions"):
            self._account.served += 1
            self._begin()
        elif path == b"/account":
            self.transport.write(answered(json.dumps(self._account.asdict()).encode()))
            self._heed(query.decode())
        elif path.endswith(b"/models"):
            self.transport.write(answered(json.dumps(MODELS).encode()))
        elif path == b"/metrics":
            self.transport.write(
                answered(METRICS.replace("RUNNING", str(self._account.running)).encode(), b"text/plain")
            )
        elif path == b"/version":
            self.transport.write(answered(b'{"version":"0.32.0"}'))
        else:
            self.transport.write(NOT_FOUND)

    def _heed(self, query: str) -> None:
        if "anew" in query:
            self._account.anew()
        if late := re.search(r"late_s=([\d.]+)", query):
            self._chosen.late_s = float(late[1])

    def _begin(self) -> None:
        mark = MARK.search(self._body)
        pause_s = float(mark[2]) if mark else self._chosen.before_s
        if mark:
            self._marked = mark[1].decode()
            self._account.begin(self._marked)
        if pause_s:
            self._ends_s = self._loop.time() + pause_s
            self._timer = self._loop.call_later(pause_s, self._reply)
        else:
            self._reply()

    def _reply(self) -> None:
        if not STREAM.search(self._body):
            self._over()
            self.transport.write(WHOLE)
        elif self._chosen.token_s:
            self.transport.write(HEAD + FIRST)
            self._timer = self._loop.call_later(self._chosen.token_s, self._part, self._chosen.chunks)
        else:
            self._over()
            self.transport.writelines(
                [HEAD, FIRST, *(PARTS[n % 10] for n in range(self._chosen.chunks)), self._last()]
            )

    def _part(self, left: int) -> None:
        if not left:
            self._over()
            self.transport.write(self._last())
            return
        self.transport.write(PARTS[left % 10])
        self._timer = self._loop.call_later(self._chosen.token_s, self._part, left - 1)

    def _last(self) -> bytes:
        return STOP + (COUNTS if COUNTED.search(self._body) else b"") + DONE

    def _over(self) -> None:
        self._timer = None
        if self._marked:
            self._account.end(self._marked)
            self._marked = ""

    def connection_lost(self, exc: Exception | None) -> None:
        """Notice a hang-up, or act as if it was not noticed yet."""
        self._account.open -= 1
        if self._timer is None:
            return
        self._timer.cancel()
        self._account.hung_up += 1
        if self._marked and self._chosen.late_s:
            until_s = min(self._ends_s, self._loop.time() + self._chosen.late_s)
            self._loop.call_at(until_s, self._over)
        else:
            self._over()


async def serve(chosen: argparse.Namespace, ready: Callable[[str], None]) -> None:
    """Serve until cancelled."""
    account = chosen.account
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(account, chosen), "127.0.0.1", chosen.port, backlog=2048
    )
    ready(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    await server.serve_forever()


def main() -> None:
    """Serve as a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--port", type=int, default=0)
    add("--before-s", type=float, default=0.0, help="seconds before the first byte of an answer without a mark")
    add("--chunks", type=int, default=16, help="parts of a stream")
    add("--token-s", type=float, default=0.0, help="seconds before every part of a stream")
    add("--late-s", type=float, default=0.0, help="seconds after which a hang-up is noticed")
    chosen = parser.parse_args(namespace=argparse.Namespace(account=Account()))
    uvloop.run(serve(chosen, lambda url: print(url, flush=True)))


if __name__ == "__main__":
    main()
