"""Ollama's own API as wires: ``/api/chat``, ``/api/generate``, ``/api/embed`` and the older ``/api/embeddings``.

A stream there is one JSON object on each line, and requests are streamed unless they say otherwise. Token counts are
the whole prompt's: ``prompt_eval_count`` includes what was cached, ``prompt_eval_cached_count`` says how much of it
was (from version 0.33.3 on), and ``prompt_eval_duration`` is what the rest took. Early versions and 0.30 count only
the rest, or nothing of a prompt that was cached whole, and say no cached tokens; then none are known.

The middle of the embeddings' wires is OpenAI's embeddings (``v1/embeddings``), not chat completions.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
import struct
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, ClassVar

from orla_lg.core.call import Ask, Usage
from orla_lg.wires import ollama_answers as answers
from orla_lg.wires import ollama_heard, reading
from orla_lg.wires import ollama_requests as requests
from orla_lg.wires.reading import MAX_COUNT, SHOWN_BYTES, Garbage, count, is_number
from orla_lg.wires.wire import Body, ChunkIn, ChunkReader, Untranslatable, Wire

_FIGURE = re.compile(rb'"((?:prompt_)?eval_count|prompt_eval_cached_count|prompt_eval_duration)"\s*:\s*(\d{1,18})\b')
_DONE = re.compile(rb'"done"\s*:\s*true\b')
_MAX_PARSED_BYTES = 2**20
_NS = 1e9
_UNIT_ERROR = 1e-4
"""Of an embedding's length: one that is so near to 1 is left as it is."""
_TOO_FAR = 1e30
"""No embedding has a number as large."""


class _OllamaWire(Wire):
    """What Ollama's wires have in common."""

    framing = "ndjson"
    _input: ClassVar[str]
    """The field that holds what is asked; where it is empty, a model is only loaded or unloaded."""

    def fields(self, fields: Body) -> Body:
        """Return nothing: fields of chat completions have no place here."""
        return {}

    @abstractmethod
    def _messages_of(self, body: Body) -> Sequence[Any]:
        """Return a request's prompt as messages of chat completions.

        Raises:
            Untranslatable: It is none.
        """

    def ask_of(self, body: Any) -> Ask:
        """Return what a request asks for."""
        if not isinstance(body, Mapping):
            return Ask("auto", ())
        tools: Sequence[Any] = ()
        try:
            messages = self._messages_of(body)
            tools = requests.tools_in(body)
        except Untranslatable:  # the engine refuses it as well
            messages = ()
        return Ask(
            model=str(body.get("model") or "auto"),
            messages=messages,
            stream=self.streams(body),
            json_schema=isinstance(body.get("format"), Mapping),
            tools=bool(tools),
            schemas=tools,
            max_tokens=requests.max_tokens(body) or None,
        )

    def asks(self, body: Body) -> bool:
        """Whether a request asks a model for anything."""
        return bool(body.get(self._input))

    def streams(self, body: Body) -> bool:
        """Whether the answer is to be a stream: unless the request says that it is not."""
        return requests.is_streamed(body)

    def with_model(self, body: Body, model: str, parameters: Body) -> dict[str, Any]:
        """Return the request for a backend that speaks this wire; most *parameters* become ``options``."""
        added = requests.natively(parameters, body) if parameters else {}
        return {**body, **added, "model": model}

    def usage_in(self, data: bytes) -> Usage | None:
        """Return the token counts in a whole answer, or in what is kept of a stream."""
        line, said = _last(data)
        if said is None:
            said = {name.decode(): int(figure) for name, figure in _FIGURE.findall(line)}
        prompt, answer = count(said.get("prompt_eval_count")), count(said.get("eval_count"))
        if prompt is None and answer is None:
            return None
        cached, took_ns = count(said.get("prompt_eval_cached_count")), said.get("prompt_eval_duration")
        return Usage(
            prompt or 0,
            cached if cached is not None and cached <= (prompt or 0) else None,
            answer or 0,
            took_ns / _NS if is_number(took_ns) and 0 < took_ns < MAX_COUNT * _NS else None,
        )

    def ends_well(self, tail: bytes) -> bool:
        """Whether the end of a stream says that the answer is whole."""
        line, said = _last(tail)
        if said is not None:
            return said.get("done") is True
        return line.endswith(b"}") and _DONE.search(line) is not None

    def error(self, status: int, message: str, *, kind: str | None = None) -> dict[str, Any]:
        """Return the body of an answer, or a line of a stream, that says that a request failed."""
        return {"error": message}


class _Generating(_OllamaWire):
    """A wire by which a model answers with text."""

    _piece: ClassVar[str]
    """The field that each line of a stream has."""

    @staticmethod
    @abstractmethod
    def _says(text: str, thinking: str, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return how an answer, or a piece of one, holds these."""

    def brings(self, event: bytes) -> bool:
        """Whether a line brings the first of an answer.

        Raises:
            Garbage: It is no line of this wire, or says that the engine failed.
        """
        if not (line := event.strip()):
            return False
        said = reading.parse(line)
        if not isinstance(said, dict):
            raise Garbage(f"expected a JSON object, got {line[:SHOWN_BYTES]!r}")
        if error := said.get("error"):
            raise Garbage(f"the engine failed: {error}", said)
        if self._piece not in said and said.get("done") is not True:
            raise Garbage(f"expected an object with {self._piece!r}, got {line[:SHOWN_BYTES]!r}")
        return True

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:
        """Return the answer in one piece to the request *asked*, from a whole chat completion."""
        return answers.whole(completion, asked, self._says)

    def reader(self, asked: Body) -> ChunkReader:
        """Return what turns the stream of a chat completion into lines."""
        return answers.Lines(asked, self._says)


class _Chat(_Generating):
    """``/api/chat``."""

    name = "ollama-chat"
    title = "Ollama's chat"
    paths = ("/api/chat",)
    path = "api/chat"
    _input = "messages"
    _piece = "message"
    _says = staticmethod(answers.as_message)

    def _messages_of(self, body: Body) -> Sequence[Any]:
        return requests.chat_messages(body)

    def chunks(self) -> ChunkIn:
        """Return what reads the lines of a stream."""
        return ollama_heard.LineChunks()

    def message_in(self, answer: Body) -> Body | None:
        """Return the message of a whole answer."""
        return ollama_heard.message_in(answer)

    def to_chat(self, body: Body) -> dict[str, Any]:
        """Return a request as a chat completion's, without its model."""
        return requests.chat_request(body)


class _Generate(_Generating):
    """``/api/generate``."""

    name = "ollama-generate"
    title = "Ollama's generate"
    paths = ("/api/generate",)
    path = "api/generate"
    _input = "prompt"
    _piece = "response"
    _says = staticmethod(answers.as_response)

    def _messages_of(self, body: Body) -> Sequence[Any]:
        return requests.generate_messages(body)

    def to_chat(self, body: Body) -> dict[str, Any]:
        """Return a request as a chat completion's, without its model."""
        return requests.generate_request(body)


class _Embedding(_OllamaWire):
    """A wire by which a model answers with vectors, each whole and in one piece."""

    embeds = True

    def _messages_of(self, body: Body) -> Sequence[Any]:
        return ()  # nothing of it stays in a cache

    def ask_of(self, body: Body) -> Ask:
        """Return what a request asks for."""
        return replace(super().ask_of(body), max_tokens=0, embeds=True)

    def _texts(self, body: Body) -> Sequence[str]:
        given = body.get(self._input)
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Untranslatable(self._input, "what is no text")
        return texts

    def streams(self, body: Body) -> bool:
        """Whether the answer is to be a stream; there are none."""
        return False

    def brings(self, event: bytes) -> bool:
        """Whether *event*, a whole answer, brings one."""
        if not isinstance(reading.parse(event), dict):
            raise Garbage(f"expected a JSON object, got {event[:SHOWN_BYTES]!r}")
        return True

    def ends_well(self, tail: bytes) -> bool:
        """Whether an answer is whole; it is where its object is closed."""
        return tail.rstrip().endswith(b"}")

    def to_chat(self, body: Body) -> dict[str, Any]:
        """Return a request as one for OpenAI's embeddings, without its model."""
        texts = self._texts(body)
        if not any(texts):
            raise Untranslatable(self._input, "an order to load a model")
        dimensions = count(body.get("dimensions"))
        return {"input": texts, "encoding_format": "float", **({"dimensions": dimensions} if dimensions else {})}

    def reader(self, asked: Body) -> ChunkReader:
        """Refuse: embeddings have no stream."""
        raise Garbage("embeddings have no stream")

    def _vectors(self, answer: Body, asked: Body) -> list[list[float]]:
        """Return the vectors, in the order of the texts.

        Raises:
            Garbage: They are none, or not as many as the texts.
        """
        entries = reading.list_in(answer, "data")
        if not all(isinstance(entry, Mapping) for entry in entries):
            raise Garbage("an embedding is no object")
        placed = sorted(enumerate(entries), key=lambda each: (count(each[1].get("index")) or 0, each[0]))
        vectors = [_vector(entry.get("embedding")) for _, entry in placed]
        if len(vectors) != (wanted := len(self._texts(asked))):
            raise Garbage(f"{len(vectors)} embeddings of {wanted} texts")
        return vectors


class _Embed(_Embedding):
    """``/api/embed``: several texts at once, and vectors of length 1."""

    name = "ollama-embed"
    title = "Ollama's embed"
    paths = ("/api/embed",)
    path = "api/embed"
    _input = "input"

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:
        """Return the answer to the request *asked*, from OpenAI's embeddings."""
        said: dict[str, Any] = {"model": str(completion.get("model") or asked.get("model") or "")}
        said["embeddings"] = [_of_length_1(vector) for vector in self._vectors(completion, asked)]
        prompt = count(reading.object_in(completion, "usage").get("prompt_tokens"))
        return said if prompt is None else {**said, "prompt_eval_count": prompt}


class _Embeddings(_Embedding):
    """``/api/embeddings``: one text, and no token counts."""

    name = "ollama-embeddings"
    title = "Ollama's embeddings"
    paths = ("/api/embeddings",)
    path = "api/embeddings"
    _input = "prompt"

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:
        """Return the answer to the request *asked*, from OpenAI's embeddings."""
        return {"embedding": self._vectors(completion, asked)[0]}


def _last(data: bytes) -> tuple[bytes, Mapping[str, Any] | None]:
    """Return the last line, and the object that it is; an answer in one piece may have lines of its own.

    There is no object where the line's beginning is lost, or where it is too long to be parsed for some figures.
    """
    whole = data.strip()
    line = whole.rpartition(b"\n")[2]
    for candidate in (line, whole) if whole.startswith(b"{") else (line,):
        if len(candidate) <= _MAX_PARSED_BYTES:
            with suppress(Garbage):
                said = reading.parse(candidate)
                return line, said if isinstance(said, Mapping) else {}
    return line, None


def _vector(given: Any) -> list[float]:
    if isinstance(given, str):  # in base64, as OpenAI's clients ask for it
        try:
            packed = base64.b64decode(given, validate=True)
            given = list(struct.unpack(f"<{len(packed) // 4}f", packed))
        except (binascii.Error, ValueError, struct.error) as error:
            raise Garbage(f"an embedding is neither numbers nor their bytes ({error})") from error
    if isinstance(given, list) and given and all(is_number(each) and abs(each) < _TOO_FAR for each in given):
        return given
    raise Garbage("an embedding is no list of numbers")


def _of_length_1(vector: list[float]) -> list[float]:
    length = math.hypot(*vector)
    if length == 0 or abs(length - 1) < _UNIT_ERROR:
        return vector
    return [each / length for each in vector]


OLLAMA_CHAT = _Chat()
OLLAMA_GENERATE = _Generate()
OLLAMA_EMBED = _Embed()
OLLAMA_EMBEDDINGS = _Embeddings()
