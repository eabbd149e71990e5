"""Requests of Ollama's own API as chat completions, and a mapping's parameters as Ollama's options.

What a request leaves to the model stays unset, for the engine's own defaults of that model; Ollama's are the model
file's. What only says how Ollama loads a model, or for how long it stays (``keep_alive``, ``num_ctx``, ``num_gpu``,
``truncate`` and the like), has no counterpart on an engine that is loaded already, and is left out.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from orla_lg.wires.reading import count
from orla_lg.wires.wire import Body, Untranslatable

_SAMPLING = (
    "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty",
    "top_k", "min_p", "typical_p", "repeat_penalty", "repeat_last_n",
)  # fmt: skip
"""Options that chat completions name alike: OpenAI's own, then those of engines for open models. Of the latter vLLM,
SGLang and llama.cpp heed what they know; left out, a caller's setting would be lost in silence."""

_AS_OPTION = {
    **{name: name for name in _SAMPLING},
    "max_tokens": "num_predict", "max_completion_tokens": "num_predict", "repetition_penalty": "repeat_penalty",
}  # fmt: skip
"""Parameters of chat completions, and Ollama's options that mean the same."""

_LEVELS = ("low", "medium", "high", "max")
"""Of thinking, as of effort."""
_AS_THINK = {"none": False, "minimal": "low", "xhigh": "max", **{level: level for level in _LEVELS}}
"""How Ollama itself reads ``reasoning_effort``."""

_PLAIN = ("user", "assistant", "system")
"""Roles of messages that may be nothing but a text."""

_MEDIA_HEAD = 24
"""Of a medium in base64: so many characters, 18 bytes, tell its type."""
_IMAGES = ((b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"))
"""How images begin that are no JPEG."""

_NOT_FOR_CHAT = {"_debug_render_only": "a prompt that is only rendered"}
_NOT_FOR_GENERATE = {
    **_NOT_FOR_CHAT,
    "raw": "a prompt without the model's template",
    "suffix": "a text to be continued up to its other end",
    "template": "another template than the model's",
    "context": "a conversation in tokens",
    "width": "an image to be made", "height": "an image to be made", "steps": "an image to be made",
}  # fmt: skip

# Requests


def chat_request(body: Body) -> dict[str, Any]:
    """Return a request for ``/api/chat`` as a chat completion's.

    Raises:
        Untranslatable: It asks for what cannot be said there, or is none.
    """
    _refuse(body, _NOT_FOR_CHAT)
    messages = chat_messages(body)
    if not messages:
        raise Untranslatable("messages", "an order to load or unload a model")
    tools = tools_in(body)
    return {"messages": messages, **({"tools": tools} if tools else {}), **_settings(body)}


def generate_request(body: Body) -> dict[str, Any]:
    """Return a request for ``/api/generate`` as a chat completion's.

    Raises:
        Untranslatable: It asks for what cannot be said there, or is none.
    """
    _refuse(body, _NOT_FOR_GENERATE)
    if not _text(body, "prompt"):
        raise Untranslatable("prompt", "an order to load or unload a model")
    return {"messages": generate_messages(body), **_settings(body)}


def _refuse(body: Body, fields: Mapping[str, str]) -> None:
    for field, what in fields.items():
        if body.get(field):
            raise Untranslatable(field, what)


def _settings(body: Body) -> dict[str, Any]:
    """Return how the answer is to be made and sent, as fields of a chat completion's request."""
    options = body.get("options") or {}
    if not isinstance(options, Mapping):
        raise Untranslatable("options", f"{_kind(options)} instead of an object")
    said = {name: value for name in _SAMPLING if (value := options.get(name)) is not None and value != []}
    if (count(said.get("seed", 0))) is None:
        del said["seed"]  # -1 stands for any
    if "repeat_penalty" in said:
        said["repetition_penalty"] = said["repeat_penalty"]  # vLLM's and SGLang's name for it
    if (most := max_tokens(body)) is not None:
        said["max_tokens"] = most
    if (form := response_format(body)) is not None:
        said["response_format"] = form
    if (effort := _effort(body.get("think"))) is not None:
        said["reasoning_effort"] = effort
    if body.get("logprobs"):
        said |= {"logprobs": True, "top_logprobs": count(body.get("top_logprobs")) or 0}
    if is_streamed(body):
        return {**said, "stream": True, "stream_options": {"include_usage": True}}
    return {**said, "stream": False}


def is_streamed(body: Body) -> bool:
    """Whether the answer is to be a stream, as it is where the request says nothing of it."""
    return body.get("stream") is not False


def max_tokens(body: Body) -> int | None:
    """Return the bound on the answer; ``None`` for one without, which a negative ``num_predict`` asks for."""
    options = body.get("options")
    return count(options.get("num_predict")) if isinstance(options, Mapping) else None


def response_format(body: Body) -> dict[str, Any] | None:
    """Return the form that the answer must have.

    Raises:
        Untranslatable: It is neither ``json`` nor a schema.
    """
    form = body.get("format")
    if form is None or form == "":
        return None
    if form == "json":
        return {"type": "json_object"}
    if isinstance(form, Mapping):
        return {"type": "json_schema", "json_schema": {"name": "schema", "schema": form}}
    raise Untranslatable("format", f"{_shown(form)} instead of 'json' or a schema")


def _effort(think: Any) -> str | None:
    if think is None:
        return None
    if isinstance(think, bool):
        return "medium" if think else "none"  # as Ollama does for models that know levels
    if isinstance(think, str) and think in _LEVELS:
        return think
    raise Untranslatable("think", f"{_shown(think)} instead of true, false or a level")


# Messages


def chat_messages(body: Body) -> list[dict[str, Any]]:
    """Return the messages of a request for ``/api/chat`` as those of chat completions.

    Raises:
        Untranslatable: One is none.
    """
    conversation = _OllamaConversation()
    return [conversation.add(message, path) for path, message in _objects(body, "messages")]


def generate_messages(body: Body) -> list[dict[str, Any]]:
    """Return the prompts of a request for ``/api/generate`` as messages.

    Raises:
        Untranslatable: One is none.
    """
    system = _text(body, "system")
    first = [{"content": system, "role": "system"}] if system else []
    return [*first, {"content": _content(_text(body, "prompt"), body), "role": "user"}]


def tools_in(body: Body) -> list[Mapping[str, Any]]:
    """Return the tools of a request; they have one form on both wires.

    Raises:
        Untranslatable: One is none.
    """
    return [tool if tool.get("type") else {**tool, "type": "function"} for _, tool in _objects(body, "tools")]


class _OllamaConversation:
    """Turns messages into those of chat completions one after another.

    There, a tool's answer names the call that it answers; here it may name the tool, or nothing, as its place says
    enough. Names that are missing are made from the calls' numbers: the same conversation gets the same ones in each
    of its requests, so that its prefix stays one. They have nine letters and digits, as some chat templates demand.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._open: list[tuple[str, str]] = []
        """Tool and id of the newest calls without an answer."""

    def add(self, message: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Return the next message."""
        said, content = message.get("role"), message.get("content")
        if len(message) == 2 and isinstance(said, str) and isinstance(content, str) and said in _PLAIN:
            return {"content": content, "role": said}  # as nearly always
        return self._add(message, path)

    def _add(self, message: Mapping[str, Any], path: str) -> dict[str, Any]:
        role, text = _text(message, "role", path).lower(), _text(message, "content", path)
        if not role:
            raise Untranslatable(f"{path}.role", "a message of no role")
        # The order of keys is langchain-openai's: a message with calls is the same prefix only as a whole.
        said: dict[str, Any] = {"content": _content(text, message, path), "role": role}
        if calls := self._calls_in(message, path):
            said |= {"content": said["content"] or None, "tool_calls": calls}
        if role == "tool":
            tool = _text(message, "tool_name", path)
            if tool:
                said["name"] = tool
            said["tool_call_id"] = self._answered(tool, _text(message, "tool_call_id", path))
        if thinking := _text(message, "thinking", path):
            said["reasoning_content"] = thinking
        return said

    def _calls_in(self, message: Mapping[str, Any], path: str) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        for place, call in _objects(message, "tool_calls", path):
            function = call.get("function")
            if not isinstance(function, Mapping):
                raise Untranslatable(f"{place}.function", f"{_kind(function)} instead of an object")
            name, arguments = _text(function, "name", f"{place}.function"), function.get("arguments")
            if not isinstance(arguments, Mapping | None):
                raise Untranslatable(f"{place}.function.arguments", f"{_kind(arguments)} instead of an object")
            said = {"name": name, "arguments": _json(arguments or {}, f"{place}.function.arguments")}
            calls.append({"type": "function", "id": _text(call, "id", place) or self._next(), "function": said})
        if calls:
            self._open = [(call["function"]["name"], call["id"]) for call in calls]
        return calls

    def _next(self) -> str:
        self._calls += 1
        return f"call{self._calls:05}"

    def _answered(self, tool: str, given: str) -> str:
        """Return the id of the call that a message answers: the one that it names, else its tool's first, else the
        first of all."""
        if given:
            self._open = [call for call in self._open if call[1] != given]
            return given
        if not self._open:
            return self._next()
        answered = next((call for call in self._open if call[0] == tool), self._open[0])
        self._open.remove(answered)
        return answered[1]


def _content(text: str, holder: Mapping[str, Any], path: str = "") -> str | list[dict[str, Any]]:
    images = _list(holder, "images", path)
    if not images:
        return text
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    return parts + [_medium(image, f"{_under(path, 'images')}[{n}]") for n, image in enumerate(images)]


def _medium(data: Any, path: str) -> dict[str, Any]:
    """Return an image, or the sound that Ollama takes among them, as a part of a message."""
    if not isinstance(data, str):
        raise Untranslatable(path, f"{_kind(data)} instead of an image in base64")
    if data.startswith("data:"):
        return {"type": "image_url", "image_url": {"url": data}}
    try:
        head = base64.b64decode(data[:_MEDIA_HEAD])
    except (binascii.Error, ValueError):
        head = b""
    riff = head[8:12] if head.startswith(b"RIFF") else b""
    if riff == b"WAVE" or head.startswith(b"ID3") or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        return {"type": "input_audio", "input_audio": {"data": data, "format": "wav" if riff else "mp3"}}
    image = "webp" if riff == b"WEBP" else next((kind for magic, kind in _IMAGES if head.startswith(magic)), "jpeg")
    return {"type": "image_url", "image_url": {"url": f"data:image/{image};base64,{data}"}}


# Of a request, strictly: what Ollama would refuse passes by to it, for its own answer


def _text(holder: Mapping[str, Any], key: str, path: str = "") -> str:
    held = holder.get(key)
    if held is None:
        return ""
    if not isinstance(held, str):
        raise Untranslatable(_under(path, key), f"{_kind(held)} instead of a text")
    return held


def _list(holder: Mapping[str, Any], key: str, path: str = "") -> Sequence[Any]:
    held = holder.get(key)
    if held is None:
        return ()
    if not isinstance(held, list | tuple):
        raise Untranslatable(_under(path, key), f"{_kind(held)} instead of a list")
    return held


def _objects(holder: Mapping[str, Any], key: str, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    for n, held in enumerate(_list(holder, key, path)):
        place = f"{_under(path, key)}[{n}]"
        if not isinstance(held, Mapping):
            raise Untranslatable(place, f"{_kind(held)} instead of an object")
        yield place, held


def _json(value: Mapping[str, Any], path: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise Untranslatable(path, f"what is no JSON ({type(error).__name__})") from error


def _under(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _shown(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, str) else _kind(value)


# The other way: a mapping's parameters


def natively(parameters: Body, body: Body) -> dict[str, Any]:
    """Return the fields that *parameters*, named as in chat completions or as Ollama names them, add to a request.

    What the caller set is left alone, be it an option or a field.
    """
    added: dict[str, Any] = {}
    options: dict[str, Any] = {}
    extra = parameters.get("extra_body")
    for name, value in {**parameters, **(extra if isinstance(extra, Mapping) else {})}.items():
        if name == "options" and isinstance(value, Mapping):
            options |= value
        elif (option := _AS_OPTION.get(name)) is not None:
            options[option] = [value] if option == "stop" and isinstance(value, str) else value
        elif name == "response_format":
            added |= _as_format(value)
        elif name == "reasoning_effort":
            added |= {"think": _AS_THINK[value]} if isinstance(value, str) and value in _AS_THINK else {}
        elif name == "chat_template_kwargs" and isinstance(value, Mapping) and "enable_thinking" in value:
            added.setdefault("think", bool(value["enable_thinking"]))
        elif name not in ("stream", "extra_body"):  # the caller reads what it asked for
            added[name] = value
    added = {name: value for name, value in added.items() if body.get(name) in (None, "")}
    given = body.get("options")
    if options and isinstance(given, Mapping | None):
        added["options"] = {**options, **{name: value for name, value in (given or {}).items() if value is not None}}
    return added


def _as_format(form: Any) -> dict[str, Any]:
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "json_object":
        return {"format": "json"}
    schema = form.get("json_schema") if kind == "json_schema" else None
    return {"format": schema["schema"]} if isinstance(schema, Mapping) and schema.get("schema") else {}
