"""Chat completions as answers of Ollama's own API, in one piece and as JSON lines.

Token counts and times are those that the engine counted and took, where it says them: llama.cpp says both, others
only count. Counts are the whole prompt's, as Ollama's own are (``prompt_eval_count``, of which
``prompt_eval_cached_count`` were cached); times are in nanoseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from orla_lg.wires import reading
from orla_lg.wires.reading import Garbage, count, is_number, list_in, object_in
from orla_lg.wires.tool_calls import ToolCalls
from orla_lg.wires.wire import Body

Says = Callable[[str, str, Sequence[Mapping[str, Any]]], dict[str, Any]]
"""How an answer, or a piece of one, holds its text, its thinking and its tool calls."""

_STOPS = frozenset({"stop", "tool_calls", "function_call"})
"""Of the reasons for which an answer ends; calls need none of their own here."""

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))

_YEAR_10000_S = 253_402_300_800
_NS_OF_MS = 1_000_000


def as_message(text: str, thinking: str, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say it as ``/api/chat`` does."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = list(calls)
    return {"message": message}


def as_response(text: str, thinking: str, calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Say it as ``/api/generate`` does, where there are no tools."""
    return {"response": text, "thinking": thinking} if thinking else {"response": text}


def whole(completion: Body, asked: Body, says: Says) -> dict[str, Any]:
    """Return a chat completion as an answer in one piece.

    Raises:
        Garbage: It has no answer in it, or calls that cannot be said here.
    """
    if error := completion.get("error"):
        raise Garbage(f"the engine failed: {_message_of(error)}", error)
    choices = list_in(completion, "choices")
    choice = choices[0] if choices else None
    if not isinstance(choice, Mapping) or not isinstance(message := choice.get("message"), Mapping):
        raise Garbage("the completion has no message")
    said = says(*_said(message), _calls(list_in(message, "tool_calls")))
    end = _end(choice.get("finish_reason"), object_in(completion, "usage"), object_in(completion, "timings"))
    return {**_top(completion, asked), **said, **end, **_logprobs(choice)}


class Lines:
    """Turns the chunks of a chat completion's stream into JSON lines.

    Args:
        asked: The request.
        says: How a line holds what a chunk brings.
    """

    def __init__(self, asked: Body, says: Says) -> None:
        self._asked, self._says = asked, says
        self._made: tuple[Any, Any] = (None, None)
        self._top = _top({}, asked)
        """What each line says, as of the last chunk: the model and the time."""
        self._calls = ToolCalls()
        self._called = 0
        """How much of them came, in characters."""
        self._finish: Any = None
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}
        self._failed = False
        """Whether an error ended the stream."""

    def feed(self, chunk: Body) -> bytes:
        """Return the lines that one chunk brings.

        Raises:
            Garbage: It is none.
        """
        if self._failed:
            return b""
        if error := chunk.get("error"):
            return self._fail(_message_of(error))
        made = chunk.get("model"), chunk.get("created")
        if made != self._made and any(made):
            self._made, self._top = made, _top(chunk, self._asked)
        self._usage = object_in(chunk, "usage") or self._usage
        self._timings = object_in(chunk, "timings") or self._timings
        lines = b""
        for choice in list_in(chunk, "choices"):
            if not isinstance(choice, Mapping):
                raise Garbage(f"a choice is {type(choice).__name__}, expected an object")
            if not choice.get("index"):
                lines += self._line_of(choice)
        return lines

    def _line_of(self, choice: Mapping[str, Any]) -> bytes:
        delta = object_in(choice, "delta") or object_in(choice, "message")
        for call in list_in(delta, "tool_calls"):
            try:
                self._calls.add(call)
                self._called += len(repr(call))
            except RecursionError as error:
                raise Garbage("a tool call is nested too deeply") from error
        if self._called > reading.MAX_EVENT_BYTES:
            raise Garbage(f"the tool calls are longer than {reading.MAX_EVENT_BYTES} characters")
        text, thinking = _said(delta)
        probabilities = _logprobs(choice)
        line = b""
        if text or thinking or probabilities:
            line = self._line({**self._says(text, thinking, ()), "done": False, **probabilities})
        if finish := choice.get("finish_reason"):
            self._finish = finish
            line += self._called_line()
        return line

    def _called_line(self) -> bytes:
        """Return the line of the tool calls that came since the last one; they come whole here."""
        calls, self._calls = _calls(self._calls.whole()), ToolCalls()
        return self._line({**self._says("", "", calls), "done": False}) if calls else b""

    def end(self) -> bytes:
        """Return the lines that close the stream, the last of them with the counts."""
        if self._failed:
            return b""
        try:
            called = self._called_line()
        except Garbage as error:
            return self._fail(str(error))
        return called + self._line({**self._says("", "", ()), **_end(self._finish, self._usage, self._timings)})

    def _line(self, said: Mapping[str, Any]) -> bytes:
        return _line({**self._top, **said})

    def _fail(self, message: str) -> bytes:
        self._failed = True
        return _line({"error": message})


def _line(said: Mapping[str, Any]) -> bytes:
    try:
        return _JSON.encode(said).encode("utf-8", "replace") + b"\n"
    except (ValueError, RecursionError) as error:
        raise Garbage(f"the answer cannot be written ({type(error).__name__})") from error


def _top(completion: Body, asked: Body) -> dict[str, Any]:
    """Return the model that answered, and when."""
    made_s = count(completion.get("created"))
    made = datetime.fromtimestamp(made_s, UTC) if made_s and made_s < _YEAR_10000_S else datetime.now(UTC)
    model = str(completion.get("model") or asked.get("model") or "")
    return {"model": model, "created_at": f"{made:%Y-%m-%dT%H:%M:%S}Z"}


def _said(message: Mapping[str, Any]) -> tuple[str, str]:
    """Return text and reasoning of a message or of a delta.

    Raises:
        Garbage: One is neither a text nor a list of parts.
    """
    text, thinking = _parts(message, "content")
    reasoning = next((_text(message, key) for key in ("reasoning_content", "reasoning") if message.get(key)), "")
    return text or _text(message, "refusal"), reasoning or thinking


def _parts(message: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return the text in a content of parts, as Mistral's models send it, and the thinking in it."""
    if not isinstance(message.get(key), list):
        return _text(message, key), ""
    text, thinking = "", ""
    for part in list_in(message, key):
        if not isinstance(part, Mapping):
            raise Garbage(f"a part of {key!r} is {type(part).__name__}, expected an object")
        if part.get("type") == "thinking":
            thinking += "".join(_parts(part, "thinking"))
        else:
            text += _text(part, "text")
    return text, thinking


def _text(holder: Mapping[str, Any], key: str) -> str:
    held = holder.get(key)
    if held is None:
        return ""
    if not isinstance(held, str):
        raise Garbage(f"{key!r} is {type(held).__name__}, expected a text")
    # Half of a character, which clients do not read, is said as it is in a line's bytes.
    return held if held.isascii() else held.encode("utf-8", "replace").decode()


def _calls(calls: Sequence[Any]) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects.

    Raises:
        Garbage: One has no name, or arguments that are none, as where the answer was cut short in them.
    """
    said = []
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise Garbage(f"a tool call is {type(call).__name__}, expected an object")
        function = object_in(call, "function")
        if not (name := _text(function, "name")):
            raise Garbage("a tool call without a name")
        named = {"id": given} if isinstance(given := call.get("id"), str) and given else {}
        said.append({**named, "function": {"index": index, "name": name, "arguments": _arguments(function, name)}})
    return said


def _arguments(function: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    given = function.get("arguments")
    if isinstance(given, str):
        try:
            given = reading.parse(given) if given.strip() else {}
        except Garbage as error:
            raise Garbage(f"the engine returned invalid tool call arguments for {name!r}: {error}") from error
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise Garbage(f"the engine returned tool call arguments for {name!r} that are no object: {str(given)[:80]}")
    return given


def _end(finish: Any, usage: Mapping[str, Any], timings: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {"done": True}
    if isinstance(finish, str) and finish:
        said["done_reason"] = "stop" if finish in _STOPS else finish
    prompt, answer = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
    details = usage.get("prompt_tokens_details")
    cached = count(details.get("cached_tokens")) if isinstance(details, Mapping) and prompt is not None else None
    prompt_ns, answer_ns = _ns(timings.get("prompt_ms")), _ns(timings.get("predicted_ms"))
    figures = {
        "total_duration": None if prompt_ns is None or answer_ns is None else prompt_ns + answer_ns,
        "prompt_eval_count": prompt,
        "prompt_eval_cached_count": None if cached is None or cached > (prompt or 0) else cached,
        "prompt_eval_duration": prompt_ns,
        "eval_count": answer,
        "eval_duration": answer_ns,
    }
    return said | {name: figure for name, figure in figures.items() if figure is not None}


def _ns(took_ms: Any) -> int | None:
    return int(took_ms * _NS_OF_MS) if is_number(took_ms) and 0 <= took_ms < reading.MAX_COUNT else None


def _logprobs(choice: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens' probabilities, which have one form on both wires, without entries that are none."""
    told = choice.get("logprobs")
    tokens = told.get("content") if isinstance(told, Mapping) else None
    kept = [_with_tops(each) for each in tokens if _is_logprob(each)] if isinstance(tokens, list) else []
    return {"logprobs": kept} if kept else {}


def _with_tops(token: Mapping[str, Any]) -> dict[str, Any]:
    tops = token.get("top_logprobs")
    kept = [each for each in tops if _is_logprob(each)] if isinstance(tops, list) else []
    rest = {key: value for key, value in token.items() if key != "top_logprobs"}
    return {**rest, "top_logprobs": kept} if kept else rest


def _is_logprob(token: Any) -> bool:
    return isinstance(token, Mapping) and isinstance(token.get("token"), str) and is_number(token.get("logprob"))


def _message_of(error: Any) -> str:
    """Return what an error says, in whichever of its forms."""
    told = error.get("message") if isinstance(error, Mapping) else error
    return told if isinstance(told, str) else json.dumps(error)
