"""A small server that speaks the OpenAI wire as engines do, answers deterministically and fails on demand.

In a test: ``with StubEngine() as engine: ...``, served by a thread of the test process. Elsewhere:
``python -m tests.stub_engine --port 0`` prints its URL and serves until it is stopped. With ``slots`` it looks
like llama.cpp's server: ``/props``, slots that keep the last prompt, and ``/slots/N?action=erase``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import json
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

MODEL = "stub-model"
CREATED = 1_700_000_000
PATIENCE_S = 20.0

Fault = Literal["reset", "cut", "garbage", "hang"]


class Gate:
    """Holds a reply back until the test opens it."""

    def __init__(self) -> None:
        self._opened: Future[None] = Future()

    def open(self) -> None:
        """Let the reply go on. Idempotent."""
        with contextlib.suppress(Exception):
            self._opened.set_result(None)

    async def passed(self) -> None:
        """Wait until it is open."""
        await asyncio.shield(asyncio.wrap_future(self._opened))


@dataclass(frozen=True)
class Reply:
    """How to treat one chat completion; the default is a plain success."""

    text: str | None = None
    """The answer; ``None`` derives it from the messages."""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    before_s: float = 0.0
    """Seconds before the first byte."""
    token_s: float = 0.0
    """Seconds before every chunk of a stream."""
    gate: Gate | None = None
    """Waited for before the first byte."""
    mid_gate: Gate | None = None
    """Waited for after the first content chunk of a stream."""
    fault: Fault | None = None
    """``reset`` ends the connection before the first byte, ``cut`` in the middle of the answer, ``garbage``
    answers what is no JSON, ``hang`` never answers."""
    ignore_stream: bool = False
    """Answers whole, streamed or not."""


OK = Reply()


@dataclass(frozen=True)
class Seen:
    """One request, as it arrived."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case."""
    raw: bytes = field(repr=False)
    body: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The API key that was sent."""
        return self.headers.get("authorization", "").removeprefix("Bearer ")

    @property
    def last(self) -> str:
        """The text of the last message."""
        return text_of(self.body["messages"][-1])


def text_of(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def fill(schema: dict[str, Any], text: str, defs: dict[str, Any] | None = None) -> Any:
    """Return a value that follows a JSON schema, made of *text*."""
    defs = schema.get("$defs") or defs or {}
    if "$ref" in schema:
        return fill(defs[schema["$ref"].rpartition("/")[2]], text, defs)
    if "enum" in schema:
        return schema["enum"][0]
    if "anyOf" in schema:
        return fill(schema["anyOf"][0], text, defs)
    kind = schema.get("type")
    if kind == "object":
        return {name: fill(each, text, defs) for name, each in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [fill(schema.get("items") or {}, text, defs)]
    found = re.search(r"\d+", text)  # the number in the question, as a model that can call tools would take it
    number = int(found[0]) if found else len(text)
    return {"integer": number, "number": float(number), "boolean": True, "null": None}.get(str(kind), text)


def message_for(body: dict[str, Any], text: str | None) -> dict[str, Any]:
    """Return the assistant's message: the same for the same messages."""
    messages = body["messages"]
    last, said = messages[-1], text_of(messages[-1])
    if text is not None:
        return {"role": "assistant", "content": text}
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return {"role": "assistant", "content": json.dumps(fill(form["json_schema"]["schema"], said))}
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if tools and last["role"] == "user" and choice != "none":
        wanted = choice["function"]["name"] if isinstance(choice, dict) else tools[0]["function"]["name"]
        function = next(tool["function"] for tool in tools if tool["function"]["name"] == wanted)
        arguments = json.dumps(fill(function.get("parameters") or {"type": "object"}, said))
        call = {"id": f"call_{_digest(body)[:8]}", "type": "function"}
        call |= {"function": {"name": wanted, "arguments": arguments}}
        return {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"role": "assistant", "content": f"{len(messages)} {last['role']} said: {said}"}


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body["messages"], sort_keys=True).encode()).hexdigest()


def _words(messages: list[dict[str, Any]]) -> list[str]:
    return [word for message in messages for word in (message["role"], *text_of(message).split())]


class StubEngine:
    """The engine and what a test may do with it.

    Args:
        models: Names that ``/v1/models`` lists.
        slots: Looks like llama.cpp with so many slots; 0 is an engine without any.
        key: The API key it insists on; ``None`` takes any.
        rule: Says how to treat a chat completion; ``script`` comes first.
        port: 0 takes a free one.
    """

    def __init__(
        self,
        *,
        models: tuple[str, ...] = (MODEL,),
        slots: int = 0,
        key: str | None = None,
        rule: Callable[[Seen], Reply | None] | None = None,
        port: int = 0,
    ) -> None:
        self.models = models
        self.key = key
        self.rule = rule
        self.script: deque[Reply] = deque()
        self.requests: list[Seen] = []
        self.in_flight = 0
        self.peak = 0
        self.collisions = 0
        """How often two calls sat in one slot at once."""
        self.erased = 0
        self.keep_log = True
        """Off for benchmarks, where the log would grow without end."""
        self.port = port
        self._slots: list[list[str]] = [[] for _ in range(slots)]
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stub-engine", daemon=True)

    # What a test does

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def listen(self) -> None:
        """Accept connections, on the same port as before."""
        self._on_loop(self.serve())

    def refuse(self) -> None:
        """Be gone: close the port and every connection."""
        self._on_loop(self._stop())

    def _on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    @property
    def chats(self) -> list[Seen]:
        """The chat completions asked for."""
        return [seen for seen in self.requests if seen.path == "/v1/chat/completions"]

    def wait(self, condition: Callable[[StubEngine], bool]) -> None:
        """Wait until *condition* holds; it is looked at whenever a request comes or goes."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self), PATIENCE_S), "waited in vain for the stub"

    async def await_(self, condition: Callable[[StubEngine], bool]) -> None:
        """``wait`` for a task."""
        await asyncio.to_thread(self.wait, condition)

    # Serving

    async def serve(self) -> None:
        self._server = await asyncio.start_server(
            self._connected, "127.0.0.1", self.port, reuse_address=True, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while (seen := await _read(reader)) is not None:
                await _Exchange(self, seen, reader, writer).answer()
        except (ConnectionError, asyncio.IncompleteReadError, _Gone):
            _reset(writer)
        except asyncio.CancelledError:
            _reset(writer)  # only ``_stop`` cancels; the connection dies with the engine
        finally:
            self._tasks.discard(task)
            writer.close()

    def reply_to(self, seen: Seen) -> Reply:
        if self.key is not None and seen.key != self.key:
            return Reply(status=401)
        if self.script:
            return self.script.popleft()
        return (self.rule(seen) if self.rule is not None else None) or OK

    @contextlib.contextmanager
    def working(self, body: dict[str, Any]) -> Iterator[int]:
        """Count a chat completion while it is worked on; gives the number of cached tokens."""
        slot = body.get("id_slot")
        with self._changed:
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            if slot is not None:
                self.collisions += slot in self._busy
                self._busy.add(slot)
            self._changed.notify_all()
        try:
            yield self._cached(slot, body)
        finally:
            with self._changed:
                self.in_flight -= 1
                self._busy.discard(slot)  # type: ignore[arg-type]
                self._changed.notify_all()

    def _cached(self, slot: int | None, body: dict[str, Any]) -> int:
        if slot is None:
            return 0
        words, before = _words(body["messages"]), self._slots[slot]
        self._slots[slot] = words
        if body.get("cache_prompt") is False:
            return 0
        pairs = zip(words, before, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def note(self, seen: Seen) -> None:
        with self._changed:
            if self.keep_log:
                self.requests.append(seen)
            self._changed.notify_all()

    def slot_action(self, seen: Seen) -> tuple[int, dict[str, Any]]:
        if not self._slots:
            return 404, _error("not found", 404)
        index = int(seen.path.rpartition("/")[2])
        if seen.query.get("action") != "erase":
            return 400, _error("Invalid action", 400)
        with self._changed:
            self.collisions += index in self._busy
            self.erased += 1
        count, self._slots[index] = len(self._slots[index]), []
        return 200, {"id_slot": index, "n_erased": count}

    def props(self) -> dict[str, Any] | None:
        if not self._slots:
            return None
        return {"total_slots": len(self._slots), "default_generation_settings": {"n_ctx": 4096}, "build_info": "stub"}


class _Gone(Exception):
    """The connection ends here."""


def _reset(writer: asyncio.StreamWriter) -> None:
    """End the connection as a dying process does: with a reset, not with a polite end."""
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def _error(message: str, status: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "stub_error", "code": status}}


async def _read(reader: asyncio.StreamReader) -> Seen | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    raw = await reader.readexactly(int(headers.get("content-length", 0)))
    parts = urlsplit(target)
    query = {name: values[0] for name, values in parse_qs(parts.query).items()}
    return Seen(method, parts.path, query, headers, raw, json.loads(raw) if raw else {})


class _Exchange:
    """One request and its answer."""

    def __init__(
        self, engine: StubEngine, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.engine, self.seen, self.reader, self.writer = engine, seen, reader, writer

    async def answer(self) -> None:
        engine, seen = self.engine, self.seen
        if seen.path == "/v1/chat/completions":
            with engine.working(seen.body) as cached:
                engine.note(seen)
                await self._chat(engine.reply_to(seen), cached)
            return
        engine.note(seen)
        if seen.path == "/v1/models":
            data = [{"id": name, "object": "model", "created": CREATED, "owned_by": "stub"} for name in engine.models]
            self._send(200, {"object": "list", "data": data})
        elif seen.path == "/v1/responses":
            self._send(200, self._response())
        elif seen.path == "/props" and (props := engine.props()) is not None:
            self._send(200, props)
        elif seen.path.startswith("/slots/"):
            self._send(*engine.slot_action(seen))
        else:
            self._send(404, _error("not found", 404))

    def _response(self) -> dict[str, Any]:
        content = [{"type": "output_text", "text": "a response", "annotations": []}]
        message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": content}
        return {
            "id": "resp_1", "object": "response", "created_at": CREATED, "status": "completed",
            "model": self.seen.body.get("model"), "output": [message], "parallel_tool_calls": True,
            "tool_choice": "auto", "tools": [], "error": None, "incomplete_details": None, "instructions": None,
            "metadata": {}, "temperature": 1.0, "top_p": 1.0,
        }  # fmt: skip

    async def _chat(self, reply: Reply, cached: int) -> None:
        if reply.before_s:
            await self._while_there(asyncio.sleep(reply.before_s))
        if reply.gate is not None:
            await self._while_there(reply.gate.passed())
        if reply.fault == "hang":
            await self._while_there(asyncio.Event().wait())
        if reply.fault == "reset":
            raise _Gone
        if reply.status != 200:
            self._send(reply.status, _error(f"the stub answers {reply.status}", reply.status), reply.headers)
            return
        if reply.fault == "garbage":
            self._send_raw(200, b"<html>this is no JSON", reply.headers)
            return
        message = message_for(self.seen.body, reply.text)
        usage = self._usage(message, cached)
        if self.seen.body.get("stream") and not reply.ignore_stream:
            await self._stream(reply, message, usage)
            return
        answer = {**self._top("chat.completion"), "choices": [_choice(message)], "usage": usage}
        if reply.fault == "cut":
            data = json.dumps(answer).encode()
            self.writer.write(_head(200, ("content-length", str(len(data)))) + data[: len(data) // 2])
            await self.writer.drain()
            raise _Gone
        self._send(200, answer, reply.headers)

    async def _while_there(self, pause: Any) -> None:
        """Wait for *pause* as long as the client does."""
        pausing, leaving = asyncio.ensure_future(pause), asyncio.ensure_future(self.reader.read(1))  # noqa: TID251
        try:
            done, _ = await asyncio.wait({pausing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            pausing.cancel()
            leaving.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await leaving
        if leaving in done:
            raise _Gone

    def _top(self, kind: str) -> dict[str, Any]:
        body = self.seen.body
        return {"id": f"chatcmpl-{_digest(body)[:12]}", "object": kind, "created": CREATED, "model": body["model"]}

    def _usage(self, message: dict[str, Any], cached: int) -> dict[str, Any]:
        prompt = len(_words(self.seen.body["messages"]))
        answer = len(str(message.get("content") or message.get("tool_calls")).split())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def _stream(self, reply: Reply, message: dict[str, Any], usage: dict[str, Any]) -> None:
        headers = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
        self.writer.write(_head(200, *headers, *reply.headers))
        async for event in self._events(reply, message, usage):
            if self.writer.is_closing():
                raise _Gone
            data = b"data: " + event + b"\n\n"
            self.writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            if reply.token_s or reply.mid_gate is not None:
                await self.writer.drain()
        self.writer.write(b"0\r\n\r\n")
        await self.writer.drain()

    async def _events(self, reply: Reply, message: dict[str, Any], usage: dict[str, Any]) -> AsyncIterator[bytes]:
        top, parts = self._top("chat.completion.chunk"), _deltas(message)
        for number, delta in enumerate(parts):
            if reply.token_s:
                await self._while_there(asyncio.sleep(reply.token_s))
            if number == 2 and reply.fault == "cut":
                await self.writer.drain()
                raise _Gone
            if number == 2 and reply.mid_gate is not None:
                await self.writer.drain()
                await self._while_there(reply.mid_gate.passed())
            finish = None if number < len(parts) - 1 else "tool_calls" if message.get("tool_calls") else "stop"
            yield json.dumps({**top, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode()
        if (self.seen.body.get("stream_options") or {}).get("include_usage"):
            yield json.dumps({**top, "choices": [], "usage": usage}).encode()
        yield b"[DONE]"

    def _send(self, status: int, answer: dict[str, Any], headers: tuple[tuple[str, str], ...] = ()) -> None:
        self._send_raw(status, json.dumps(answer).encode(), headers)

    def _send_raw(self, status: int, data: bytes, headers: tuple[tuple[str, str], ...] = ()) -> None:
        mine = (("content-type", "application/json"), ("content-length", str(len(data))), *headers)
        self.writer.write(_head(status, *mine) + data)


def _head(status: int, *headers: tuple[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}", *(f"{n}: {v}" for n, v in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _choice(message: dict[str, Any]) -> dict[str, Any]:
    return {"index": 0, "message": message, "finish_reason": "tool_calls" if message.get("tool_calls") else "stop"}


def _deltas(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Cut a message as engines do: the role, then its pieces, then an empty end."""
    parts: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    for call in message.get("tool_calls") or ():
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        head = {"index": 0, "id": call["id"], "type": "function", "function": {"name": name, "arguments": ""}}
        parts.append({"tool_calls": [head]})
        for at in range(0, len(arguments), 8):
            parts.append({"tool_calls": [{"index": 0, "function": {"arguments": arguments[at : at + 8]}}]})
    words = (message.get("content") or "").split(" ")
    if message.get("content"):
        parts += [{"content": word if at == 0 else f" {word}"} for at, word in enumerate(words)]
    return [*parts, {}]


def main() -> None:
    """Serve as a process of its own; prints the URL when ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--before-s", type=float, default=0.0, help="seconds before the first byte of an answer")
    parser.add_argument("--token-s", type=float, default=0.0, help="seconds before every chunk of a stream")
    parser.add_argument("--text", default=None, help="what to answer; otherwise it depends on the messages")
    chosen = parser.parse_args()
    reply = Reply(text=chosen.text, before_s=chosen.before_s, token_s=chosen.token_s)
    engine = StubEngine(models=(chosen.model,), slots=chosen.slots, rule=lambda seen: reply, port=chosen.port)
    engine.keep_log = False
    asyncio.run(_serve_forever(engine))


async def _serve_forever(engine: StubEngine) -> None:
    await engine.serve()
    print(engine.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
