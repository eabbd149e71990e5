"""What is kept of requests and answers is bounded in bytes and in age, and goes where nothing comes after it."""

from __future__ import annotations

import asyncio
import json

import pytest

from orla_lg.serve.past_calls import captures
from orla_lg.serve.past_calls.captures import CaptureBook, Capturing, streamed_text


def keep(book: CaptureBook, workflow: str, answer: bytes = b"{}", now: float = 0.0) -> None:
    made = Capturing(book, {"messages": [workflow]}, lambda: now)
    made.feed(answer)
    made.end(f"id-{workflow}", "s", workflow, None, "b")


def test_the_oldest_goes_where_there_is_no_room() -> None:
    book = CaptureBook(2000, 60, clock=lambda: 0.0)
    for name in ("a", "b", "c"):
        keep(book, name, b"x" * 600)
    assert [len(list(book.of(name))) for name in ("a", "b", "c")] == [0, 1, 1] and book.bytes <= 2000
    keep(book, "large", b"x" * 3000)
    assert not list(book.of("large")) and list(book.of("c"))


def test_what_is_too_old_goes_without_another_coming() -> None:
    now = [0.0]
    book = CaptureBook(10_000, 0.01, clock=lambda: now[0])
    keep(book, "a")
    assert list(book.of("a"))
    now[0] = 1.0

    async def wait() -> None:
        sweeping = asyncio.ensure_future(book.swept())  # noqa: TID251
        while book.bytes:
            await asyncio.sleep(0.005)
        sweeping.cancel()

    asyncio.run(asyncio.wait_for(wait(), 5))
    assert book.bytes == 0


def test_a_long_answer_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "MOST_ANSWER_BYTES", 10)
    book = CaptureBook(10_000, 60, clock=lambda: 0.0)
    made = Capturing(book, {}, lambda: 0.0)
    for part in (b"12345", b"67890", b"more"):
        made.feed(part)
    made.end("id", "s", "w", None, None)
    (found,) = book.of("w")
    assert (found.answer, found.is_cut) == (b"1234567890", True)


def test_the_text_of_a_stream_is_found_on_each_wire() -> None:
    events = [
        {"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "chat "}}]},
        {"choices": [{"text": "completion "}]}, {"type": "content_block_delta", "delta": {"text": "message "}},
        {"type": "response.output_text.delta", "delta": "response"}, {"choices": []}, ["no event"],
    ]  # fmt: skip
    lines = "".join(f"event: x\ndata: {json.dumps(each)}\n\n" for each in events) + "data: [DONE]\n\n"
    assert streamed_text(lines) == "chat completion message response"
