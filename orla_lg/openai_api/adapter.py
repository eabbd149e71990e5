"""The plain adapter, and what adapters of OpenAI-compatible engines are made of.

An adapter for such an engine is a page: what it is (``probe``), what to tell it with a request
(``request_fields``), and what else it can (``core.control``), said with ``get``, ``post`` and ``effect_of``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar
from urllib.parse import urlsplit, urlunsplit

import httpx

from orla_lg.core.boundary.bounded import OutOfBounds, parse_json, read_body
from orla_lg.core.call import Ask, Chunk, Usage
from orla_lg.core.engine.backend import Backend, Capability, Directions, Effect, Probe, Support, whole
from orla_lg.core.engine.capabilities import Warmed
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.dialect import REFUSALS, STREAM_OPTIONS
from orla_lg.openai_api.home import Home, Upgrade, certificates
from orla_lg.openai_api.wire_trial import WireTrial
from orla_lg.wires import chat, reading

TIMEOUT_S = 5.0
"""For questions that an engine answers at once."""

MAX_BYTES = 16 * 1024 * 1024
"""Of an answer to such a question; a long prompt's tokens take a tenth of that."""

PLAIN_CAPABILITIES: Mapping[Capability, Support] = {
    **dict.fromkeys(Capability, Support.UNSUPPORTED),
    Capability.JSON_SCHEMA: Support.NATIVE,
    Capability.TOOLS: Support.NATIVE,
    Capability.STREAM_USAGE: Support.NATIVE,
    Capability.CACHED_TOKENS: Support.NATIVE,
    Capability.WARM: Support.EMULATED,
}
"""What OpenAI's API promises; a warm-up is a request for one token."""

PLAIN_WIRES = frozenset({"chat", "completions", "embeddings"})
"""Wires that OpenAI's API is made of since its beginning; which others an engine speaks is asked (``WireTrial``)."""


class Answer(httpx.Response):
    """A short answer, read within bounds."""

    def json(self, **_: Any) -> Any:
        """Return what its JSON says.

        Raises:
            ValueError: It is no JSON, or none that is read.
        """
        return parse_json(self.content)


class OpenAIAdapter:
    """Any server that speaks OpenAI's chat completions; takes for granted what the API promises."""

    keep_alive = True
    prefill_only: ClassVar[Mapping[str, Any]] = {"max_tokens": 1}
    """What makes a request stop after its prefill, or as soon after it as the engine allows."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._home = Home(backend)
        self._counts_streams = True
        """Whether the engine takes ``stream_options``; found out by its refusal."""
        self.wires = WireTrial(self)

    # BackendAdapter

    async def probe(self) -> Probe:
        """Ask which models are served, and which wires are spoken."""
        try:
            listed = (await self.get("models")).get("data")
        except BackendUnavailable:
            self.wires.forget()  # what answers there next may be another engine
            raise
        entries = listed if isinstance(listed, list) else ()
        models = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        return Probe(
            models=tuple(entry["id"] for entry in models),
            aliases=_same_models(models),
            capabilities=PLAIN_CAPABILITIES,
            context_tokens=self._context_of(models),
            wires=PLAIN_WIRES | await self.wires.spoken(),
        )

    def _context_of(self, models: Sequence[Mapping[str, Any]]) -> int | None:
        """Return the context of the backend's model; of several, the longest: any of them may be asked for."""
        ours = [entry for entry in models if entry["id"] == self.backend.model] or models
        lengths = [whole(entry.get("max_model_len")) for entry in ours]
        known = [length for length in lengths if length is not None]
        return max(known) if known and len(known) == len(lengths) else None

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        """Add nothing: a field that an unknown engine may refuse is not sent to it."""
        return {}

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        """Stream a raw chat completion."""
        whole = False
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(self._conversation("chat/completions"))
            response = await self._stream(stack, http, body)
            self._heed_status("POST chat/completions", response)
            async for line in response.aiter_lines():
                whole = whole or chat.is_done(line.encode())
                if (parsed := self._event(line)) is not None:
                    yield chunk_of(parsed)
        if not whole:
            raise BackendUnavailable(f"{self._where}: the stream stopped before its end")

    async def _stream(
        self, stack: AsyncExitStack, http: httpx.AsyncClient, body: Mapping[str, Any]
    ) -> httpx.Response:
        """Ask for a stream, without its token counts if the engine refuses to be asked for them."""
        wanted = {**body, "stream": True}
        counted = {**wanted, STREAM_OPTIONS: {"include_usage": True}} if self._counts_streams else wanted
        try:
            response = await self._opened(stack, http, counted)
        except Upgrade as error:
            raise BackendUnavailable(f"{self._where} redirects to https, and is asked there from now on") from error
        if response.status_code in REFUSALS and counted is not wanted:
            without = await self._opened(stack, http, wanted)
            self._counts_streams = without.is_error
            response = response if without.is_error else without
        return response

    async def _opened(
        self, stack: AsyncExitStack, http: httpx.AsyncClient, body: Mapping[str, Any]
    ) -> httpx.Response:
        response = await stack.enter_async_context(http.stream("POST", "chat/completions", json=body, timeout=None))
        if response.is_error:
            await response.aread()
        return response

    async def aclose(self) -> None:
        """Close nothing: connections end with each conversation."""

    # Warmable, for any engine

    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        """Prefill a prompt by asking for as little as the engine allows."""
        usage = Usage()
        asked = {key: value for key, value in body.items() if key not in ("max_completion_tokens", "response_format")}
        try:
            async with contextlib.aclosing(self.generate({**asked, **self.prefill_only})) as chunks:
                async for chunk in chunks:
                    usage = chunk.usage or usage
        except (BackendUnavailable, EngineRefused):
            return Warmed(Effect.FAILED)
        return Warmed(Effect.WARMED, usage)

    # For adapters

    @property
    def root(self) -> str:
        """The server's own API, which lies beside ``/v1``; ends with a slash."""
        parts = urlsplit(self.backend.url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/v1") + "/", "", ""))

    def key_for(self, path: str) -> str | None:
        """Return the key that the engine wants for *path*: the backend's ``api_key``, whatever the path."""
        return self.backend.api_key

    async def get(self, path: str) -> dict[str, Any]:
        """GET an object; *path* is relative to the backend's URL, or absolute.

        Raises:
            BackendUnavailable: The engine does not answer, or answers something else.
        """
        try:
            return _object(await self.ask("GET", path), self._where, path)
        except EngineRefused as error:
            raise BackendUnavailable(str(error)) from error

    async def post(
        self, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> dict[str, Any]:
        """POST, and return the object that is answered.

        Raises:
            BackendUnavailable: The engine does not answer, or answers something else.
            EngineRefused: It answered with an error status.
        """
        return _object(await self.ask("POST", path, body, timeout_s=timeout_s), self._where, path)

    async def peek(self, path: str, *, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
        """GET an object that may not be there; empty if the engine says no in any way."""
        try:
            return _object(await self.ask("GET", path, timeout_s=timeout_s), self._where, path)
        except (EngineRefused, BackendUnavailable):
            return {}

    def tokens_in(self, answer: Mapping[str, Any]) -> list[int]:
        """Return the tokens in an engine's answer to ``tokenize``.

        Raises:
            BackendUnavailable: There are none.
        """
        tokens = answer.get("tokens")
        counted = [reading.count(token) for token in tokens] if isinstance(tokens, list) else [None]
        known = [token for token in counted if token is not None]
        if len(known) < len(counted):
            raise BackendUnavailable(f"{self._where}: tokenize answered no tokens, but {sorted(answer)}"[:500])
        return known

    async def takes(self, path: str, body: Mapping[str, Any] | None = None) -> bool:
        """POST what does no harm, and return whether the engine took it."""
        try:
            await self.ask("POST", path, body)
        except (EngineRefused, BackendUnavailable):
            return False
        return True

    async def seen(self, path: str) -> httpx.Response | None:
        """GET what may not be there; ``None`` if the engine says no in any way."""
        try:
            return await self.ask("GET", path)
        except (EngineRefused, BackendUnavailable):
            return None

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send one short request; the whole of its answer takes *timeout_s* seconds and ``MAX_BYTES`` at most.

        *headers* are sent beside the adapter's own.

        Raises:
            BackendUnavailable: The engine does not answer, or with too much.
            EngineRefused: It answered with an error status.
        """
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    answer = await self._asked(method, path, body, timeout_s, headers)
                except Upgrade:  # known from now on
                    answer = await self._asked(method, path, body, timeout_s, headers)
        except TimeoutError as error:
            raise BackendUnavailable(f"{self._where}: {path} was not answered within {timeout_s:g} s") from error
        except OutOfBounds as error:
            raise BackendUnavailable(f"{self._where}: {path}: {error}") from error
        self._heed_status(f"{method} {path}", answer)
        return answer

    async def _asked(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        timeout_s: float,
        headers: Mapping[str, str] | None,
    ) -> Answer:
        async with self._conversation(path) as http:
            return await _read(http, method, path, body, timeout_s, headers)

    async def effect_of(
        self, effect: Effect, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> Effect:
        """POST an order and return *effect*, or what became of it: ``UNSUPPORTED`` or ``FAILED``."""
        return (await self.order(effect, path, body, timeout_s=timeout_s))[0]

    async def order(
        self, effect: Effect, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> tuple[Effect, httpx.Response | None]:
        """Return what ``effect_of`` does, and what the engine said where it took the order."""
        try:
            return effect, await self.ask("POST", path, body, timeout_s=timeout_s)
        except EngineRefused as error:
            return Effect.UNSUPPORTED if error.status in (404, 405, 501) else Effect.FAILED, None
        except BackendUnavailable:
            return Effect.FAILED, None

    # Inside

    @property
    def _where(self) -> str:
        return f"backend {self.backend.name!r} at {self.backend.url}"

    @asynccontextmanager
    async def _conversation(self, path: str) -> AsyncIterator[httpx.AsyncClient]:
        key = self.key_for(path)
        # What is read within bounds comes as it is.
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            async with httpx.AsyncClient(
                base_url=self.backend.url,
                headers=headers,
                timeout=TIMEOUT_S,
                verify=certificates() if self._home.verified else False,
                follow_redirects=True,
                event_hooks={"request": [self._home.aheed_request]},
            ) as http:
                yield http
        except httpx.HTTPError as error:
            said = f"{type(error).__name__} {error}".strip()
            raise BackendUnavailable(f"{self._where} does not answer {path}: {said}") from error

    def _heed_status(self, what: str, response: httpx.Response) -> None:
        if response.is_error:
            said = " ".join(response.text.split())[:300]
            status = response.status_code
            raise EngineRefused(f"{self._where}: {what} answered {status}: {said}", status=status)

    def _event(self, line: str) -> dict[str, Any] | None:
        if line and not line.startswith(("data:", "event:", "id:", "retry:", ":")):
            raise BackendUnavailable(f"{self._where}: expected server-sent events, got {line[:80]!r}")
        try:
            parsed = reading.payload(line.encode())
        except reading.Garbage as error:
            raise BackendUnavailable(f"{self._where}: an event is {error}") from error
        if parsed is not None and parsed.get("error"):
            said = parsed["error"]
            status = said.get("code") if isinstance(said, Mapping) else None
            raise EngineRefused(f"{self._where}: {said}", status=status if isinstance(status, int) else 500)
        return parsed


def chunk_of(parsed: Mapping[str, Any]) -> Chunk:
    """Return the ``Chunk`` of one parsed event."""
    choices, counts = parsed.get("choices"), parsed.get("usage")
    first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    delta, reason = first.get("delta"), first.get("finish_reason")
    text = delta.get("content") if isinstance(delta, Mapping) else None
    return Chunk(
        text=text if isinstance(text, str) else "",
        usage=chat.usage_of(counts, parsed.get("timings")) if isinstance(counts, Mapping) and counts else None,
        finish_reason=reason if isinstance(reason, str) else None,
    )


def advised(probe: Probe, **more: Any) -> Probe:
    """Return *probe* with other fields, and no advice for what already works."""
    new = replace(probe, **more)
    missing = {name: text for name, text in new.advice.items() if not new.can(name)}
    return replace(new, advice=missing)


def _object(response: httpx.Response, where: str, path: str) -> dict[str, Any]:
    try:
        parsed = parse_json(response.content)
    except ValueError as error:
        raise BackendUnavailable(f"{where}: {path} answered no JSON; is this an OpenAI-style URL?") from error
    if not isinstance(parsed, dict):
        raise BackendUnavailable(f"{where}: {path} answered {type(parsed).__name__}, expected an object")
    return parsed


async def _read(
    http: httpx.AsyncClient, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float,
    headers: Mapping[str, str] | None,
) -> Answer:  # fmt: skip
    async with http.stream(method, path, json=body, timeout=timeout_s, headers=headers) as response:
        data = await read_body(response, MAX_BYTES)
    packing = ("content-encoding", "content-length", "transfer-encoding")
    kept = [(name, value) for name, value in response.headers.multi_items() if name not in packing]
    return Answer(response.status_code, headers=kept, content=data, request=response.request)


def _same_models(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the names that mean a model already listed under another: vLLM lists all ``--served-model-name``."""
    first: dict[str, str] = {}
    aliases = {}
    for entry in models:
        root = entry.get("root")
        if not isinstance(root, str) or not root or entry.get("parent") is not None:
            continue
        if (known := first.setdefault(root, entry["id"])) != entry["id"]:
            aliases[entry["id"]] = known
    return aliases
