"""Whether an engine keeps apart what it caches under different salts; tried, since an engine takes any field."""

from __future__ import annotations

import secrets
from typing import Any

from orla_lg.core.engine.backend import Support
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.adapter import OpenAIAdapter
from orla_lg.wires import chat

FIELD = "cache_salt"

_REFUSALS = (400, 422)


class SaltTrial:
    """What one adapter knows of its engine's salts: what its version promises, and, once tried, what it does."""

    def __init__(self, adapter: OpenAIAdapter) -> None:
        self._adapter = adapter
        self._tried: tuple[str, bool | None] | None = None
        """For the incarnation of the engine that was asked."""

    async def support(self, model: str, incarnation: str, prompt_tokens: int, *, promised: bool) -> Support:
        """Return whether salts keep prefixes apart; tried only where tenants are isolated, once for each start.

        Args:
            model: Which one to ask.
            incarnation: Of the engine.
            prompt_tokens: About how long a prompt must be for any of it to be cached.
            promised: What the version is known to do, for where nothing shows.
        """
        apart: bool | None = None
        if self._adapter.backend.isolate_tenants:
            if self._tried is None or self._tried[0] != incarnation or self._tried[1] is None:
                self._tried = incarnation, await keeps_apart(self._adapter, model, prompt_tokens)
            apart = self._tried[1]
        return Support.NATIVE if (promised if apart is None else apart) else Support.UNSUPPORTED


async def keeps_apart(adapter: OpenAIAdapter, model: str, prompt_tokens: int) -> bool | None:
    """Ask the same twice under one salt and once under another, for one token each.

    Returns whether the engine finds a prompt under its own salt only; ``None`` where that does not show, since it
    counts no cached tokens or is too busy.

    Args:
        adapter: The engine's.
        model: Which one to ask.
        prompt_tokens: About how long the prompt must be for any of it to be cached.
    """
    asked = f"{secrets.token_hex(8)} " + "a " * prompt_tokens
    question: dict[str, Any] = {
        "model": model, "messages": [{"role": "user", "content": asked}], "max_tokens": 1, "temperature": 0,
    }  # fmt: skip
    mine, other = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    found: list[int] = []
    for salt in (mine, mine, other):
        try:
            told = await adapter.post("chat/completions", {**question, FIELD: salt})
        except EngineRefused as error:
            return False if error.status in _REFUSALS else None
        except BackendUnavailable:
            return None
        found.append(chat.usage_of(told.get("usage") or {}).cached_tokens or 0)
    _, own, strange = found
    return None if not own else not strange
