"""Requests and answers that stages were told to keep (``capture_io``): in memory, bounded in bytes and in age.

They are what users wrote and models answered. So nothing is kept unless the configuration allows it and a stage asks
for it, nothing of it is written to a disk, and what is too old goes even where nothing comes after it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

MOST_ANSWER_BYTES = 8 << 20
"""Of one answer; the rest is left out."""

SWEEP_S = 5.0
"""How often what is too old is looked for."""


@dataclass(frozen=True, slots=True)
class Captured:
    """One call's request and answer."""

    completion: str
    stage: str
    workflow: str
    """As its caller named it."""
    tenant: str | None
    backend: str | None
    request: bytes
    answer: bytes
    is_stream: bool
    is_cut: bool
    """Whether the answer was longer than is kept."""
    at_s: float

    @property
    def size(self) -> int:
        """How much of the bound it takes."""
        return len(self.request) + len(self.answer) + len(self.stage) + len(self.workflow) + 200

    def answered(self) -> Any:
        """Return the answer: its JSON, or the text that a stream brought."""
        text = self.answer.decode("utf-8", "replace")
        if self.is_stream:
            return streamed_text(text)
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text

    def asked(self) -> Any:
        """Return the request."""
        return json.loads(self.request)


class CaptureBook:
    """What is kept. Of the server's loop.

    Args:
        most_bytes: Of all together; the oldest go first.
        age_s: What is older goes.
        clock: Seconds since 1970.
    """

    def __init__(self, most_bytes: int, age_s: float, *, clock: Callable[[], float] = time.time) -> None:
        self._most_bytes, self._age_s, self._clock = most_bytes, age_s, clock
        self._kept = deque[Captured]()
        self.bytes = 0

    def add(self, captured: Captured) -> None:
        """Keep one, if there is room for it at all."""
        if captured.size > self._most_bytes:
            return
        self._kept.append(captured)
        self.bytes += captured.size
        while self.bytes > self._most_bytes:
            self._drop()
        self.sweep()

    def of(self, workflow: str) -> Iterator[Captured]:
        """Yield what is kept of a workflow, the oldest first."""
        self.sweep()
        yield from [each for each in self._kept if each.workflow == workflow]

    def sweep(self) -> None:
        """Let what is too old go."""
        before_s = self._clock() - self._age_s
        while self._kept and self._kept[0].at_s < before_s:
            self._drop()

    def _drop(self) -> None:
        self.bytes -= self._kept.popleft().size

    async def swept(self) -> None:
        """Let what is too old go, for ever."""
        while True:
            await asyncio.sleep(min(SWEEP_S, self._age_s))
            self.sweep()


class Capturing:
    """One call whose answer is on its way.

    Args:
        book: Where it is kept.
        request: Its body.
        clock: Seconds since 1970.
    """

    def __init__(self, book: CaptureBook, request: Mapping[str, Any], clock: Callable[[], float] = time.time) -> None:
        self._book, self._clock = book, clock
        self._request = json.dumps(request).encode()
        self._answer = bytearray()
        self._is_cut = False
        self.is_stream = False
        """Whether the answer comes in events."""

    def feed(self, data: bytes) -> None:
        """Take in what the caller gets next."""
        room = MOST_ANSWER_BYTES - len(self._answer)
        self._is_cut = self._is_cut or len(data) > room
        self._answer += data[: max(0, room)]

    def end(self, completion: str, stage: str, workflow: str, tenant: str | None, backend: str | None) -> None:
        """Keep it."""
        self._book.add(
            Captured(
                completion, stage, workflow, tenant, backend, self._request, bytes(self._answer), self.is_stream,
                self._is_cut, self._clock(),
            )
        )  # fmt: skip


def streamed_text(events: str) -> str:
    """Return the text that a stream's events bring, of chat completions, messages and responses alike."""
    parts = list[str]()
    for line in events.splitlines():
        if line.startswith("data:") and (said := _text_in(line[5:].strip())):
            parts.append(said)
    return "".join(parts)


def _text_in(data: str) -> str | None:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict):
        return None
    delta = event.get("delta")
    if event.get("type") == "response.output_text.delta":
        said = delta
    elif isinstance(delta, dict):
        said = delta.get("text")
    else:
        choices = event.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else {}
        said = first.get("text") if isinstance(first, dict) and "text" in first else _content(first)
    if said is None and set(event) == {"content"}:  # v1's execute
        said = event["content"]
    return said if isinstance(said, str) else None


def _content(choice: Any) -> Any:
    delta = choice.get("delta") if isinstance(choice, dict) else None
    return delta.get("content") if isinstance(delta, dict) else None
