"""The one place that the requests of all models' clients pass: ``send`` of httpx and httpx2.

Inside a wrapped graph, where a model's client is sending (``SENDING``, or the run of a LangChain model says so) and a
wire knows the path, a request becomes a call of the core. Anything else costs two context look-ups and passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import httpx
import httpx2

from orla_lg.clients import patching
from orla_lg.clients import way_in as known
from orla_lg.clients.asked import Asked, read
from orla_lg.clients.fitting import fitting
from orla_lg.clients.libraries import HTTPX, HTTPX2, Library
from orla_lg.clients.sender import ErrorStatus, HttpSender
from orla_lg.clients.sending import SENDING, CallSite, Carried, PassedBy, Sending
from orla_lg.core.steps import Steps, adrive, drive
from orla_lg.errors import OrlaError
from orla_lg.wires.registry import wire_at


class ModelRequest(NamedTuple):
    """A request that a core serves."""

    asked: Asked
    site: CallSite
    sending: Sending | None

    def steps(self, original: Callable[[], Any]) -> Steps:
        """Return the steps of its call; *original* sends it as the code meant it."""
        asked, site, sending = self
        for key in asked.secrets():
            site.serving.resources.masking.learn(key)
        attempts = 1 if sending is None else sending.max_attempts
        inflight = site.arrive(asked.wire.ask_of(asked.body), asked.timeout())
        inflight.fit = fitting(inflight, asked, site)
        watch = None if asked.wire.embeds else site.watch(inflight, asked.body)
        sender = HttpSender(
            site.clients, asked, original, max_attempts=attempts, passes_back=attempts > 1, watch=watch
        )
        return site.steps(inflight, sender)

    def answer(self, response: Any) -> Any:
        """Return the caller's *response*.

        Raises:
            Carried: The caller's client is to send the request itself.
        """
        if isinstance(response, PassedBy):
            raise Carried(passing=response)
        return response

    def heed(self, error: Exception) -> Any:
        """Return the response that an engine's final *error* brought.

        Raises:
            Exception: It is none; the caller's client may ask again.
            Carried: It is ours, and the caller's client must not see it.
        """
        if self.sending is None:
            self.site.give_back()
        if isinstance(error, ErrorStatus):
            return error.response
        if isinstance(error, OrlaError) and self.sending is not None:
            raise Carried(error) from error
        raise error


def _served(
    library: Library, client: Any, request: Any, sending: Sending | None, *, stream: bool
) -> ModelRequest | None:
    """Return the call that a request becomes; ``None`` for one that is none of our business."""
    wire = wire_at(request.url.path) if request.method == "POST" else None
    if wire is None:
        return None
    asked = read(library, client, request, wire, unread=stream)
    if asked is None:
        return None
    site = None if sending is None else sending.site
    if site is None:
        site = known.way_in.site(asked.body)
        if site is None or (sending is None and not site.of_model):
            return None
        if not wire.embeds:
            site.take()
    return ModelRequest(asked, site, sending)


def _sync(library: Library, original: Callable[..., Any]) -> Callable[..., Any]:
    def send(self: Any, request: Any, *, stream: bool = False, **how: Any) -> Any:
        sending = SENDING.get()
        if sending is None and known.way_in.model_run.get() is None:
            return original(self, request, stream=stream, **how)
        served = _served(library, self, request, sending, stream=stream)
        if served is None:
            return original(self, request, stream=stream, **how)
        token = SENDING.set(None)
        try:
            return served.answer(drive(served.steps(lambda: original(self, request, stream=stream, **how))))
        except Exception as error:  # noqa: BLE001 - raised again, unless it is an answer
            return served.heed(error)
        finally:
            SENDING.reset(token)

    return functools.wraps(original)(send)


def _async(library: Library, original: Callable[..., Any]) -> Callable[..., Any]:
    async def send(self: Any, request: Any, *, stream: bool = False, **how: Any) -> Any:
        sending = SENDING.get()
        if sending is None and known.way_in.model_run.get() is None:
            return await original(self, request, stream=stream, **how)
        served = _served(library, self, request, sending, stream=stream)
        if served is None:
            return await original(self, request, stream=stream, **how)
        token = SENDING.set(None)
        try:
            steps = served.steps(lambda: original(self, request, stream=stream, **how))
            return served.answer(await adrive(steps))
        except Exception as error:  # noqa: BLE001 - raised again, unless it is an answer
            return served.heed(error)
        finally:
            SENDING.reset(token)

    return functools.wraps(original)(send)


# Installed once for all cores, for as long as one of them is open; ``graph.interception`` knows when.

_REPLACED: tuple[tuple[Any, Library, Callable[..., Any]], ...] = (
    (httpx.Client, HTTPX, _sync),
    (httpx.AsyncClient, HTTPX, _async),
    (httpx2.Client, HTTPX2, _sync),
    (httpx2.AsyncClient, HTTPX2, _async),
)
_ours: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}
"""By class, what stands there and what stood there before; it stays while what is around it may still call it."""


def install(way_in: known.WayIn) -> None:
    """Look at what models' clients send from now on. Idempotent."""
    known.open_way_in(way_in)
    for kind, library, replacement in _REPLACED:
        if kind not in _ours:
            original = kind.send
            _ours[kind] = replacement(library, original), original
            kind.send = _ours[kind][0]
    patching.install()


def uninstall() -> None:
    """Let all requests pass, and restore the methods that no other package wrapped meanwhile."""
    known.close_way_in()
    patching.uninstall()
    for kind, (ours, original) in list(_ours.items()):
        if kind.send is ours:
            kind.send = original
            del _ours[kind]
