"""Prompts that stay in their replica: the core's prefetcher decides as ever, and the replica sends the request."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from orla_lg.core.call import CHARS_PER_TOKEN, Usage
from orla_lg.core.engine.backend import Effect
from orla_lg.core.engine.capabilities import Warmable, Warmed
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.prefetch.prompts import Prompt
from orla_lg.link.messages import Message, StopWarm, Warm, WarmEnded
from orla_lg.serve.link.flat import FlatAsk, whole

MOST_UNDER_WAY = 64
"""Prefetches of one replica: each backend has one at a time."""


class PromptKeeper(Protocol):
    """A replica, as the prompts that it keeps know it."""

    async def warm(self, warm: Warm) -> Warmed:
        """Have the replica send a prefetch, from any loop; cancelling this has it given up."""
        ...


@dataclass(frozen=True, slots=True)
class KeptPrompt(Prompt):
    """A prompt of which only hashes and lengths are here; it is sent by what keeps it."""

    keeper: PromptKeeper | None = None
    workflow: str = ""
    backend: str = ""
    messages: int | None = None
    """So many of its messages; ``None``: all."""
    kept_for: str = ""
    """The backend that it was sent to, where it is to be sent to another one now, and the model's name there."""
    model: str = ""

    @classmethod
    def of(cls, inflight: InFlightCall, chars: int, frame: int, keeper: PromptKeeper) -> Self:
        """Return what a replica keeps of a call.

        Args:
            inflight: The call, with its grant.
            chars: Of all its text.
            frame: The same number where the requests are the same but for their messages.
            keeper: The replica.
        """
        call = inflight.call
        return cls(
            call.id, call.standing.graph, call.identity.stage, call.ask, {"frame": frame}, chars,
            chars // CHARS_PER_TOKEN, keeper=keeper, workflow=call.identity.workflow, backend=inflight.backend or "",
        )  # fmt: skip

    def beginning(self, messages: int) -> Self:
        """Return its first *messages* messages as a prompt."""
        ask = self.ask
        assert isinstance(ask, FlatAsk)
        first = ask.first(messages)
        tokens = round(self.tokens * first.prompt_chars / max(1, self.chars))
        return replace(self, ask=first, chars=first.prompt_chars, tokens=tokens, messages=messages)

    def elsewhere(self, backend: str, model: str) -> Self:
        """Return it as its replica would send it to another backend."""
        return replace(self, backend=backend, kept_for=self.kept_for or self.backend, model=model, base=None)

    def extended(self, messages: Sequence[Any]) -> Self:
        """Return what is certain of the prompt after its call; the *messages* are known by hashes and lengths."""
        root = self if self.base is None else self.base
        assert isinstance(root, type(self)) and isinstance(root.ask, FlatAsk)
        ask = root.ask.followed(messages)
        chars = root.chars + sum(message.chars for message in messages)
        return replace(root, ask=ask, chars=chars, tokens=root.scaled(chars), base=root)

    async def warm(self, adapter: Warmable, fields: Mapping[str, Any]) -> Warmed:
        """Have its replica send it, with the adapter's *fields*."""
        assert self.keeper is not None
        prefix = self.ask.prefix
        whole_prompt, split = self.messages is None, self.base is not None
        named = split or not whole_prompt
        return await self.keeper.warm(
            Warm(
                "", self.workflow, self.backend, dict(fields), self.stage if named else "",
                self.graph if named else "", self.messages, prefix[-1] if prefix else 0,
                self.call_id if split else "", self.kept_for, self.model,
            )
        )  # fmt: skip


_ORDERS = itertools.count(1)


class LinkKeeper:
    """The replica at the other end of a link, for the prompts that it keeps.

    Args:
        loop: The link's.
        send: Sends a message to the replica; on that loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, send: Callable[[Message], None]) -> None:
        self._loop = loop
        self._send = send
        self._under_way: dict[str, Future[Warmed]] = {}
        self._closed = False

    async def warm(self, warm: Warm) -> Warmed:
        """Have the replica send a prefetch."""
        order, ended = f"warm-{next(_ORDERS)}", Future[Warmed]()
        try:
            self._loop.call_soon_threadsafe(self._begin, warm._replace(order=order), ended)
            return await asyncio.wrap_future(ended)
        except RuntimeError:  # the link's loop was closed
            return Warmed(Effect.FAILED)
        except asyncio.CancelledError:
            self._loop.call_soon_threadsafe(self._stop, order)
            raise

    def _begin(self, warm: Warm, ended: Future[Warmed]) -> None:
        if self._closed or len(self._under_way) >= MOST_UNDER_WAY:
            _settle(ended, Warmed(Effect.FAILED))
        elif not ended.cancelled():
            self._under_way[warm.order] = ended
            self._send(warm)

    def _stop(self, order: str) -> None:
        if self._under_way.pop(order, None) is not None and not self._closed:
            self._send(StopWarm(order))

    def ended(self, said: WarmEnded) -> None:
        """Take in how a prefetch ended."""
        ended = self._under_way.pop(said.order, None)
        if ended is None:
            return
        usage = Usage(whole(said.prompt_tokens) or 0, whole(said.cached_tokens))
        _settle(ended, Warmed(Effect.FAILED) if said.error is not None else Warmed(Effect.WARMED, usage))

    def close(self) -> None:
        """Note that the link was lost."""
        self._closed = True
        for ended in self._under_way.values():
            _settle(ended, Warmed(Effect.FAILED))
        self._under_way.clear()


def _settle(ended: Future[Warmed], warmed: Warmed) -> None:
    if ended.set_running_or_notify_cancel():
        ended.set_result(warmed)
