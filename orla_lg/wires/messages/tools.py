"""The tools of a request of Anthropic's Messages, as functions of chat completions.

The API keeps tools from the model until the conversation brings them up: deferred ones, which the result of a search
names (``tool_reference``), and those that a system message adds or takes away (``tool_addition``, ``tool_removal``).
Chat completions know one list: the tools that the model may call at the end of the conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orla_lg.core.call import OBJECT
from orla_lg.wires.wire import Body

Refuse = Callable[[str, str], None]
"""Takes a field's path and what stands there that chat completions cannot say."""

CHANGES = frozenset({"tool_addition", "tool_removal"})
"""Blocks of a system message that are no text."""

_SEARCH = "tool_search_tool"
"""How the types of tools begin by which the API itself finds deferred ones."""


def chat_tools(body: Body, refuse: Refuse) -> list[Any]:
    """Return the tools that the model may call as functions."""
    tools = _sequence(body.get("tools"))
    deferred = any(isinstance(tool, OBJECT) and tool.get("defer_loading") for tool in tools)
    known = _in_effect(_sequence(body.get("messages")), deferred)
    made: list[Any] = []
    for at, tool in known.among(tools):
        if not isinstance(tool, OBJECT):
            made.append(tool)
            continue
        if tool.get("defer_loading") and tool.get("name") not in known.loaded:
            if not any(map(_searches, tools)):
                continue  # the model does not see it yet
            refuse(f"{at}.defer_loading", "a tool that is found by a search")
        made.append(_function(tool, at, refuse))
    return made


def essential_tools(tools: Any) -> Any:
    """Return tools without those that the API runs or code calls; what its search would find is described at once."""
    if not isinstance(tools, list | tuple):
        return tools
    own = [tool for tool in tools if not isinstance(tool, OBJECT) or _is_function(tool)]
    if not any(map(_searches, tools)):
        return own
    return [
        {name: value for name, value in tool.items() if name != "defer_loading"} if isinstance(tool, OBJECT) else tool
        for tool in own
    ]


def _is_function(tool: Mapping[str, Any]) -> bool:
    callers = tool.get("allowed_callers")
    is_direct = not (isinstance(callers, list | tuple) and callers) or "direct" in callers
    return tool.get("type") in (None, "custom") and is_direct


def _searches(tool: Any) -> bool:
    kind = tool.get("type") if isinstance(tool, OBJECT) else None
    return isinstance(kind, str) and kind.startswith(_SEARCH)


def _function(tool: Mapping[str, Any], at: str, refuse: Refuse) -> dict[str, Any]:
    kind, callers = tool.get("type"), tool.get("allowed_callers")
    if kind not in (None, "custom"):
        refuse(f"{at}.type", f"a {kind} tool, which the API knows or runs,")
    if isinstance(callers, list | tuple) and callers and "direct" not in callers:
        refuse(f"{at}.allowed_callers", "a tool that only code may call")
    function = {"name": tool.get("name")}
    if tool.get("description") is not None:
        function["description"] = tool["description"]
    function["parameters"] = tool.get("input_schema")
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


@dataclass
class _InEffect:
    """What a conversation says of its tools."""

    loaded: set[str] = field(default_factory=set)
    removed: set[str] = field(default_factory=set)
    added: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Tools that stand in it, by name, each with its path."""

    def among(self, tools: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        """Yield the tools that were not taken away, each with its path."""
        gone = self.removed | self.added.keys()
        for number, tool in enumerate(tools):
            name = tool.get("name") if isinstance(tool, OBJECT) else None
            if not (isinstance(name, str) and name in gone):
                yield f"tools[{number}]", tool
        yield from (each for name, each in self.added.items() if name not in self.removed)

    def change(self, block: Mapping[str, Any], at: str) -> None:
        """Note a change that a system message makes."""
        changed = block.get("tool")
        definition = changed.get("definition") if isinstance(changed, OBJECT) else None
        named = definition if isinstance(definition, OBJECT) else changed
        name = named.get("name") if isinstance(named, OBJECT) else None
        if not isinstance(name, str):
            return
        if block.get("type") == "tool_removal":
            self.removed.add(name)
            return
        self.removed.discard(name)
        self.loaded.add(name)
        if named is definition:
            self.added[name] = f"{at}.tool.definition", definition


def _in_effect(conversation: Sequence[Any], deferred: bool) -> _InEffect:
    known = _InEffect()
    for number, message in enumerate(conversation):
        role = message.get("role") if isinstance(message, OBJECT) else None
        if role != "system" and not (deferred and role == "user"):
            continue
        for index, block in enumerate(_sequence(message.get("content"))):
            kind = block.get("type") if isinstance(block, OBJECT) else None
            if role == "system" and isinstance(kind, str) and kind in CHANGES:
                known.change(block, f"messages[{number}].content[{index}]")
            elif kind == "tool_result":
                known.loaded.update(_referenced(block))
    return known


def _referenced(result: Mapping[str, Any]) -> Iterator[str]:
    for part in _sequence(result.get("content")):
        if isinstance(part, OBJECT) and part.get("type") == "tool_reference":
            name = reference(part)
            if isinstance(name, str):
                yield name


def reference(part: Mapping[str, Any]) -> Any:
    """Return the name in a reference to a tool."""
    return part.get("tool_name") or part.get("name")


def _sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
