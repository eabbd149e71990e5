"""Where a wrapped graph's handler joins an execution, and where it leaves it: at the run of a model.

It joins in LangGraph's ``stream`` and ``astream``, which all others call. The handlers lie beside the graph's
configuration, not in it: what lies in it is part of every ``StateSnapshot``, which applications store and replay.
``copy``, and so ``with_config``, takes them along.

The handler hears that a model starts and nothing else of its run (``ignore_llm``). LangChain asks all the same at
each token, and an async run with any handler yields to its loop for each; so a model's run does not get the handler.
While no request of the run is seen, the handler listens to it in another way (``passing``).
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForLLMRun,
    BaseCallbackHandler,
    BaseCallbackManager,
    CallbackManagerForLLMRun,
)
from langgraph.pregel import Pregel

from orla_lg.graph.running_tool import TOOL, starts
from orla_lg.graph.structure import AnyPregel
from orla_lg.graph.tools.early.running import refuse

_HANDLERS = "_orla_handlers"

_STREAM, _ASTREAM, _COPY = Pregel.stream, Pregel.astream, Pregel.copy


class Handlers(tuple[BaseCallbackHandler, ...]):
    """The handlers of a wrapped graph, one for each ``Orla``; they belong to their process."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handlers:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Handlers, ()


def handlers_of(graph: AnyPregel) -> Handlers:
    """Return the handlers of a graph, the latest last; none if it is not wrapped."""
    return vars(graph).get(_HANDLERS) or Handlers()


def attach(graph: AnyPregel, handlers: Iterable[BaseCallbackHandler]) -> None:
    """Let *handlers* hear of every execution of *graph* and its copies."""
    vars(graph)[_HANDLERS] = Handlers(handlers)


def _joined(graph: AnyPregel, config: Any) -> Any:
    """Return the configuration of an execution, with the graph's handlers among its callbacks."""
    if TOOL.get() is not None:
        refuse("graph inside it: what that streams, and whether it is interrupted, shows in its place only")
        if config and isinstance(config, Mapping):
            starts(graph, config)
    handlers = handlers_of(graph)
    if not handlers or not isinstance(config, Mapping | None):
        return config
    callbacks: Any = (config or {}).get("callbacks")
    if callbacks is None or isinstance(callbacks, list):
        given = callbacks or []
        callbacks = list(given)
        for handler in handlers:
            if handler not in given:
                callbacks.append(handler)
    elif isinstance(callbacks, BaseCallbackManager):
        callbacks = callbacks.copy()
        for handler in handlers:
            callbacks.add_handler(handler, inherit=True)
    else:
        return config  # no callbacks: LangGraph says what is wrong with it
    return {**(config or {}), "callbacks": callbacks}


@functools.wraps(_STREAM)
def _stream(self: AnyPregel, input: Any, config: Any = None, **options: Any) -> Iterator[Any]:
    return _STREAM(self, input, _joined(self, config), **options)


@functools.wraps(_ASTREAM)
def _astream(self: AnyPregel, input: Any, config: Any = None, **options: Any) -> AsyncIterator[Any]:
    return _ASTREAM(self, input, _joined(self, config), **options)


@functools.wraps(_COPY)
def _copy(self: AnyPregel, update: dict[str, Any] | None = None) -> AnyPregel:
    copied = _COPY(self, update)
    if handlers := handlers_of(self):
        attach(copied, handlers)
    return copied


def _without_ours(original: Callable[..., None]) -> Callable[..., None]:
    """Return the constructor of a model's run that leaves the handlers of wrapped graphs out."""

    @functools.wraps(original)
    def init(self: Any, *, handlers: list[BaseCallbackHandler], **options: Any) -> None:
        ours = [each for each in handlers if hasattr(each, "orla_binding")]
        if ours:
            handlers = [each for each in handlers if each not in ours]
        original(self, handlers=handlers, **options)
        for handler in ours:
            handler.awaited.watch(self)  # type: ignore[attr-defined]

    return init


_OURS: dict[tuple[type, str], tuple[Any, Any]] = {
    (Pregel, "stream"): (_STREAM, _stream),
    (Pregel, "astream"): (_ASTREAM, _astream),
    (Pregel, "copy"): (_COPY, _copy),
    **{
        (run, "__init__"): (run.__init__, _without_ours(run.__init__))
        for run in (CallbackManagerForLLMRun, AsyncCallbackManagerForLLMRun)
    },
}


def install() -> None:
    """Let the handlers of wrapped graphs join from now on. Idempotent."""
    for (where, name), (original, ours) in _OURS.items():
        if getattr(where, name) is original:
            setattr(where, name, ours)


def uninstall() -> None:
    """Restore the methods of LangGraph and LangChain, except where another package wrapped ours."""
    for (where, name), (original, ours) in _OURS.items():
        if getattr(where, name) is ours:
            setattr(where, name, original)
