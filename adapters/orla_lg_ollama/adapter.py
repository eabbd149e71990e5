"""Ollama's server: models that come and go. Its cache can be told nothing but to stay and to leave with its model.

Facts are from its documents and sources as of version 0.33; nothing here was tried against a running Ollama.
Its OpenAI side heeds few fields and ignores the rest (``keep_alive``, ``tool_choice``, ``n`` among them); loading,
unloading and the time for which a model stays (``stay``) are ``/api/generate`` without a prompt.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Backend, Capability, Directions, Effect, Probe, Support, whole
from orla_lg.core.engine.capabilities import Scope, WholeCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.adapter import PLAIN_CAPABILITIES, PLAIN_WIRES, OpenAIAdapter, advised
from orla_lg_ollama.stay import Stay

LOAD_TIMEOUT_S = 600.0
"""A model is read from disk."""

CACHED_TOKENS_SINCE = (0, 33, 3)
"""The first version that counts cached tokens (``prompt_eval_cached_count``), on its OpenAI side too."""

OWN_WIRES = frozenset({"ollama-chat", "ollama-generate", "ollama-embed", "ollama-embeddings"})
"""Not asked for: other servers answer at their paths too, in another form (llama.cpp's once took chat completions at
``/api/chat``)."""

LOOK_EVERY_S = 30.0
"""How often it is looked whether a model is still the one that was told to stay: others may have unloaded it."""

_LATEST = ":latest"
_WHICH = "`model` in this backend's settings would let that model be kept loaded and unloaded: several are installed"
_NUM_CTX = re.compile(r"^num_ctx\s+(\d+)", re.MULTILINE)


class OllamaAdapter(OpenAIAdapter):
    """Knows what a model can and whether it is loaded, and bounds answers in the one way that Ollama heeds."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._model = backend.model or ""
        """The backend's model, or the only one that is installed; empty where that leaves several."""
        self._stay = Stay()
        self._looked_s = float("-inf")
        """When it was last seen loaded, as ``time.monotonic``."""
        self._is_telling = False

    async def probe(self) -> Probe:
        """Ask for the installed models, what ours can, and the context it was loaded with.

        Where several are installed and the backend names none, any of them may be asked for: nothing that one of them
        can or cannot is said of the backend, and none is kept loaded or unloaded.
        """
        plain = await super().probe()
        self._model = self.backend.model or (plain.models[0] if len(plain.models) == 1 else "")
        version = str((await self.peek(self.root + "api/version")).get("version") or "")
        shown = await self._show() if self._model else {}
        can = shown.get("capabilities")  # absent in versions that do not tell
        counts = _release(version) >= CACHED_TOKENS_SINCE
        short = {name.removesuffix(_LATEST): name for name in plain.models if name.endswith(_LATEST)}
        ours = () if self._model else (Capability.KEEP, Capability.FLUSH_ALL, Capability.SLEEP)
        return advised(
            plain,
            models=(*plain.models, *short),
            aliases=short,
            capabilities={
                **PLAIN_CAPABILITIES,
                Capability.TOOLS: _support(not isinstance(can, list) or "tools" in can),
                Capability.CACHED_TOKENS: _support(counts),
                Capability.KEEP: Support.EMULATED,
                Capability.FLUSH_ALL: Support.EMULATED,
                Capability.SLEEP: Support.NATIVE,
                **dict.fromkeys(ours, Support.FLAG),
            },
            advice=dict.fromkeys(ours, _WHICH),
            context_tokens=await self._context(shown) if self._model else None,
            vision="vision" in can if isinstance(can, list) else None,
            version=version,
            wires=PLAIN_WIRES | OWN_WIRES | await self.wires.spoken(version),
        )

    async def _show(self) -> Mapping[str, Any]:
        try:
            return await self.post(self.root + "api/show", {"model": self._model})
        except (EngineRefused, BackendUnavailable):
            return {}

    async def _context(self, shown: Mapping[str, Any]) -> int | None:
        """Return the context it runs with; what the model was trained for says nothing about that."""
        loaded = whole((await self._loaded()).get("context_length"))
        set_to = _NUM_CTX.search(str(shown.get("parameters") or ""))
        return loaded if loaded is not None or set_to is None else whole(set_to[1])

    async def _loaded(self) -> Mapping[str, Any]:
        """Return what is told of our model while it is in memory; nothing if it is not."""
        seen = await self.seen(self.root + "api/ps")
        models = _models(seen)
        if seen is None or models is None:
            return {}
        ours = next((entry for entry in models if _full(str(entry.get("name"))) == _full(self._model)), {})
        self._looked_s = time.monotonic() if ours else float("-inf")
        self._stay.saw(_left_s(ours, seen.headers.get("date")) if ours else None)
        return ours

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        """Say the caller's bound as ``max_tokens``: Ollama ignores its newer name, ``max_completion_tokens``."""
        return {} if ask.max_tokens is None else {"max_tokens": ask.max_tokens}

    # KVControl: the cache lives and dies with the model

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        """Say that it cannot be done."""
        return Effect.UNSUPPORTED

    async def release(self, scope: Scope) -> Effect:
        """Say that it cannot be done."""
        return Effect.UNSUPPORTED

    async def flush(self, scope: Scope) -> Effect:
        """Forget everything by unloading the model, which the next request loads again; nothing less is possible."""
        return await self.sleep() if isinstance(scope, WholeCache) else Effect.UNSUPPORTED

    # Lingering: the model stays, and what its cache holds may still make room for other requests

    async def linger(self, keep_s: float) -> Effect | None:
        """Have the model stay for *keep_s* more seconds, with an order only where it would leave too soon."""
        if not self._model:
            return None
        self._stay.needed(keep_s, time.monotonic())
        if self._is_telling:
            return None  # who tells looks again at what is needed before it ends
        self._is_telling = True
        try:
            return await self._tell_stay()
        finally:
            self._is_telling = False

    async def _tell_stay(self) -> Effect | None:
        if time.monotonic() - self._looked_s > LOOK_EVERY_S and not await self._loaded():
            return None  # it left already, and with it what was to be kept
        effect = None
        while (seconds := self._stay.to_tell(time.monotonic())) is not None:
            effect = await self._generate_nothing(Effect.PINNED, keep_alive=seconds)
            if effect is Effect.FAILED:
                break
            self._stay.told_s = seconds
        return effect

    # Sleepable

    async def sleep(self) -> Effect:
        """Unload the model: at once if it is idle, else when its last request has ended."""
        if not self._model:
            return Effect.UNSUPPORTED
        effect = await self._generate_nothing(Effect.FREED, keep_alive=0)
        return Effect.DEFERRED if effect is Effect.FREED and await self._loaded() else effect

    async def wake(self) -> Effect:
        """Load the model, for as long as the server keeps models by itself."""
        if not self._model:
            return Effect.UNSUPPORTED
        effect = await self._generate_nothing(Effect.RESTORED)
        return Effect.FAILED if effect is Effect.RESTORED and not await self._loaded() else effect

    async def _generate_nothing(self, effect: Effect, **more: Any) -> Effect:
        order = {"model": self._model, "stream": False, **more}
        try:
            await self.post(self.root + "api/generate", order, timeout_s=LOAD_TIMEOUT_S)
        except (EngineRefused, BackendUnavailable):
            return Effect.FAILED
        return effect


def _models(seen: httpx.Response | None) -> list[Mapping[str, Any]] | None:
    """Return the entries of ``/api/ps``; ``None`` where that was no answer."""
    try:
        told = None if seen is None else seen.json()
    except ValueError:
        return None
    models = told.get("models") if isinstance(told, Mapping) else None
    return [entry for entry in models if isinstance(entry, Mapping)] if isinstance(models, list) else None


def _left_s(model: Mapping[str, Any], server_date: str | None) -> float:
    """Return in how many seconds a loaded model would leave, by the server's own clock if it tells that."""
    try:
        now = parsedate_to_datetime(server_date) if server_date else datetime.now(UTC)
        return (datetime.fromisoformat(str(model.get("expires_at"))) - now).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _support(works: bool) -> Support:
    return Support.NATIVE if works else Support.UNSUPPORTED


def _full(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else name + _LATEST


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})", version)
    return tuple(int(part) for part in found.groups()) if found else ()
