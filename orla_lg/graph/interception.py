"""The way in for models that know nothing of us: the OpenAI SDK's ``request``, while a wrapped graph runs.

Every form of a chat completion (plain, parsed, raw, streamed) passes the one method ``request`` of the SDK's
client, even from wrappers that bound ``create`` before we came. We replace it on the class; outside a
wrapped graph it costs two context look-ups and calls the original. Its other requests, and those of other
clients, come in below, at their HTTP client (``clients``).
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import openai

from orla_lg.clients import http, stainless
from orla_lg.clients.way_in import WayIn
from orla_lg.core.call import NO_HINTS, OBJECT, Ask, CallerTimeout, Hints
from orla_lg.core.guard.access import CallAccess
from orla_lg.core.guard.labels import LABELS, labels_said
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import Sender, pass_by
from orla_lg.core.record import Record
from orla_lg.core.steps import Steps, adrive, drive
from orla_lg.graph import execution, passing
from orla_lg.graph.context import CONFIG_KEY, MODEL_RUN, Core, Origin, followed, identify, namespace_of, origin
from orla_lg.graph.hints import hints_for, layers_for
from orla_lg.graph.tools.early import handover
from orla_lg.graph.tools.early.watch import watch_for
from orla_lg.graph.tracing import annotate, is_traced
from orla_lg.openai_api.client import AsyncEngineClient, EngineClient, SdkSender, timeout_of
from orla_lg.openai_api.pair_check import PairChecks
from orla_lg.wires.chat import ask_of
from orla_lg.wires.watching import AnswerWatch

CHAT_COMPLETIONS = "/chat/completions"
EMBEDDINGS = "/embeddings"
_SEEN = frozenset({CHAT_COMPLETIONS, "/responses", "/completions", EMBEDDINGS})

MANY_FIELDS = 100

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
    core.serving.resources.masking.learn(client.api_key)
    inflight = arrival(
        core, come_from, ask_of(options.json_data), timeout_of(client, options), said=said, may_pass=may_pass
    )
    on_end = end_of(come_from, on_record)
    binding = None if come_from is None else come_from.binding
    watch = agrees = None
    if come_from is not None and binding is not None and binding.tools is not None and binding.core is core:
        watch = watch_for(core, come_from, inflight, options.json_data)
        agrees = None if watch is None else PairChecks(core.serving).agrees
    sender = SdkSender(
        core.clients, client, original, options, form, assemble=assemble, shows_counts=shows_counts, watch=watch,
        agrees=agrees,
    )  # fmt: skip
    if options.url != CHAT_COMPLETIONS or not isinstance(options.json_data, OBJECT):
        return pass_by(inflight, sender, on_end)
    return core.serving.serve(inflight, sender, on_end)


def arrival(
    core: Core,
    come_from: Origin | None,
    ask: Ask,
    timeout: CallerTimeout | None,
    *,
    said: Hints = NO_HINTS,
    may_pass: bool = True,
) -> InFlightCall:
    """Return a call that arrives from a place in a graph.

    Args:
        core: What serves it.
        come_from: Where it is made.
        ask: What it asks for.
        timeout: Of the caller's client.
        said: Hints given with the call.
        may_pass: Whether it may go where its code says.
    """
    serving = core.serving
    call_id = serving.new_id()
    identity, run = identify(come_from, core, call_id)
    binding = come_from.binding if come_from is not None else None
    own = (binding.mapper,) if binding is not None and binding.core is core and binding.mapper else ()
    if not identity.identified:
        count_lost(core)
    inflight = serving.arrive(
        identity,
        ask,
        call_id=call_id,
        said=said,
        hints=hints_for(come_from, core, run),
        mappers=own,
        layers=layers_for(come_from, core, run),
        timeout=timeout,
        may_pass=may_pass,
    )
    inflight.holder = core
    around = None if come_from is None else come_from.metadata.get(CONFIG_KEY)
    if isinstance(around, Mapping) and LABELS in around:
        labels = labels_said(around)
        serving.guard.claims(labels)
        inflight.call.access = CallAccess(labels=labels)
    return inflight


def end_of(
    come_from: Origin | None, on_record: Callable[[Record], None] | None = None
) -> Callable[[Record], None] | None:
    """Return what is called with a call's record: *on_record*, and what puts it into the trace of its model run."""
    run_of_model = None if come_from is None else come_from.model_run
    if run_of_model is None or not is_traced(run_of_model):
        return on_record

    def on_end(record: Record) -> None:
        annotate(run_of_model, record)
        if on_record is not None:
            on_record(record)

    return on_end


class NodeCallSite:
    """A node of a wrapped graph, as clients other than OpenAI's chat completions know it (``clients``)."""

    def __init__(self, core: Core, come_from: Origin, body: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.serving = core.serving
        self.clients = core.clients
        self.untranslatable: str = core.untranslatable
        self._core = core
        self._come_from = come_from
        self._body = body
        self._started: Any = None
        """The model run, once its request is made."""

    @property
    def of_model(self) -> bool:  # noqa: D102
        return self._come_from.model_run is not None

    def is_first(self, field: str) -> bool:  # noqa: D102
        known = self._core.untranslated
        if field in known or len(known) >= MANY_FIELDS:
            return False
        known.add(field)
        return True

    def take(self) -> None:  # noqa: D102
        self._started = MODEL_RUN.get()
        followed(self._body)

    def give_back(self) -> None:  # noqa: D102
        if self._started is not None:
            MODEL_RUN.set(self._started)

    def arrive(self, ask: Ask, timeout: CallerTimeout | None) -> InFlightCall:  # noqa: D102
        return arrival(self._core, self._come_from, ask, timeout)

    def watch(self, inflight: InFlightCall, body: Mapping[str, Any]) -> AnswerWatch | None:  # noqa: D102
        binding = self._come_from.binding
        if binding is None or binding.tools is None or binding.core is not self._core:
            return None
        return watch_for(self._core, self._come_from, inflight, body)

    def steps(self, inflight: InFlightCall, sender: Sender) -> Steps:  # noqa: D102
        return self.serving.serve(inflight, sender, end_of(self._come_from))


def _site(body: Mapping[str, Any]) -> NodeCallSite | None:
    found = _found(body)
    return None if found is None else NodeCallSite(*found, body)


_WAY_IN = WayIn(MODEL_RUN, _site)


def _request(self: openai.OpenAI, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None) -> Any:
    form = {"cast_to": cast_to, "stream": stream, "stream_cls": stream_cls}
    original = functools.partial(_SYNC, self, options=options, **form)
    found = _ours(self, options)
    if found is None:
        return original()
    core, come_from = found
    if options.url != CHAT_COMPLETIONS and stainless.is_known(options):
        return stainless.request(NodeCallSite(core, come_from, options.json_data), self, _SYNC, options, form)
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
    if options.url != CHAT_COMPLETIONS and stainless.is_known(options):
        return await stainless.arequest(NodeCallSite(core, come_from, options.json_data), self, _ASYNC, options, form)
    return await adrive(chat_steps(core, come_from, self, original, options, form))


def _ours(client: object, options: Any) -> tuple[Core, Origin] | None:
    """Return the core that serves this request; ``None`` for requests that are none of our business."""
    if options.url not in _SEEN or isinstance(client, EngineClient | AsyncEngineClient):
        return None
    body = options.json_data if isinstance(options.json_data, dict) else {}
    found = _found(body)
    if found is not None and options.url != EMBEDDINGS:
        followed(body)
    return found


def _found(body: Mapping[str, Any]) -> tuple[Core, Origin] | None:
    """Return the core that serves a request with *body* that is made here; ``None`` outside wrapped graphs."""
    come_from = origin(body)
    if come_from is None or come_from.binding is None:
        if come_from is None or not namespace_of(come_from):  # else it is of a graph that is not wrapped
            for core in tuple(_cores):
                if core.serving.book.open_runs():  # probably a call of one of their nodes
                    count_lost(core)
        return None
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
        http.install(_WAY_IN)
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
        handover.uninstall()
        http.uninstall()
        if openai.OpenAI.request is _request:
            openai.OpenAI.request = _SYNC  # type: ignore[method-assign]
        if openai.AsyncOpenAI.request is _arequest:
            openai.AsyncOpenAI.request = _ASYNC  # type: ignore[method-assign]


def count_lost(core: Core) -> None:
    """Count a chat completion without any context, made while graphs ran, and warn of the first."""
    core.serving.lost()
    if core.lost.is_first():
        log.warning(
            "a chat completion was made while a wrapped graph ran, but outside the graph's context: it has no stage, "
            "and is not mapped as a node's call. If a node made it, its context was lost on the way, as in a plain "
            "ThreadPoolExecutor and in loop.run_in_executor: use ContextThreadPoolExecutor (of "
            "langchain_core.runnables.config) or asyncio.to_thread, or submit contextvars.copy_context().run. This "
            "is logged once; statistics().unidentified counts such calls"
        )
