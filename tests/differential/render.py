"""Bytes of a scripted answer: what the model says, as one JSON object or as a stream of events."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from tests.differential.script import Answer, Numbering, Reply, ToolCall

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "stub-model"}


def body_of(reply: Reply, request: dict[str, Any]) -> tuple[bytes, list[int], str]:
    """Return a reply's body, where its events end, and the content type that suits it."""
    if reply.body is not None:
        suits = "application/json" if reply.body[:1] in "{[" else "text/html"
        return reply.body.encode("utf-8", "surrogateescape"), [], suits
    streams = (bool(request.get("stream")) or reply.always_streams) and not reply.ignores_stream
    if not streams:
        return json.dumps(whole(reply), ensure_ascii=reply.dialect.ascii).encode(), [], "application/json"
    asked = bool((request.get("stream_options") or {}).get("include_usage"))
    events = [event.encode() for event in stream(reply, asked)]
    ends, at = [], 0
    for event in events:
        at += len(event)
        ends.append(at)
    return b"".join(events), ends, "text/event-stream"


# Whole


def whole(reply: Reply) -> dict[str, Any]:
    """Return the answer in one piece."""
    answer = reply.answer
    message: dict[str, Any] = {"role": "assistant", "content": answer.content}
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    choice = {"index": 0, "message": message, "finish_reason": answer.finish}
    found = {**HEAD, "object": "chat.completion", **_choices(answer, choice, "message")}
    if reply.usage.place != "never":
        found["usage"] = reply.usage.value
    return found


def _choices(answer: Answer, choice: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the ``choices`` field in the shape that the script wants."""
    if answer.choices == "missing":
        return {}
    without = {name: value for name, value in choice.items() if name != part}
    return {
        "choices": {
            "one": [choice],
            "null": None,
            "empty": [],
            "two": [choice, {**choice, "index": 1, part: {"role": "assistant", "content": "other"}}],
            "text": "none",
            "number": 3,
            "no message": [without],
            "null message": [{**choice, part: None}],
            "no index": [{name: value for name, value in choice.items() if name != "index"}],
            "null parts": [None, choice],
        }[answer.choices]
    }


# Streamed


def stream(reply: Reply, usage_asked: bool) -> Iterator[str]:
    """Return the events of the answer's stream, each with what stands before it."""
    dialect = reply.dialect
    chunks = [json.dumps(chunk, ensure_ascii=dialect.ascii) for chunk in _chunks(reply, usage_asked)]
    if dialect.broken_at is not None and chunks:
        at = min(dialect.broken_at, len(chunks) - 1)
        chunks[at] = chunks[at][: len(chunks[at]) // 2]
    if dialect.error_at is not None:
        chunks = [*chunks[: dialect.error_at], json.dumps(dialect.error)]
    elif dialect.end in ("done", "no finish", "no blank line"):
        chunks.append("[DONE]")
    elif dialect.end == "data after":
        chunks += ["[DONE]", '{"id": "x", "choices": [{"index": 0, "delta": {"content": "too late"}}]}']
    elif dialect.end == "done twice":
        chunks += ["[DONE]", "[DONE]"]
    for number, chunk in enumerate(chunks):
        lines = [f"{line}{dialect.eol}" for line in dialect.fields]
        parts = _over_lines(chunk) if dialect.several_lines else [chunk]
        lines += [f"{dialect.data}{part}{dialect.eol}" for part in parts]
        last = number == len(chunks) - 1
        close = "" if last and dialect.end == "no blank line" else dialect.eol
        before = dialect.lead if number == 0 else dialect.between.replace("\n", dialect.eol)
        yield before + "".join(lines) + close


def _over_lines(chunk: str) -> list[str]:
    """Cut JSON between its tokens."""
    try:
        return json.dumps(json.loads(chunk), indent=1, ensure_ascii=False).split("\n")
    except json.JSONDecodeError:
        return [chunk]


def _chunks(reply: Reply, usage_asked: bool) -> Iterator[dict[str, Any]]:
    answer, usage, dialect = reply.answer, reply.usage, reply.dialect
    base: dict[str, Any] = {**HEAD, "object": "chat.completion.chunk"}
    if usage.place == "in each chunk":
        base["usage"] = usage.value
    elif usage_asked and usage.place == "only where asked":
        base["usage"] = None  # as OpenAI does
    finishes = dialect.end not in ("no finish", "no finish, no done")
    for number, delta in enumerate(deltas(reply)):
        with_role = dialect.roles == "each" or (dialect.roles == "first" and number == 0)
        part = {"role": "assistant", **delta} if with_role else delta
        yield {**base, **_choices(answer, {"index": 0, "delta": part, "finish_reason": None}, "delta")}
    if finishes:
        end = {**base, **_choices(answer, {"index": 0, "delta": {}, "finish_reason": answer.finish}, "delta")}
        yield end | ({"usage": usage.value} if usage.place == "with the finish" else {})
    if usage.place == "always last" or (usage.place == "only where asked" and usage_asked):
        yield {**base, "choices": [], "usage": usage.value}


def deltas(reply: Reply) -> Iterator[dict[str, Any]]:
    """Return the pieces of the message."""
    answer, step = reply.answer, max(1, reply.dialect.pieces)
    yield {"content": "" if answer.content is not None else None}
    content = answer.content or ""
    for at in range(0, len(content), step):
        yield {"content": content[at : at + step]}
    numbering = reply.numbering
    if numbering.pieces == -1 and answer.calls:
        pieces = [_piece(numbering, position, call, 0, call.arguments) for position, call in enumerate(answer.calls)]
        yield {"tool_calls": pieces}
        return
    for position, call in enumerate(answer.calls):
        for number, text in enumerate(_cut(call.arguments, numbering.pieces)):
            yield {"tool_calls": [_piece(numbering, position, call, number, text)]}


def _cut(arguments: str, size: int) -> list[str]:
    if size <= 0:
        return [arguments]
    return ["", *(arguments[at : at + size] for at in range(0, len(arguments), size))]


def _piece(numbering: Numbering, position: int, call: ToolCall, number: int, arguments: str) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": arguments}
    piece: dict[str, Any] = {"function": function}
    if numbering.index != "omitted":
        piece["index"] = {
            "right": position,
            "from one": position + 1,
            "all zero": 0,
            "null": None,
            "sparse": position * 7 + 3,
            "huge": 3_000_000 + position,
            "negative": -1 - position,
            "text": str(position),
            "float": float(position),
        }[numbering.index]
    first = number == 0
    if first or numbering.ids == "each":
        piece["id"] = call.id
    elif numbering.ids == "empty later":
        piece["id"] = ""
    if first or numbering.names == "each":
        function["name"] = call.name
    elif numbering.names == "empty later":
        function["name"] = ""
    if numbering.types == "each" or (first and numbering.types == "first"):
        piece["type"] = "function"
    return piece


# Encoded and cut


def encoded(data: bytes, encoding: str) -> tuple[bytes, str | None]:
    """Return bytes in a content encoding, and the label that goes with them."""
    packed = gzip.compress(data, 1, mtime=0)
    if encoding == "deflate":
        return zlib.compress(data, 1), "deflate"
    if encoding == "raw deflate":
        return zlib.compress(data, 1)[2:-4], "deflate"
    return {
        "identity": (data, None),
        "gzip": (packed, "gzip"),
        "x-gzip": (packed, "x-gzip"),
        "gzip twice": (gzip.compress(packed, 1, mtime=0), "gzip, gzip"),
        "bad gzip": (packed[:12] + b"\xff\xff" + packed[14:], "gzip"),
        "cut gzip": (packed[:-9], "gzip"),
        "br": (data, "br"),  # a label that nobody here can read, over what is not encoded
        "mislabelled": (data, "gzip"),
        "empty gzip": (b"", "gzip"),
    }[encoding]


def cut(data: bytes, cuts: tuple[int, ...], ends: list[int]) -> list[bytes]:
    """Return *data* in pieces: as the script wants, else as the events end."""
    if not cuts:
        bounds = [end for end in ends if end < len(data)]
        return [data[a:b] for a, b in zip([0, *bounds], [*bounds, len(data)], strict=True)] if data else []
    pieces, at, sizes = [], 0, cycle(cuts)
    while at < len(data):
        size = next(sizes) if len(pieces) < 400 else len(data)
        pieces.append(data[at : at + size])
        at += size
    return pieces
