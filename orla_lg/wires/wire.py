"""A wire: an API by which models are called, as far as a call's way through the core must know it.

A wire knows which requests are its own, what a request asks for, how a backend's model is put in, what the bytes of
an answer say (its first token, its token counts, its end), and how request and answer are said in chat completions,
which every engine speaks. Clients and the gateway hold the same values; none of them has a state of its own.

Chat completions are the middle: a request of another wire becomes one, and the answer comes back from one, for a
backend whose engine does not speak the caller's wire.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol

from orla_lg.core.call import Ask, Usage

Body = Mapping[str, Any]
"""A request's or an answer's JSON object. A wire never changes one in place."""


class Untranslatable(Exception):
    """What a request asks for cannot be said in chat completions.

    Args:
        field: Where in the request, as a path: ``tools[0].type``.
        what: What stands there and cannot be carried: ``a web_search tool``.
    """

    def __init__(self, field: str, what: str) -> None:
        super().__init__(f"{field}: {what} cannot be said in chat completions")
        self.field = field
        self.what = what


class ChunkReader(Protocol):
    """Turns the chunks of a chat completion, as they come, into the bytes of a stream of another wire."""

    def feed(self, chunk: Body) -> bytes:
        """Return the events that one chunk brings as bytes; an ``error`` object in it becomes one."""
        ...

    def end(self) -> bytes:
        """Return the events that close the stream, after the last chunk."""
        ...


ChunkIn = Callable[[bytes], Body | None]
"""Returns what one event of a stream brings, as a chunk of a chat completion; ``None`` for nothing."""


def chunk_of(delta: Body, reason: str | None = None) -> Body:
    """Return a chunk of a chat completion with one choice."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def _no_chunk(event: bytes) -> Body | None:
    return None


class Wire(ABC):
    """One API. Its instances are values without state: ``MESSAGES``, ``RESPONSES`` and the like."""

    name: ClassVar[str]
    """In configuration, records and tables: ``chat``, ``completions``, ``embeddings``, ``responses``, ``messages``,
    ``ollama-chat`` and so on."""
    title: ClassVar[str]
    """In prose: ``Anthropic's Messages``."""
    paths: ClassVar[tuple[str, ...]]
    """How the paths of its requests end: ``("/v1/messages",)``."""
    path: ClassVar[str]
    """Where an engine that speaks it serves it, from the root of its server: ``v1/messages``."""
    framing: ClassVar[Literal["sse", "ndjson"]] = "sse"
    """What separates the events of a stream: blank lines, or the ends of lines."""
    carries: ClassVar[frozenset[str]] = frozenset()
    """Headers of a request, in lower case, that are part of the API, as its version is; no credentials."""
    embeds: ClassVar[bool] = False
    """Whether it asks for vectors: then OpenAI's embeddings stand in for chat completions."""
    templated: ClassVar[bool] = True
    """Whether its prompts are messages that the model's chat template joins."""
    counts_on_demand: ClassVar[bool] = False
    """Whether a stream brings token counts only if ``stream_options.include_usage`` asks for them."""

    # What is asked

    @abstractmethod
    def ask_of(self, body: Body) -> Ask:
        """Return what a request asks for, whatever a caller wrote: what the engine will refuse asks for nothing.

        Its messages are in the form of chat completions, so that the same prompt is the same prefix on each wire.
        """

    def asks(self, body: Body) -> bool:
        """Whether a request asks a model for anything; others, as orders to load a model, are no calls."""
        return True

    def streams(self, body: Body) -> bool:
        """Whether the answer is to be a stream."""
        return bool(body.get("stream"))

    def with_model(self, body: Body, model: str, parameters: Body) -> dict[str, Any]:
        """Return the request for a backend that speaks this wire.

        Args:
            body: As the caller wrote it.
            model: The backend's.
            parameters: What a mapping sets, named as in chat completions; never against what the caller wrote.
        """
        return {**parameters, **body, "model": model}

    def fields(self, fields: Body) -> Body:
        """Return an engine's own fields, which an adapter puts into a chat completion, as they stand on this wire.

        Those that cannot stand there are left out.
        """
        return fields

    def headers(self, key: str) -> dict[str, str]:
        """Return how a backend's key is said."""
        return {"Authorization": f"Bearer {key}"}

    # What an answer says

    @abstractmethod
    def brings(self, event: bytes) -> bool:
        """Whether one event of a stream, with its closing blank line or line end, brings the first of an answer.

        Raises:
            Garbage: It is no event of this wire, or says that the engine failed: another attempt may succeed.
        """

    @abstractmethod
    def usage_in(self, data: bytes) -> Usage | None:
        """Return the token counts in a whole answer, or in what is kept of a stream: its first event that brings
        something and its last 16 KiB, joined."""

    @abstractmethod
    def ends_well(self, tail: bytes) -> bool:
        """Whether the end of a stream says that the answer is whole."""

    def is_over(self, tail: bytes) -> bool:
        """Whether nothing of the answer can follow: a connection that breaks after that takes nothing from it."""
        return self.ends_well(tail)

    # What is heard of an answer, in the terms of chat completions

    calls_mark: ClassVar[bytes] = b"tool_calls"
    """What stands in the first event of a stream that brings anything of a tool call."""

    def chunks(self) -> ChunkIn:
        """Return what reads the events of one stream, each as the chunk that a chat completion would bring.

        A chunk has what is heard: text and tool calls, and why the answer ends. It raises ``Garbage`` where an event
        is none.
        """
        return _no_chunk

    def message_in(self, answer: Body) -> Body | None:
        """Return the message of a whole answer, as a chat completion has it; ``None`` for one without.

        Raises:
            Garbage: It is no answer of this wire.
        """
        return None

    # Between wires

    @abstractmethod
    def to_chat(self, body: Body) -> dict[str, Any]:
        """Return a request as a chat completion's, without its model.

        Raises:
            Untranslatable: It asks for what cannot be said there.
        """

    def essentials(self, body: Body) -> Body:
        """Return a request without what it only offers or allows, and chat completions cannot say.

        A model may do without a tool that its server would run, and an answer without what may be included in it.
        What is asked for stays, and is refused by ``to_chat``.
        """
        return body

    @abstractmethod
    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:
        """Return the answer in one piece to the request *asked*, from a whole chat completion.

        Raises:
            Garbage: The completion has no answer in it.
        """

    @abstractmethod
    def reader(self, asked: Body) -> ChunkReader:
        """Return what turns the stream of a chat completion into that of an answer to the request *asked*."""

    @abstractmethod
    def error(self, status: int, message: str, *, kind: str | None = None) -> dict[str, Any]:
        """Return the body of an answer that says that a request failed.

        Args:
            status: The HTTP status that goes with it.
            message: What was wrong, where, and what would be right.
            kind: The error's type or code as an engine says it in chat completions.
        """
