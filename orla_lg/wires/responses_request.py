"""A request of OpenAI's Responses API, as one of chat completions.

Items become messages: what a model said in one turn (reasoning, a text, calls of functions) is several items there
and one assistant message here. A field that is not known here goes along as it is, since engines name their own
fields alike on both wires.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orla_lg.core.call import OBJECT
from orla_lg.wires.wire import Body, Untranslatable

_OWN = frozenset({
    "model", "input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "tool_choice",
    "parallel_tool_calls", "include", "top_logprobs", "truncation", "store", "stream", "stream_options",
    "previous_response_id", "conversation", "background", "background_options", "prompt", "context_management",
    "max_tool_calls", "moderation", "access_programs", "image", "prompt_cache_options", "prompt_cache_retention",
    "generate", "client_metadata",
})  # fmt: skip
"""Fields that chat completions do not have, or have in another form; all others go along as they are."""

_NEEDS_A_STORE = ("previous_response_id", "conversation", "prompt", "background", "context_management")
_ONLY_OPENAI = ("moderation", "access_programs")

LOGPROBS = "message.output_text.logprobs"
_INCLUDED = frozenset({
    LOGPROBS, "reasoning.encrypted_content", "message.input_image.image_url", "web_search_call.action.sources",
    "web_search_call.results", "code_interpreter_call.outputs", "computer_call_output.output.image_url",
    "file_search_call.results",
})  # fmt: skip
"""What may be asked for beside the answer: reasoning comes in the clear, and the rest belongs to refused tools."""

_DETAILS = ("auto", "low", "high")
_JOINT = "\n\n"
"""Between the parts of one piece of reasoning."""


def chat_of(body: Body) -> dict[str, Any]:
    """Return a request as a chat completion's, without its model.

    Raises:
        Untranslatable: It asks for what cannot be said there.
    """
    _refuse(body)
    chat = {key: value for key, value in body.items() if key not in _OWN and value is not None}
    chat["messages"] = messages_of(body)
    chat |= _tools_of(body)
    if (bound := body.get("max_output_tokens")) is not None:
        chat["max_tokens"] = bound
    reasoning = _object(body, "reasoning")
    if (effort := reasoning.get("effort")) is not None:
        chat["reasoning_effort"] = effort
    chat |= _form_of(_object(body, "text"))
    if body.get("store") is False:
        chat["store"] = False
    if body.get("top_logprobs") or LOGPROBS in (body.get("include") or ()):
        chat["logprobs"], chat["top_logprobs"] = True, body.get("top_logprobs") or 0
    if body.get("stream"):
        chat["stream"] = True
    return chat


def essentials_of(body: Body) -> dict[str, Any]:
    """Return a request without what it only offers or allows: tools other than functions, and what may be included.

    A conversation that a server would cut short, or a call that names the namespace of its function, goes as it is.
    """
    kept = {key: value for key, value in body.items() if key != "context_management"}
    if isinstance(tools := body.get("tools"), list | tuple):
        kept["tools"] = [tool for tool in tools if not _is_foreign(tool)]
    if isinstance(included := body.get("include"), list | tuple):
        kept["include"] = [name for name in included if isinstance(name, str) and name in _INCLUDED]
    choice = body.get("tool_choice")
    if isinstance(choice, OBJECT) and isinstance(allowed := choice.get("tools"), list | tuple):
        kept["tool_choice"] = {**choice, "tools": [tool for tool in allowed if not _is_foreign(tool)]}
    items = body.get("input")
    if isinstance(items, list | tuple) and any(isinstance(item, OBJECT) and "namespace" in item for item in items):
        kept["input"] = [
            {key: value for key, value in item.items() if key != "namespace"} if isinstance(item, OBJECT) else item
            for item in items
        ]
    return kept


def _is_foreign(tool: Any) -> bool:
    """Whether a tool is of another kind than functions that the model calls."""
    if not isinstance(tool, OBJECT):
        return False
    callers = tool.get("allowed_callers")
    by_code_only = isinstance(callers, list | tuple) and callers and "direct" not in callers
    return tool.get("type") != "function" or bool(by_code_only)


def _refuse(body: Body) -> None:
    for field in (*_NEEDS_A_STORE, *_ONLY_OPENAI):
        if body.get(field):
            raise Untranslatable(field, "what it asks for")
    if body.get("generate") is False or _object(body, "prompt_cache_options").get("prewarm"):
        raise Untranslatable("prompt_cache_options.prewarm", "a request without an answer")
    if _object(body, "reasoning").get("mode") not in (None, "standard"):
        raise Untranslatable("reasoning.mode", f"{body['reasoning']['mode']!r}")
    for at, name in enumerate(_list(body, "include")):
        if not (isinstance(name, str) and name in _INCLUDED):
            raise Untranslatable(f"include[{at}]", f"{name!r}")


def _form_of(text: Body) -> dict[str, Any]:
    """Return the fields that say what form the text of the answer has."""
    form = _object(text, "format", "text.format")
    kind = form.get("type", "text")
    said: dict[str, Any] = {}
    if text.get("verbosity") is not None:
        said["verbosity"] = text["verbosity"]
    if kind == "json_schema":
        schema = {key: value for key, value in form.items() if key != "type" and value is not None}
        said["response_format"] = {"type": kind, "json_schema": schema}
    elif kind == "json_object":
        said["response_format"] = {"type": kind}
    elif kind != "text":
        raise Untranslatable("text.format.type", f"{kind!r}")
    return said


# Tools


def _tools_of(body: Body) -> dict[str, Any]:
    tools = [_tool_of(tool, f"tools[{at}]") for at, tool in enumerate(_list(body, "tools"))]
    choice, allowed = _choice_of(body.get("tool_choice"))
    if allowed is not None:
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
    if not tools:  # engines refuse a choice among none
        return {"tool_choice": choice} if choice not in (None, "auto", "none") else {}
    said: dict[str, Any] = {"tools": tools}
    if choice is not None:
        said["tool_choice"] = choice
    if body.get("parallel_tool_calls") is not None:
        said["parallel_tool_calls"] = body["parallel_tool_calls"]
    return said


def _tool_of(tool: Any, path: str) -> dict[str, Any]:
    if not isinstance(tool, OBJECT) or tool.get("type") != "function":
        raise Untranslatable(f"{path}.type", f"a {_kind(tool)} tool")
    if not isinstance(tool.get("name"), str):
        raise Untranslatable(f"{path}.name", "a function without a name")
    callers = _list(tool, "allowed_callers", f"{path}.allowed_callers")
    if callers and "direct" not in callers:
        raise Untranslatable(f"{path}.allowed_callers", "a function that only programs call")
    function = {
        key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None
    }
    return {"type": "function", "function": function}


def _choice_of(choice: Any) -> tuple[Any, frozenset[str] | None]:
    """Return which tool is to be called, and the names of those that may be, where that is fewer than all."""
    if choice is None or isinstance(choice, str):
        return choice, None
    kind = choice.get("type") if isinstance(choice, OBJECT) else None
    if kind == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}, None
    if kind != "allowed_tools":
        raise Untranslatable("tool_choice.type", f"a choice of {_kind(choice)}")
    names = set()
    for at, tool in enumerate(_list(choice, "tools", "tool_choice.tools")):
        if not isinstance(tool, OBJECT) or tool.get("type") != "function" or not isinstance(tool.get("name"), str):
            raise Untranslatable(f"tool_choice.tools[{at}].type", f"a {_kind(tool)} tool")
        names.add(tool["name"])
    return choice.get("mode", "auto"), frozenset(names)


# Messages


def messages_of(body: Body) -> list[Any]:
    """Return what is asked as messages of a chat completion.

    Raises:
        Untranslatable: An item or a part of one cannot be said there.
    """
    return _Dialogue(body).messages


def messages_as_far_as_known(body: Body) -> list[Any]:
    """Return what is asked as messages; what cannot be said in them stands there as it came."""
    return _Dialogue(body, foreign=lambda item, reason: item).messages


Foreign = Callable[[Any, Untranslatable], Any]


def _refused(item: Any, reason: Untranslatable) -> Any:
    raise reason


class _Dialogue:
    """Puts items together to messages.

    Args:
        body: The request.
        foreign: What takes the place of an item that cannot be said.
    """

    def __init__(self, body: Body, foreign: Foreign = _refused) -> None:
        self.messages: list[Any] = []
        self._turn: dict[str, Any] | None = None
        """The assistant message that items still add to."""
        self._foreign = foreign
        instructions, items = body.get("instructions"), body.get("input")
        if isinstance(instructions, str):
            if instructions:
                self.messages.append({"content": instructions, "role": "system"})
        else:
            self._add_all(instructions, "instructions")
        if isinstance(items, str):
            self.messages.append({"content": items, "role": "user"})
        else:
            self._add_all(items, "input")
        self._end()

    def _add_all(self, items: Any, path: str) -> None:
        if items is None:
            return
        if not isinstance(items, list | tuple):
            self._pass(items, Untranslatable(path, f"{_json_kind(items)}"))
            return
        for at, item in enumerate(items):
            try:
                self._add(item, f"{path}[{at}]")
            except Untranslatable as reason:
                self._pass(item, reason)

    def _pass(self, item: Any, reason: Untranslatable) -> None:
        self._end()
        self.messages.append(self._foreign(item, reason))

    def _add(self, item: Any, path: str) -> None:
        if not isinstance(item, OBJECT):
            raise Untranslatable(path, _json_kind(item))
        kind = item.get("type") or "message"
        if kind == "message":
            self._add_message(item, path)
        elif kind == "reasoning":
            self._add_reasoning(item, path)
        elif kind == "function_call":
            self._add_call(item, path)
        elif kind == "function_call_output":
            output, call_id = item.get("output"), _text(item, "call_id", path)
            self._say({"content": _content(output, f"{path}.output"), "role": "tool", "tool_call_id": call_id})
        else:
            raise Untranslatable(f"{path}.type", f"an item of type {kind!r}")

    def _say(self, message: dict[str, Any]) -> None:
        self._end()
        self.messages.append(message)

    def _add_message(self, item: Body, path: str) -> None:
        role, content = item.get("role"), item.get("content")
        if role == "assistant":
            said, turn = _said(content, f"{path}.content"), self._turn
            if turn is None or turn["content"] is not None:
                turn = self._begin()
            turn["content"] = said
        elif role in ("user", "system", "developer"):
            role = "user" if role == "user" else "system"  # which every chat template knows
            self._say({"content": _content(content, f"{path}.content"), "role": role})
        else:
            raise Untranslatable(f"{path}.role", f"a message of {role!r}")

    def _add_reasoning(self, item: Body, path: str) -> None:
        parts = _list(item, "content", f"{path}.content") or _list(item, "summary", f"{path}.summary")
        texts = [part["text"] for part in parts if isinstance(part, OBJECT) and isinstance(part.get("text"), str)]
        if not texts:
            return  # encrypted, or none: an engine of another maker has no use for it
        turn = self._turn
        if turn is None or "reasoning_content" in turn:
            turn = self._begin()
        turn["reasoning_content"] = _JOINT.join(texts)

    def _add_call(self, item: Body, path: str) -> None:
        if item.get("namespace"):
            raise Untranslatable(f"{path}.namespace", f"a function of the namespace {item['namespace']!r}")
        function = {"name": _text(item, "name", path), "arguments": _text(item, "arguments", path)}
        call = {"type": "function", "id": _text(item, "call_id", path), "function": function}
        turn = self._turn if self._turn is not None else self._begin()
        turn["content"] = turn["content"] or None
        turn.setdefault("tool_calls", []).append(call)

    def _begin(self) -> dict[str, Any]:
        self._end()
        self._turn = {"content": None, "role": "assistant"}
        self.messages.append(self._turn)
        return self._turn

    def _end(self) -> None:
        """Note that no more items add to the assistant message; without calls it has a text, be it an empty one."""
        if self._turn is not None and "tool_calls" not in self._turn:
            self._turn["content"] = self._turn["content"] or ""
        self._turn = None


def _said(content: Any, path: str) -> str:
    """Return what a model said, its refusal as well."""
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(_sequence(content, path)):
        kind = part.get("type") if isinstance(part, OBJECT) else None
        if kind not in ("output_text", "input_text", "text", "refusal"):
            raise Untranslatable(f"{path}[{at}].type", f"a {_kind(part)} part")
        texts.append(_text(part, "refusal" if kind == "refusal" else "text", f"{path}[{at}]"))
    return "".join(texts)


def _content(content: Any, path: str) -> Any:
    """Return a text, or texts and images, for a message that no model said."""
    if isinstance(content, str):
        return content
    return [_part(part, f"{path}[{at}]") for at, part in enumerate(_sequence(content, path))]


def _part(part: Any, path: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, OBJECT) else None
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": _text(part, "text", path)}
    if kind == "input_image":
        if not isinstance(part.get("image_url"), str):
            raise Untranslatable(f"{path}.file_id", "an image by the id of its file")
        image = {"url": part["image_url"]}
        if part.get("detail") in _DETAILS:
            image["detail"] = part["detail"]
        return {"type": "image_url", "image_url": image}
    if kind == "input_audio" and isinstance(part.get("input_audio"), OBJECT):
        return {"type": kind, kind: part[kind]}
    raise Untranslatable(f"{path}.type", f"a {_kind(part)} part")


# What a caller wrote may be anything


def _object(holder: Body, key: str, path: str | None = None) -> Body:
    held = holder.get(key)
    if held is None:
        return {}
    if not isinstance(held, OBJECT):
        raise Untranslatable(path or key, _json_kind(held))
    return held


def _list(holder: Body, key: str, path: str | None = None) -> Sequence[Any]:
    held = holder.get(key)
    return () if held is None else _sequence(held, path or key)


def _sequence(held: Any, path: str) -> Sequence[Any]:
    if not isinstance(held, list | tuple):
        raise Untranslatable(path, _json_kind(held))
    return held


def _text(holder: Body, key: str, path: str) -> str:
    held = holder.get(key)
    if not isinstance(held, str):
        raise Untranslatable(f"{path}.{key}", _json_kind(held))
    return held


def _kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else None
    return kind if isinstance(kind, str) else "nameless"


def _json_kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {bool: "a boolean", str: "a text", int: "a number", float: "a number", list: "a list", tuple: "a list"}
    return names.get(type(value), "an object")
