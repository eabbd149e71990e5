"""SDKs of the generator that OpenAI's comes from: ``request(cast_to, options, *, stream, stream_cls)``.

Such an SDK retries, and wraps what its HTTP client raises. Retries are ours (each is an attempt of one call), so it
makes none; what it would wrap comes up as ``Carried``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from orla_lg.clients import way_in as known
from orla_lg.clients.sending import SENDING, CallSite, Carried, PassedBy, Sending
from orla_lg.wires.registry import wire_at


class Options(Protocol):
    """What such an SDK is asked with."""

    method: str
    url: str
    json_data: Any
    files: Any

    def get_max_retries(self, max_retries: int) -> int:
        """Return how often to retry, *max_retries* being the client's own number."""
        ...

    def model_copy(self, *, update: Mapping[str, Any]) -> Any:
        """Return a copy with other values."""
        ...


def is_known(options: Options) -> bool:
    """Whether a request is of a wire that we know."""
    is_post = options.method.lower() == "post" and isinstance(options.json_data, dict) and not options.files
    return is_post and wire_at(options.url) is not None


def is_embedding(options: Options) -> bool:
    """Whether a request of a wire that we know asks for vectors."""
    wire = wire_at(options.url)
    return wire is not None and wire.embeds


def site_of(options: Options) -> CallSite | None:
    """Return where a request of a wire that we know is made; ``None`` for any other."""
    if not is_known(options):
        return None
    site = known.way_in.site(options.json_data)
    if site is not None and not is_embedding(options):
        site.take()
    return site


def request(
    site: CallSite, client: Any, original: Callable[..., Any], options: Options, form: Mapping[str, Any]
) -> Any:
    """Send a request of *client* by the SDK's *original* method, and let the HTTP client below serve it."""
    attempts = 1 + options.get_max_retries(client.max_retries)
    token = SENDING.set(Sending(attempts, site))
    try:
        return original(client, options=options.model_copy(update={"max_retries": 0}), **form)
    except Carried as carried:
        came = carried
    finally:
        SENDING.reset(token)
    passing = _opened(came)
    with passing.recorded():
        return original(client, options=options.model_copy(update={"json_data": passing.body}), **form)


async def arequest(
    site: CallSite, client: Any, original: Callable[..., Awaitable[Any]], options: Options,
    form: Mapping[str, Any],
) -> Any:  # fmt: skip
    """``request`` for a running loop."""
    attempts = 1 + options.get_max_retries(client.max_retries)
    token = SENDING.set(Sending(attempts, site))
    try:
        return await original(client, options=options.model_copy(update={"max_retries": 0}), **form)
    except Carried as carried:
        came = carried
    finally:
        SENDING.reset(token)
    passing = _opened(came)
    with passing.recorded():
        return await original(client, options=options.model_copy(update={"json_data": passing.body}), **form)


def _opened(carried: Carried) -> PassedBy:
    """Return what the client is to send itself; raise what was carried otherwise."""
    if carried.error is not None:
        raise carried.error from carried.error.__cause__
    assert carried.passing is not None
    return carried.passing


def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands for the method *original* of an SDK's client."""
    if inspect.iscoroutinefunction(original):

        async def asend(self: Any, cast_to: Any, options: Any, **form: Any) -> Any:
            site = site_of(options)
            if site is None:
                return await original(self, cast_to, options, **form)
            return await arequest(site, self, original, options, {**form, "cast_to": cast_to})

        return functools.wraps(original)(asend)

    def send(self: Any, cast_to: Any, options: Any, **form: Any) -> Any:
        site = site_of(options)
        if site is None:
            return original(self, cast_to, options, **form)
        return request(site, self, original, options, {**form, "cast_to": cast_to})

    return functools.wraps(original)(send)
