"""The chunks of a chat completion as the events of OpenAI's Responses API.

An item is shown as it grows, one after the other, as OpenAI does it: what reads a stream may count on that. Where an
engine mixes the pieces of several calls, or marks them in a way that only the end explains, the rest of the stream is
kept back until its end.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from orla_lg.wires import responses_answer as answer
from orla_lg.wires.reading import Garbage, list_in, object_in
from orla_lg.wires.tool_calls import ToolCalls
from orla_lg.wires.wire import Body

MAX_ANSWER_CHARS = 64 * 2**20
"""A longer answer is not translated."""
CALL_CHARS = 64
"""What a piece of a call counts at least."""

Event = dict[str, Any]


class ResponseEvents:
    """Turns the chunks of one chat completion into the events of the answer to the request *asked*."""

    def __init__(self, asked: Body) -> None:
        self._asked = asked
        self._begun: dict[str, Any] | None = None
        self._usage: Any = None
        self._reason: Any = None
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._calls = ToolCalls()
        self._shown: dict[str, _Call] = {}
        """Calls that are shown as they grow, by their ids."""
        self._numbers: set[int] = set()
        self._kept_back: list[tuple[str, str, list[dict[str, Any]]]] | None = None
        """Texts that wait for the end, once pieces of calls do."""
        self._chars = 0
        self._sequence = 0
        self._unsent: list[str] = []
        self._over = False

    def feed(self, chunk: Body) -> bytes:
        """Return the events that one chunk brings as bytes.

        Raises:
            Garbage: It is no chunk of a chat completion.
        """
        try:
            return b"" if self._over else self._written(self._events_of(chunk))
        except RecursionError as error:
            raise Garbage("a chunk is nested too deeply") from error

    def end(self) -> bytes:
        """Return the events that close the stream; one that brought no answer has failed."""
        if self._over:
            return b""
        try:
            return self._written(self._closing())
        except (Garbage, RecursionError) as error:
            return self._written(self._failed({"message": f"{error}"}))

    def _written(self, events: Iterable[Event]) -> bytes:
        for event in events:  # where one of them raises, those before it come with the next
            event["sequence_number"] = self._sequence
            self._sequence += 1
            self._unsent.append(f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n")
        sent, self._unsent = self._unsent, []
        return "".join(sent).encode()

    def _events_of(self, chunk: Body) -> Iterator[Event]:
        yield from self._beginning(chunk)
        if said := chunk.get("error"):
            yield from self._failed(said)
            return
        if isinstance(chunk.get("usage"), Mapping):
            self._usage = chunk["usage"]
        if (choice := answer.first_choice(chunk)) is None:
            return
        if choice.get("finish_reason"):
            self._reason = choice["finish_reason"]
        delta = object_in(choice, "delta")
        if not (delta or self._items):
            delta = object_in(choice, "message")  # the whole at once
        yield from self._say("reasoning", answer.reasoning_in(delta))
        yield from self._say("text", answer.text_in(delta), answer.logprobs_in(choice))
        yield from self._say("refusal", answer.refusal_in(delta))
        for call in list_in(delta, "tool_calls"):
            yield from self._call(call)

    def _beginning(self, chunk: Body) -> Iterator[Event]:
        if self._begun is None:
            self._begun = answer.begun(chunk, self._asked)
            for kind in ("response.created", "response.in_progress"):
                yield {"type": kind, "response": self._begun}

    # Texts

    def _say(self, kind: str, text: str, logprobs: Iterable[dict[str, Any]] = ()) -> Iterator[Event]:
        if not text:
            return
        self._count(len(text))
        if isinstance(self._open, _Call) and not self._open.is_whole and self._kept_back is None:
            self._kept_back = []
        if self._kept_back is not None:
            self._kept_back.append((kind, text, [*logprobs]))
        else:
            yield from self._show(kind, text, [*logprobs])

    def _show(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        item = self._open
        if kind == "reasoning":
            if not isinstance(item, _Thought):
                item = _Thought(len(self._items), summarized=answer.wants_summary(self._asked))
                yield from self._begin(item)
            yield from item.add(text)
        else:
            if not isinstance(item, _Message):
                item = _Message(len(self._items))
                yield from self._begin(item)
            yield from item.add(kind, text, logprobs)

    def _begin(self, item: _Item) -> Iterator[Event]:
        if self._open is not None:
            yield from self._open.end()
        self._open = item
        self._items.append(item)
        yield from item.begin()

    def _count(self, chars: int) -> None:
        self._chars += chars
        if self._chars > MAX_ANSWER_CHARS:
            raise Garbage(f"an answer of more than {MAX_ANSWER_CHARS} characters")

    # Calls

    def _call(self, piece: Any) -> Iterator[Event]:
        self._calls.add(piece)
        function = object_in(piece, "function")
        index, name, arguments = piece.get("index"), function.get("name"), function.get("arguments")
        self._count(CALL_CHARS + (len(arguments) if isinstance(arguments, str) else 0))
        if self._kept_back is not None:
            return
        call = self._open
        if not (arguments is None or isinstance(arguments, str)):
            self._kept_back = []
        elif isinstance(call, _Call) and index == call.number and not name and piece.get("id") in (None, "", call.id):
            yield from call.add(arguments or "")
        elif name and self._is_next(index, piece.get("id"), name):
            begun = _Call(len(self._items), index, piece["id"], name)
            self._numbers.add(index)
            self._shown[begun.id] = begun
            yield from self._begin(begun)
            yield from begun.add(arguments or "")
        else:
            self._kept_back = []

    def _is_next(self, index: Any, call_id: Any, name: Any) -> bool:
        """Whether a piece plainly begins a call, and none goes on."""
        if isinstance(self._open, _Call) and not self._open.is_whole:
            return False
        plain = type(index) is int and isinstance(call_id, str) and isinstance(name, str)
        return plain and bool(call_id and name) and index not in self._numbers and call_id not in self._shown

    # The end

    def _closing(self) -> Iterator[Event]:
        if self._begun is None:
            raise Garbage("the stream brought no answer")
        yield from self._rest_of_calls()
        for kind, text, logprobs in self._kept_back or ():
            yield from self._show(kind, text, logprobs)
        cut = isinstance(self._reason, str) and self._reason in answer.CUT
        if self._open is not None:
            yield from self._open.end("incomplete" if cut else "completed")
        items = [item.whole() for item in self._items]
        whole = answer.finished(self._begun, items, {"usage": self._usage}, self._reason)
        self._over = True
        yield {"type": f"response.{whole['status']}", "response": whole}

    def _rest_of_calls(self) -> Iterator[Event]:
        for said in [*answer.calls_in(self._calls)]:
            if (call := self._shown.pop(said["call_id"], None)) is None:
                call = _Call(len(self._items), -1, said["call_id"], said["name"])
                yield from self._begin(call)
            yield from call.complete(said["name"], said["arguments"])

    def _failed(self, said: Any) -> Iterator[Event]:
        yield from self._beginning({})
        assert self._begun is not None
        self._over = True
        items = [item.whole() for item in self._items]
        if self._open is not None:
            items[-1]["status"] = "incomplete"
        message = said.get("message") if isinstance(said, Mapping) else said
        kind = said.get("code") or said.get("type") if isinstance(said, Mapping) else None
        failed = answer.failed({**self._begun, "output": items}, kind, message)
        yield {"type": "response.failed", "response": failed}


# Items as they grow


class _Item:
    """An item of the output, and the events that show it.

    Args:
        at: Its place in the output.
        prefix: Of its id.
    """

    def __init__(self, at: int, prefix: str) -> None:
        self.item_id = answer.fresh(prefix)
        self.is_done = False
        self.status = "completed"
        self._at = at

    def whole(self) -> dict[str, Any]:
        """Return the item as far as it came."""
        raise NotImplementedError

    def begin(self) -> Iterator[Event]:
        """Show that it begins."""
        raise NotImplementedError

    def end(self, status: str = "completed") -> Iterator[Event]:
        """Show that it is done."""
        self.is_done, self.status = True, status
        yield {"type": "response.output_item.done", "output_index": self._at, "item": self.whole()}

    def _added(self, **empty: Any) -> Event:
        item = {**self.whole(), **empty}
        return {"type": "response.output_item.added", "output_index": self._at, "item": item}

    def _event(self, kind: str, **said: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self.item_id, "output_index": self._at, **said}


class _Thought(_Item):
    """Reasoning, in the clear or as its own summary."""

    def __init__(self, at: int, *, summarized: bool) -> None:
        super().__init__(at, "rs")
        self._pieces: list[str] = []
        self._summarized = summarized
        self._kind = "reasoning_summary_text" if summarized else "reasoning_text"
        self._part = "reasoning_summary_part" if summarized else "content_part"
        self._place = {"summary_index" if summarized else "content_index": 0}

    def whole(self) -> dict[str, Any]:
        item = answer.reasoning_item(self.item_id, "".join(self._pieces), summarized=self._summarized)
        return {**item, "status": self.status} if self.status == "incomplete" else item

    def begin(self) -> Iterator[Event]:
        yield self._added(summary=[], **({} if self._summarized else {"content": []}))
        yield self._event(f"{self._part}.added", **self._place, part=self._part_of(""))

    def add(self, text: str) -> Iterator[Event]:
        """Show a piece of it."""
        self._pieces.append(text)
        yield self._event(f"{self._kind}.delta", **self._place, delta=text)

    def end(self, status: str = "completed") -> Iterator[Event]:
        text = "".join(self._pieces)
        yield self._event(f"{self._kind}.done", **self._place, text=text)
        yield self._event(f"{self._part}.done", **self._place, part=self._part_of(text))
        yield from super().end(status)

    def _part_of(self, text: str) -> dict[str, Any]:
        return {"type": "summary_text" if self._summarized else "reasoning_text", "text": text}


class _Message(_Item):
    """What the model said: texts and refusals."""

    def __init__(self, at: int) -> None:
        super().__init__(at, "msg")
        self._parts: list[tuple[str, list[str], list[dict[str, Any]]]] = []
        """Of each its kind, its pieces and what is known of its tokens."""

    def whole(self) -> dict[str, Any]:
        item = answer.message_item(self.item_id, [self._part_of(*part) for part in self._parts])
        return {**item, "status": self.status}

    def begin(self) -> Iterator[Event]:
        yield self._added(status="in_progress")

    def add(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Show a piece of it."""
        if not self._parts or self._parts[-1][0] != kind:
            yield from self._end_part()
            self._parts.append((kind, [], []))
            yield self._event("content_part.added", **self._place, part=self._part_of(kind, [], []))
        self._parts[-1][1].append(text)
        self._parts[-1][2].extend(logprobs)
        if kind == "text":
            yield self._event("output_text.delta", **self._place, delta=text, logprobs=logprobs)
        else:
            yield self._event("refusal.delta", **self._place, delta=text)

    def end(self, status: str = "completed") -> Iterator[Event]:
        yield from self._end_part()
        yield from super().end(status)

    def _end_part(self) -> Iterator[Event]:
        if not self._parts:
            return
        kind, pieces, logprobs = self._parts[-1]
        if kind == "text":
            yield self._event("output_text.done", **self._place, text="".join(pieces), logprobs=logprobs)
        else:
            yield self._event("refusal.done", **self._place, refusal="".join(pieces))
        yield self._event("content_part.done", **self._place, part=self._part_of(*self._parts[-1]))

    @property
    def _place(self) -> dict[str, int]:
        return {"content_index": len(self._parts) - 1}

    @staticmethod
    def _part_of(kind: str, pieces: list[str], logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        text = "".join(pieces)
        return answer.text_part(text, logprobs) if kind == "text" else answer.refusal_part(text)


class _Call(_Item):
    """A call of a function.

    Args:
        at: Its place in the output.
        number: The engine's for it.
        call_id: By which its result is given.
        name: The function's.
    """

    def __init__(self, at: int, number: int, call_id: str, name: str) -> None:
        super().__init__(at, "fc")
        self.number, self.id = number, call_id
        self._name = name
        self._pieces: list[str] = []

    @property
    def is_whole(self) -> bool:
        """Whether its arguments are a whole object so far."""
        try:
            return isinstance(json.loads("".join(self._pieces)), dict)
        except (ValueError, RecursionError):
            return False

    def whole(self) -> dict[str, Any]:
        arguments = "".join(self._pieces)
        item = answer.call_item(self.item_id, call_id=self.id, name=self._name, arguments=arguments)
        return {**item, "status": self.status}

    def begin(self) -> Iterator[Event]:
        yield self._added(status="in_progress")

    def add(self, text: str) -> Iterator[Event]:
        """Show a piece of its arguments."""
        if text:
            self._pieces.append(text)
            yield self._event("function_call_arguments.delta", delta=text)

    def complete(self, name: str, arguments: str) -> Iterator[Event]:
        """Show what is missing of it."""
        shown = "".join(self._pieces)
        if not self.is_done and arguments.startswith(shown):
            yield from self.add(arguments[len(shown) :])
        self._name, self._pieces = name, [arguments]

    def end(self, status: str = "completed") -> Iterator[Event]:
        yield self._event("function_call_arguments.done", arguments="".join(self._pieces))
        yield from super().end(status)
