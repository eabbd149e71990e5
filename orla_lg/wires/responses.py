"""OpenAI's Responses API.

What chat completions cannot say is refused with the field's name: answers that a server keeps
(``previous_response_id``, ``conversation``, ``background``, prompts by their id), tools that a server runs, files.
What is said there in another way is decided so:

* ``store`` is true by default, and hardly a caller relies on it: an answer is not kept, and says so in its own
  ``store: false``. A request that does rely on it names the answer, and is refused.
* ``truncation: "auto"`` asks for a prompt that is cut where it is too long; here the engine refuses that prompt.
* Reasoning that an engine gives in the clear is a summary where one was asked for, else the item's content. What
  comes back in a later request goes to the engine again; encrypted reasoning, which its maker alone reads, does not.
* A developer's message is the system's: every chat template knows that role.
* A model's refusal, in a later request, is what it said.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from orla_lg.core.call import OBJECT, Ask, Usage
from orla_lg.wires import reading, responses_heard
from orla_lg.wires.reading import Garbage, count
from orla_lg.wires.responses_answer import answer_of
from orla_lg.wires.responses_request import chat_of, essentials_of, messages_as_far_as_known
from orla_lg.wires.responses_stream import ResponseEvents
from orla_lg.wires.wire import Body, ChunkIn, Wire

ID_PREFIX = "resp_"
"""Of an answer's id; LangChain looks for it."""

_BEFORE_AN_ANSWER = frozenset({"response.created", "response.queued", "response.in_progress"})
_DONE = re.compile(rb"(?:\A|[\r\n])data:\s*\[DONE\]")
_BLANK_LINE = re.compile(rb"\r\n\r\n|\n\r?\n|\r\r")
_LAST = re.compile(
    rb"(?:\A|[\r\n])event:\s*(?:response\.(?:completed|incomplete|failed)|error)\s*[\r\n]"
    rb'|"type"\s*:\s*"(?:response\.(?:completed|incomplete|failed)|error)"'
)
"""What marks the last event of a stream. Inside a text a quote is escaped, so it cannot be part of an answer."""
_COUNTED = re.compile(rb'"output_tokens"\s*:\s*\d')
"""What only the last event of a stream has, near its end: it holds the whole answer, and may be long."""
_USAGE = b'"usage"'
_OPENS = re.compile(rb"\s*:\s*(?=\{)")
"""What stands between a key and an object."""
_DECODER = json.JSONDecoder()
USAGE_BYTES = 4096
"""A longer object is none of token counts."""
MANY_LOOKS = 16
"""So many objects under that key are looked at."""
_CALLERS = (
    "invalid", "image", "unsupported_image", "empty_image", "failed_to_download_image", "bio_policy",
    "misalignment_policy", "data_residency", "context_length",
)  # fmt: skip
"""How the codes of errors begin that another attempt meets again."""


class Responses(Wire):
    """The API of ``POST /v1/responses``."""

    name = "responses"
    title = "OpenAI's Responses API"
    paths = ("/responses",)
    path = "v1/responses"

    def ask_of(self, body: Body) -> Ask:
        """Return what a request asks for; items that no message can say count as they came."""
        body = body if isinstance(body, OBJECT) else {}
        text, tools = body.get("text"), body.get("tools")
        form = text.get("format") if isinstance(text, OBJECT) else None
        return Ask(
            model=str(body.get("model") or "auto"),
            messages=messages_as_far_as_known(body),
            stream=bool(body.get("stream")),
            json_schema=isinstance(form, OBJECT) and form.get("type") == "json_schema",
            tools=bool(tools),
            schemas=tools if isinstance(tools, list | tuple) else (),
            max_tokens=count(body.get("max_output_tokens")) or None,
        )

    def with_model(self, body: Body, model: str, parameters: Body) -> dict[str, Any]:
        """Return the request for a backend that speaks this wire; what a mapping sets stands under its names here."""
        if not parameters:
            return {**body, "model": model}
        given = dict(parameters)
        given |= given.pop("extra_body", None) or {}
        bounds = [given.pop(name, None) for name in ("max_completion_tokens", "max_tokens")]
        if (bound := next((each for each in bounds if each is not None), None)) is not None:
            given["max_output_tokens"] = bound
        merged = {**given, **body, "model": model}
        for name in ("reasoning_effort", "response_format", "verbosity"):
            if name in given and name not in body:
                del merged[name]
        if (effort := given.get("reasoning_effort")) is not None:
            _add(merged, "reasoning", {"effort": effort})
        if (form := given.get("response_format")) is not None:
            _add(merged, "text", {"format": _flat(form)})
        if (verbosity := given.get("verbosity")) is not None:
            _add(merged, "text", {"verbosity": verbosity})
        return merged

    def fields(self, fields: Body) -> Body:
        """Return an engine's own fields; vLLM's ``request_id`` becomes the answer's id, by which clients know it."""
        name = fields.get("request_id")
        return {**fields, "request_id": f"{ID_PREFIX}{name}"} if isinstance(name, str) else fields

    def brings(self, event: bytes) -> bool:
        """Whether an event brings the first of an answer: those before say that it is in progress."""
        said = reading.payload(event)
        if said is None:
            return _DONE.search(event) is not None
        kind, error = said.get("type"), said.get("error")
        if kind == "response.failed":
            answer = said.get("response")
            error = answer.get("error") if isinstance(answer, Mapping) else {}
        elif kind == "error":
            error = error or said
        if error or kind in ("response.failed", "error"):
            _heed(error)
            return True
        if not isinstance(kind, str):
            raise Garbage(f"expected an event of {self.title}, got {event[: reading.SHOWN_BYTES]!r}")
        return kind.startswith("response.") and kind not in _BEFORE_AN_ANSWER

    def usage_in(self, data: bytes) -> Usage | None:
        """Return the token counts of an answer, or of the last event of a stream."""
        for usage in _usages(data):
            details = usage.get("input_tokens_details")
            asked, said = count(usage.get("input_tokens")), count(usage.get("output_tokens"))
            if asked is None and said is None:
                continue  # a property of that name in the schema of a tool, which an answer repeats
            cached = count(details.get("cached_tokens")) if isinstance(details, Mapping) else None
            believed = cached if cached is not None and cached <= (asked or 0) else None
            return Usage(asked or 0, believed, said or 0)
        return None

    def ends_well(self, tail: bytes) -> bool:
        """Whether the last event is there: the answer completed, incomplete or failed."""
        if _DONE.search(tail) is not None:
            return True
        events = [part for part in _BLANK_LINE.split(tail) if part.strip() and not part.lstrip().startswith(b":")]
        if not events or not _BLANK_LINE.search(tail[tail.rfind(events[-1]) :]):
            return False  # its last event is cut off
        return _LAST.search(events[-1]) is not None or (len(events) == 1 and _COUNTED.search(tail) is not None)

    calls_mark = b"function_call"

    def chunks(self) -> ChunkIn:
        """Return what reads the events of a stream."""
        return responses_heard.chunk_in

    def message_in(self, answer: Body) -> Body | None:
        """Return the message of a whole answer."""
        return responses_heard.message_in(answer)

    def to_chat(self, body: Body) -> dict[str, Any]:
        """Return a request as a chat completion's."""
        return chat_of(body)

    def essentials(self, body: Body) -> Body:  # noqa: D102
        return essentials_of(body)

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:
        """Return the answer in one piece."""
        return answer_of(completion, asked)

    def reader(self, asked: Body) -> ResponseEvents:
        """Return what makes events of chunks."""
        return ResponseEvents(asked)

    def error(self, status: int, message: str, *, kind: str | None = None) -> dict[str, Any]:
        """Return an error as OpenAI writes them."""
        usual = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
        return {"error": {"message": message, "type": kind or usual, "param": None, "code": kind}}


def _add(body: dict[str, Any], key: str, given: Body) -> None:
    """Put *given* into the object under *key*, but not against what stands there."""
    said = body.get(key)
    if said is None or isinstance(said, OBJECT):
        body[key] = {**given, **(said or {})}


def _flat(form: Any) -> Any:
    """Return a ``response_format`` as a ``text.format``."""
    schema = form.get("json_schema") if isinstance(form, OBJECT) else None
    return {"type": "json_schema", **schema} if isinstance(schema, OBJECT) else form


def _heed(error: Any) -> None:
    """Judge why an answer did not begin.

    Raises:
        Garbage: Another attempt may succeed.
    """
    code = error.get("code") if isinstance(error, Mapping) else None
    callers = code < 500 if isinstance(code, int) else isinstance(code, str) and code.startswith(_CALLERS)
    if not callers:
        raise Garbage(f"the engine failed: {error}", error)


def _usages(data: bytes) -> Iterator[dict[str, Any]]:
    """Return the whole objects under ``usage`` in *data*, the last one first."""
    at = len(data)
    for _ in range(MANY_LOOKS):
        if (at := data.rfind(_USAGE, 0, at)) < 0:
            return
        if (opens := _OPENS.match(data, at + len(_USAGE))) is not None:
            text = data[opens.end() : opens.end() + USAGE_BYTES].decode("utf-8", "replace")
            with contextlib.suppress(ValueError, RecursionError):
                yield _DECODER.raw_decode(text)[0]


RESPONSES = Responses()
