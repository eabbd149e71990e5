"""The way in for models that know nothing of us: the OpenAI SDK's ``request``, while a wrapped graph runs.

Every form of a chat completion (plain, parsed, raw, streamed) passes the one method ``request`` of the SDK's
client, even from wrappers that bound ``create`` before we came. We replace it on the class; outside a
wrapped graph it costs two context look-ups and calls the original. The Responses API passes and is
recorded as external: it is another protocol, which engines of our users hardly speak.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import openai

from orla_lg.core.call import NO_HINTS, OBJECT, Hints
from orla_lg.core.lifecycle import arrive, pass_by, serve
from orla_lg.core.record import Record
from orla_lg.core.steps import Steps, adrive, drive
from orla_lg.graph import execution, passing
from orla_lg.graph.context import Core, Origin, followed, identify, namespace_of, origin
from orla_lg.graph.hints import hints_for, layers_for
from orla_lg.graph.tracing import annotate, is_traced
from orla_lg.openai_api.client import AsyncEngineClient, EngineClient, SdkSender, timeout_of
from orla_lg.wires.chat import ask_of

CHAT_COMPLETIONS = "/chat/completions"
_SEEN = frozenset({CHAT_COMPLETIONS, "/responses", "/completions"})

log = logging.getLogger("orla_lg")

_SYNC = openai.OpenAI.request
_ASYNC = openai.AsyncOpenAI.request


def chat_steps(
    core: Core,
    come_from: Origin | None,
    client: openai.OpenAI | openai.AsyncOpenAI,
    original: Callable[[], Any],
    options: Any,
    form: Mapping[str, Any],
    *,
    said: Hints = NO_HINTS,
    may_pass: bool = True,
    assemble: bool = False,
    shows_counts: bool = False,
    on_record: Callable[[Record], None] | None = None,
) -> Steps:
    """Return the steps of one chat completion: its identity, its request, and how to send it."""
    serving = core.serving
    serving.resources.masking.learn(client.api_key)
    call_id = serving.new_id()
    identity, run = identify(come_from, core, call_id)
    binding = come_from.binding if come_from is not None else None
    own = (binding.mapper,) if binding is not None and binding.core is core and binding.mapper else ()
    inflight = arrive(
        serving.services,
        identity,
        ask_of(options.json_data),
        call_id=call_id,
        said=said,
        hints=hints_for(come_from, core, run),
        mappers=own,
        layers=layers_for(come_from, core, run),
        timeout=timeout_of(client, options),
        may_pass=may_pass,
    )
    on_end = on_record
    if come_from is not None and (run_of_model := come_from.model_run) is not None and is_traced(run_of_model):

        def on_end(record: Record) -> None:
            annotate(run_of_model, record)
            if on_record is not None:
                on_record(record)

    if not identity.identified:
        count_lost(core)
    sender = SdkSender(core.clients, client, original, options, form, assemble=assemble, shows_counts=shows_counts)
    if options.url != CHAT_COMPLETIONS or not isinstance(options.json_data, OBJECT):
        return pass_by(inflight, sender, on_end)
    return serve(inflight, sender, on_end)


def _request(self: openai.OpenAI, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None) -> Any:
    form = {"cast_to": cast_to, "stream": stream, "stream_cls": stream_cls}
    original = functools.partial(_SYNC, self, options=options, **form)
    found = _ours(self, options)
    if found is None:
        return original()
    core, come_from = found
    return drive(chat_steps(core, come_from, self, original, options, form))


async def _arequest(
    self: openai.AsyncOpenAI, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None
) -> Any:
    form = {"cast_to": cast_to, "stream": stream, "stream_cls": stream_cls}
    original = functools.partial(_ASYNC, self, options=options, **form)
    found = _ours(self, options)
    if found is None:
        return await original()
    core, come_from = found
    return await adrive(chat_steps(core, come_from, self, original, options, form))


def _ours(client: object, options: Any) -> tuple[Core, Origin] | None:
    """Return the core that serves this request; ``None`` for requests that are none of our business."""
    if options.url not in _SEEN or isinstance(client, EngineClient | AsyncEngineClient):
        return None
    come_from = origin(options.json_data if isinstance(options.json_data, dict) else {})
    if come_from is None or come_from.binding is None:
        if come_from is None or not namespace_of(come_from):  # else it is of a graph that is not wrapped
            for core in tuple(_cores):
                if core.serving.book.open_runs():  # probably a call of one of their nodes
                    count_lost(core)
        return None
    followed()
    return come_from.binding.core, come_from


# Installed once for all cores, for as long as one of them is open.

_lock = threading.RLock()
"""Reentrant, because a collector may end a core's interception at any point of what is done under it."""

_cores: weakref.WeakSet[Core] = weakref.WeakSet()
"""Open ones that are still referred to: to be intercepted for keeps none alive."""


def install(core: Core) -> None:
    """Intercept from now on, for as long as *core* is open. Idempotent."""
    with _lock:
        _cores.add(core)
        execution.install()
        passing.install()
        openai.OpenAI.request = _request  # type: ignore[method-assign,assignment]
        openai.AsyncOpenAI.request = _arequest  # type: ignore[method-assign,assignment]


def uninstall(core: Core) -> None:
    """End interception for *core*; the last one restores the SDK unless it was wrapped again after us."""
    with _lock:
        _cores.discard(core)
    restore_unless_used()


def restore_unless_used() -> None:
    """Restore the SDK if there is no core left."""
    with _lock:
        if len(_cores):
            return
        execution.uninstall()
        passing.uninstall()
        if openai.OpenAI.request is _request:
            openai.OpenAI.request = _SYNC  # type: ignore[method-assign]
        if openai.AsyncOpenAI.request is _arequest:
            openai.AsyncOpenAI.request = _ASYNC  # type: ignore[method-assign]


def count_lost(core: Core) -> None:
    """Count a chat completion without any context, made while graphs ran, and warn of the first."""
    core.serving.book.lost()
    if core.lost.is_first():
        log.warning(
            "a chat completion was made while a wrapped graph ran, but outside the graph's context: it has no stage, "
            "and is not mapped as a node's call. If a node made it, its context was lost on the way, as in a plain "
            "ThreadPoolExecutor and in loop.run_in_executor: use ContextThreadPoolExecutor (of "
            "langchain_core.runnables.config) or asyncio.to_thread, or submit contextvars.copy_context().run. This "
            "is logged once; statistics().unidentified counts such calls"
        )
