"""Clients that call their HTTP client themselves: what they send is announced, and what they return is theirs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing, closing, contextmanager
from typing import Any

from orla_lg.clients.sending import Carried, Sending, announced

_NOTHING = object()


@contextmanager
def _open(sending: Sending) -> Iterator[None]:
    """Announce a request, and raise what comes up for it as it is."""
    came: Carried | None = None
    with announced(sending):
        try:
            yield
        except Carried as carried:
            came = carried
    if came is not None and came.error is not None:
        raise came.error from came.error.__cause__


def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return what stands for the method *original* of a client; a generator of its sends with its first step."""
    sending = Sending()
    if inspect.iscoroutinefunction(original):

        async def asend(*args: Any, **kwargs: Any) -> Any:
            with _open(sending):
                sent = await original(*args, **kwargs)
            return _astepped(sending, sent) if inspect.isasyncgen(sent) else sent

        return functools.wraps(original)(asend)

    def send(*args: Any, **kwargs: Any) -> Any:
        with _open(sending):
            sent = original(*args, **kwargs)
        return _stepped(sending, sent) if inspect.isgenerator(sent) else sent

    return functools.wraps(original)(send)


def _stepped(sending: Sending, stream: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    with closing(stream):
        with _open(sending):
            first = next(stream, _NOTHING)
        if first is not _NOTHING:
            yield first
            yield from stream


async def _astepped(sending: Sending, stream: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
    async with aclosing(stream):
        with _open(sending):
            first = await anext(stream, _NOTHING)
        if first is not _NOTHING:
            yield first
            async for part in stream:
                yield part
