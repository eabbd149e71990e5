"""Model runs that no request of ours follows: recorded as external, and warned of once for each class.

A chat model whose client is not intercepted calls its engine all the same, past queues and limits, and nothing would
show it. But LangChain reports where each model run starts and ends. A run is *awaited* from its start until a request
is seen that it makes, or until another model's run starts inside it. One still awaited at its end made its request by
ways of its own. LangChain's run manager, which reports tokens and end, is listened to only while its run is awaited.

A fake model makes no request either, and is recorded: a stage called a model, and it was not one of ours. An answer
that LangChain's own cache has is no call of a model, and is not recorded.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from uuid import UUID
from weakref import WeakValueDictionary

from langchain_core.callbacks.manager import (
    AsyncCallbackManager,
    AsyncCallbackManagerForLLMRun,
    CallbackManager,
)
from langchain_core.outputs import LLMResult
from langchain_core.runnables.config import var_child_runnable_config

from orla_lg.core.background import is_collecting
from orla_lg.core.call import NO_HINTS, Ask, Usage
from orla_lg.core.inflight import ABANDONED
from orla_lg.errors import OrlaError
from orla_lg.graph.context import MODEL_RUN, Core, GraphHandler, ModelRun, completed, identify
from orla_lg.graph.hints import hints_for
from orla_lg.graph.running_node import RunningNode

log = logging.getLogger("orla_lg")

MANY_CLASSES = 100
"""So many classes of models are warned of."""

MOST_AWAITED = 10_000
"""Of runs whose end is never reported, the oldest are forgotten."""

TOKEN, END, ERROR = "on_llm_new_token", "on_llm_end", "on_llm_error"
"""How LangChain calls what a run reports."""

FAKES = ("langchain_core.language_models.fake", "langchain_core.language_models.fake_chat_models")
"""Modules of models that make no request, for tests."""


class Awaited(NamedTuple):
    """A model run of which no request was seen yet."""

    run: ModelRun
    serialized: Mapping[str, Any]
    """What LangChain says of its model."""
    began_s: float
    siblings: list[UUID]
    """Runs of one call of the model, with several prompts: all start before any request."""
    is_text: bool
    """It is that of a text model."""
    managers: list[Any]
    """What reports its tokens and its end."""

    @property
    def kind(self) -> str:
        """The class of its model, after its module as far as LangChain says that."""
        path = self.serialized.get("id")
        return ".".join(map(str, path)) if isinstance(path, list) and path else "a model of unknown class"


_MADE: WeakValueDictionary[UUID, Any] = WeakValueDictionary()
"""What will report of runs that have not started yet."""


class AwaitedRequests:
    """The awaited model runs of one handler, of those that hear a run the innermost one's."""

    def __init__(self, core: Core, handler: GraphHandler) -> None:
        self._core = core
        self._handler = handler
        self._lock = threading.RLock()
        """Reentrant, because the collector may end a dropped stream at any point of what is done under it."""
        self._runs: dict[UUID, Awaited] = {}
        self._answered: set[UUID] = set()
        """Of these, runs that have a token already: a request that is seen now is none of theirs."""

    def begin(
        self, run: ModelRun, serialized: Mapping[str, Any] | None, *, one_of: int, is_text: bool = False
    ) -> None:
        """Await the request of a run that starts now, *one_of* so many of one call of its model."""
        siblings = [run.id]
        if (held := MODEL_RUN.get()) is not None:
            before, others = held[1], held[0].awaited
            if before.id == run.id:  # an outer graph's handler heard of it first
                others.seen(run.id)
            elif (around := others.get(before.id)) is not None:
                if one_of > 1 and before.parent_id == run.parent_id:
                    siblings = around.siblings
                    siblings.append(run.id)
                else:  # a model that asks another one
                    others.seen(before.id)
        with self._lock:
            self._runs[run.id] = Awaited(run, serialized or {}, self._core.serving.clock(), siblings, is_text, [])
            if (manager := _MADE.pop(run.id, None)) is not None:
                self.watch(manager)
            if len(self._runs) > MOST_AWAITED:
                oldest = next(iter(self._runs))
                del self._runs[oldest]
                self._answered.discard(oldest)

    def get(self, run: UUID) -> Awaited | None:
        """Return a run that is awaited."""
        return self._runs.get(run)

    def watch(self, manager: Any) -> None:
        """Listen to what reports a run's tokens and end, while the run is awaited."""
        if (found := self._runs.get(manager.run_id)) is None:  # that of an async run is made before the run starts
            _MADE[manager.run_id] = manager
        else:
            found.managers.append(manager)
            wait = _await if isinstance(manager, AsyncCallbackManagerForLLMRun) else _call
            for name, heard in ((TOKEN, self._has_token), (END, self._has_end), (ERROR, self._has_error)):
                vars(manager)[name] = functools.partial(wait, manager, name, heard)

    def _has_token(self, manager: Any, token: object) -> None:
        with self._lock:
            if manager.run_id in self._runs:
                self._answered.add(manager.run_id)
        vars(manager).pop(TOKEN, None)

    def _has_end(self, manager: Any, result: Any) -> None:
        self.ended(manager.run_id, result)

    def _has_error(self, manager: Any, error: Any) -> None:
        self.ended(manager.run_id, error=error)

    def seen(self, run: UUID) -> None:
        """Await a run no longer: a request of it, or of what it started, is served or recorded."""
        with self._lock:
            found = None if run in self._answered else self._runs.pop(run, None)
            if found is None:
                return
            if len(served := self._core.served_kinds) < MANY_CLASSES:
                served.add(found.kind)
            for manager in found.managers:
                heard = vars(manager)
                for name in (TOKEN, END, ERROR):
                    heard.pop(name, None)
            if len(found.siblings) > 1:
                for each in found.siblings:
                    self.seen(each)

    def seen_in(self, node: RunningNode, body: Mapping[str, Any]) -> None:
        """Note that a request with *body* is made in *node*, by a run that is not in its context."""
        for each in list(self._runs.values()):
            if each.is_text and each.run.node is node and each.run.asks(body):
                self.seen(each.run.id)

    def ended(self, run: UUID, result: LLMResult | None = None, error: BaseException | str | None = None) -> None:
        """Note that a run ended, and record it if it is still awaited."""
        with self._lock:
            found, answered = self._runs.pop(run, None), run in self._answered
            self._answered.discard(run)
        dropped = error == ABANDONED or isinstance(error, asyncio.CancelledError)
        if dropped and not answered and found is not None and found.kind in self._core.served_kinds:
            return  # before its request: those of its model are served
        if found is None or (result is not None and _usage_metadata(result).get("total_cost") == 0):
            return  # LangChain's cache had the answer: it then says that this one costs nothing
        if is_collecting():
            self._core.serving.background.hand_over(functools.partial(self._passed, found, result, error))
        else:
            self._passed(found, result, error)

    def left(self, node: RunningNode) -> None:
        """Note that a node ended: runs that began in it, and of which no end was reported, were dropped."""
        if not self._runs:
            return
        for each in [each for each in list(self._runs.values()) if each.run.node is node]:
            self.ended(each.run.id, error=ABANDONED)

    def _passed(self, awaited: Awaited, result: LLMResult | None, error: BaseException | str | None) -> None:
        """Record a run whose request was not seen, and warn of the class of its model."""
        core, run, kind = self._core, awaited.run, awaited.kind
        config = var_child_runnable_config.get() or {}
        origin = completed(self._handler.orla_binding, run.metadata, run.parent_id, config, run, run.node)
        call_id = core.serving.new_id()
        identity, state = identify(origin, core, call_id)
        ask = Ask(str(run.metadata.get("ls_model_name") or kind.rpartition(".")[2]), ())
        arriving = functools.partial(core.serving.arrive, identity, ask, call_id=call_id, may_pass=True)
        try:
            inflight = arriving(hints=hints_for(origin, core, state))
        except OrlaError:  # of hints that are wrong: the call has ended without them, and is recorded without them
            inflight = arriving(hints=NO_HINTS)
        inflight.call.arrived_s = awaited.began_s
        inflight.external, inflight.why_external = True, f"no request of {kind} is seen"
        if result is not None and (usage := _usage_in(result)) is not None:
            inflight.saw(usage)
        inflight.finish(error)
        if error is None:
            self._warn(identity.stage, kind)

    def _warn(self, stage: str, kind: str) -> None:
        warned = self._core.unseen
        if kind in warned or len(warned) >= MANY_CLASSES or kind.rpartition(".")[0] in FAKES:
            return
        warned.add(kind)
        log.warning(
            "stage %r calls a model of class %s, whose requests do not pass where orla_lg could serve them: they go "
            "past queues, mappings and limits, and are recorded as external. `orla-lg clients` lists the clients "
            "whose calls are served: use a model with one of them, or ChatOrla. This is logged once for each class",
            stage, kind,
        )  # fmt: skip


def _call(manager: Any, name: str, heard: Callable[[Any, Any], None], *args: Any, **named: Any) -> Any:
    """Note what a run reports, and let it report that."""
    heard(manager, args[0] if args else next(iter(named.values()), None))
    return getattr(type(manager), name)(manager, *args, **named)


async def _await(manager: Any, name: str, heard: Callable[[Any, Any], None], *args: Any, **named: Any) -> Any:
    """``_call`` for a run that reports in a running loop."""
    heard(manager, args[0] if args else next(iter(named.values()), None))
    return await getattr(type(manager), name)(manager, *args, **named)


def _usage_metadata(result: LLMResult) -> Mapping[str, Any]:
    """Return what the first answer says of its tokens, if it is a message."""
    answers = result.generations[0] if result.generations else []
    message = getattr(answers[0], "message", None) if answers else None
    said = getattr(message, "usage_metadata", None)
    return said if isinstance(said, Mapping) else {}


def _usage_in(result: LLMResult) -> Usage | None:
    said = _usage_metadata(result)
    if "input_tokens" not in said:
        return None
    details = said.get("input_token_details")
    cached = details.get("cache_read") if isinstance(details, Mapping) else None
    return Usage(
        _count(said["input_tokens"]), None if cached is None else _count(cached), _count(said.get("output_tokens"))
    )


def _count(said: object) -> int:
    return said if isinstance(said, int) and not isinstance(said, bool) and said >= 0 else 0


# Text models: LangChain gives their starts only to handlers that take each token too.

_STARTS: Mapping[Any, Any] = {each: each.on_llm_start for each in (CallbackManager, AsyncCallbackManager)}


def _hear(manager: Any, serialized: Any, managers: Any, options: Mapping[str, Any]) -> Any:
    for run in managers:
        for handler in manager.handlers:
            if isinstance(getattr(handler, "awaited", None), AwaitedRequests):
                handler.model_started(
                    serialized, None, run.run_id, run.parent_run_id, run.metadata, options.get("batch_size", 1)
                )
                handler.awaited.watch(run)
    return managers


@functools.wraps(CallbackManager.on_llm_start)
def _start(self: Any, serialized: Any, prompts: Any, run_id: Any = None, **options: Any) -> Any:
    return _hear(self, serialized, _STARTS[CallbackManager](self, serialized, prompts, run_id, **options), options)


@functools.wraps(AsyncCallbackManager.on_llm_start)
async def _astart(self: Any, serialized: Any, prompts: Any, run_id: Any = None, **options: Any) -> Any:
    managers = await _STARTS[AsyncCallbackManager](self, serialized, prompts, run_id, **options)
    return _hear(self, serialized, managers, options)


_OURS: Mapping[Any, Any] = {CallbackManager: _start, AsyncCallbackManager: _astart}


def install() -> None:
    """Hear of text models from now on. Idempotent."""
    for manager, original in _STARTS.items():
        if manager.on_llm_start is original:
            manager.on_llm_start = _OURS[manager]


def uninstall() -> None:
    """Restore LangChain's methods, except where another package wrapped ours."""
    for manager, original in _STARTS.items():
        if manager.on_llm_start is _OURS[manager]:
            manager.on_llm_start = original
