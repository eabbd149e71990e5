"""What a node's code reaches: the graphs and tools in it, as far as that shows without running it.

LangGraph itself looks at the functions of nodes to find a node's first subgraph. Here a node may hold several, in
what its functions, their helpers, its object and its tools refer to; so an agent that a tool runs is found as well.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

from langchain_core.runnables import Runnable, RunnableLambda, RunnableParallel, RunnableWithFallbacks
from langchain_core.runnables.base import RunnableBindingBase, RunnableEachBase
from langchain_core.tools import BaseTool
from langgraph.func import _TaskFunction
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel
from langgraph.pregel._utils import get_function_nonlocals

log = logging.getLogger("orla_lg")

DEEPEST = 4
"""So many references are followed from a node's function: to its helpers, to what they call, and into containers."""

MOST = 2_000
"""So many values are looked at for one node."""

Task = _TaskFunction[Any, Any]
Reached = Pregel[Any, Any, Any, Any] | BaseTool | Task


def reached_by(runnable: Any) -> list[Reached]:
    """Return the graphs, tools and tasks that a node's runnable refers to, each once; what they hold is theirs."""
    found: dict[int, Reached] = {}
    seen: set[int] = set()
    waiting: list[tuple[Any, int]] = [(runnable, 0)]
    while waiting and len(seen) < MOST:
        thing, depth = waiting.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if depth and isinstance(thing, Pregel | BaseTool | _TaskFunction):
            found[id(thing)] = thing
        elif depth <= DEEPEST:
            waiting += [(each, depth + 1) for each in _referred(thing)]
    return list(found.values())


def _referred(thing: Any) -> Iterator[Any]:
    """Yield what a thing refers to that may be a graph, a tool, or lead to one."""
    if isinstance(thing, ToolNode):
        yield from thing.tools_by_name.values()
    elif isinstance(thing, BaseTool):
        yield from _of_tool(thing)
    elif isinstance(thing, _TaskFunction):
        yield thing.func
    elif isinstance(thing, RunnableLambda):
        yield from (getattr(thing, name, None) for name in ("func", "afunc"))
    elif isinstance(thing, RunnableBindingBase | RunnableEachBase):
        yield thing.bound
    elif isinstance(thing, RunnableWithFallbacks):
        yield from (thing.runnable, *thing.fallbacks)
    elif isinstance(thing, RunnableParallel):
        yield from thing.steps__.values()
    elif isinstance(thing, MethodType):
        yield from _of_method(thing)
    elif isinstance(thing, FunctionType):
        yield from _of_function(thing)
    elif isinstance(thing, Mapping):
        yield from _held(thing)
    elif isinstance(thing, list | tuple | set | frozenset):
        yield from (each for each in thing if _may_lead(each))
    elif isinstance(thing, Runnable):  # LangGraph's RunnableCallable and RunnableSeq, and sequences
        yield from (getattr(thing, name, None) for name in ("func", "afunc"))
        yield from steps if isinstance(steps := getattr(thing, "steps", None), list) else ()


def _of_tool(tool: BaseTool) -> Iterator[Any]:
    functions = [getattr(tool, name, None) for name in ("func", "coroutine")]
    if any(functions):
        yield from functions
        return
    yield from _of_function(type(tool)._run)
    yield from _of_function(type(tool)._arun)
    yield from _held(vars(tool))


def _of_method(method: MethodType) -> Iterator[Any]:
    owner = method.__self__
    if isinstance(owner, Runnable):  # ``agent.invoke``: the agent itself, and not what it is made of
        yield owner
        return
    yield from _of_function(method.__func__)
    yield from _held(vars(owner) if hasattr(owner, "__dict__") else {})


def _of_function(function: Callable[..., Any]) -> Iterator[Any]:
    """Yield what a function refers to: what it holds, and the functions of its own module that it calls."""
    try:
        values = get_function_nonlocals(function)
    except Exception as error:  # noqa: BLE001  # it reads attributes of foreign objects, which may raise anything
        log.debug("what %r refers to cannot be read: %s", function, error)
        return
    for value in values:
        is_helper = isinstance(value, FunctionType) and value.__module__ == function.__module__
        if is_helper or (not isinstance(value, FunctionType) and _may_lead(value)):
            yield value


def _held(values: Mapping[Any, Any]) -> Iterator[Any]:
    yield from (each for each in list(values.values()) if _may_lead(each))


def _may_lead(value: object) -> bool:
    """Whether a value may be a graph or a tool, or a runnable, method or container that leads to one."""
    kinds = (
        Pregel, BaseTool, _TaskFunction, ToolNode, RunnableLambda, RunnableBindingBase, RunnableEachBase,
        RunnableWithFallbacks, RunnableParallel, MethodType, FunctionType, dict, list, tuple,
    )  # fmt: skip
    return isinstance(value, kinds)
