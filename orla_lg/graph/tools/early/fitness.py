"""Whether a tool can run away from its place: only what it is called with, and nothing that a node injects."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool, Tool

from orla_lg.graph.tools.early.arguments import Arguments

RUN: dict[type[BaseTool], Any] = {kind: kind._run for kind in (StructuredTool, Tool)}
"""How LangChain's own tools run their functions; a tool with a way of its own stays as it is."""

ARUN: dict[type[BaseTool], Any] = {kind: kind._arun for kind in (StructuredTool, Tool)}

MCP_RUNTIME = "runtime"
"""What functions of ``langchain-mcp-adapters`` take for the interceptors of their client, where there are any."""


def needs_its_place(tool: BaseTool) -> str | None:
    """Return why *tool* cannot run away from its place; ``None`` if it can."""
    kind = next((kind for kind in RUN if isinstance(tool, kind)), None)
    if kind is None or not _runs_as(type(tool), kind):
        return "its class runs it in a way of its own"
    assert isinstance(tool, StructuredTool | Tool)
    functions = [function for function in (tool.func, tool.coroutine) if function is not None]
    if not functions:
        return "it has no function"
    try:
        given, hidden = _arguments(tool)
        for function in functions:
            hidden += _injected(function, given, is_single=isinstance(tool, Tool))
    except Exception as error:  # noqa: BLE001 - schemas and annotations are the user's, and reading them runs code
        return f"its arguments cannot be read ({type(error).__name__}: {error})"
    return f"its argument {hidden[0]!r} is injected where it runs" if hidden else None


def _runs_as(kind: type[BaseTool], known: type[BaseTool]) -> bool:
    """Whether a class of tools runs them as LangChain's *known* does, be that replaced for all its subclasses."""
    return kind._run is known._run and kind._arun is known._arun


def _arguments(tool: BaseTool) -> tuple[Collection[str], list[str]]:
    """Return the names of a tool's arguments that a model gives, and of those that its schema has besides."""
    given = set(tool.args)
    if tool.args_schema is None or isinstance(tool.args_schema, dict):
        return given, []
    fields = getattr(tool.get_input_schema(), "model_fields", {})
    return given, sorted(set(fields) - given)


def _injected(function: Callable[..., Any], given: Collection[str], *, is_single: bool) -> list[str]:
    """Return the parameters of a tool's function that no model gives."""
    named = [
        each for each in inspect.signature(function).parameters.values()
        if each.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]  # fmt: skip
    if is_single:  # its one argument may have any name
        return [each.name for each in named[1:]]
    return [each.name for each in named if each.name not in given and not _is_idle_runtime(function, each)]


def without_runtime(tool: BaseTool, arguments: Arguments) -> Arguments:
    """Return the arguments of a call without the runtime that a tool node gives to MCP's tools; a start has none."""
    args, kwargs = arguments
    if MCP_RUNTIME not in kwargs or MCP_RUNTIME in tool.args or not _is_of_mcp(getattr(tool, "coroutine", None)):
        return arguments
    return args, {name: value for name, value in kwargs.items() if name != MCP_RUNTIME}


def _is_of_mcp(function: Callable[..., Any] | None) -> bool:
    return str(getattr(function, "__module__", "")).startswith("langchain_mcp_adapters.")


def _is_idle_runtime(function: Callable[..., Any], parameter: inspect.Parameter) -> bool:
    """Whether a parameter is the runtime that MCP's tools hand to their client's interceptors, and there are none."""
    if parameter.name != MCP_RUNTIME or parameter.default is not None:
        return False
    held = inspect.getclosurevars(function).nonlocals
    return _is_of_mcp(function) and not held.get("tool_interceptors", True)
