"""A client that only keeps time: when each token of an answer came, and what the engine counted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from orla_lg.core.call import Usage
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.wires import chat, reading

_TIMEOUT = httpx.Timeout(10.0, read=600.0)


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer; times are ``time.monotonic`` seconds."""

    sent_s: float
    tokens_s: tuple[float, ...]
    """When each piece of the answer came."""
    end_s: float
    usage: Usage

    @property
    def ttft_s(self) -> float:
        """From sending to the first token."""
        return (self.tokens_s[0] if self.tokens_s else self.end_s) - self.sent_s

    @property
    def duration_s(self) -> float:
        """From sending to the end."""
        return self.end_s - self.sent_s


class TimingClient:
    """Streams chat completions from one engine.

    Args:
        url: Its OpenAI-compatible base, with or without ``/v1``.
        model: What to ask for; ``None`` asks for the first that is served.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.root = url.rstrip("/").removesuffix("/v1")
        self.model = model
        # Its own limits would hold back a burst; certificates would be loaded for nothing.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._http = httpx.AsyncClient(
            base_url=self.root, timeout=_TIMEOUT, limits=limits, verify=url.startswith("https")
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def served(self) -> dict[str, Any]:
        """Return the engine's own words about the model, and ask for that model from now on.

        Raises:
            BackendUnavailable: It does not answer, or serves nothing.
        """
        try:
            listed = (await self._http.get("/v1/models")).raise_for_status().json()["data"]
            found = next(entry for entry in listed if self.model in (None, entry["id"]))
        except (httpx.HTTPError, ValueError, KeyError, TypeError, StopIteration) as error:
            raise BackendUnavailable(f"{self.root} does not list the model: {error!r}") from error
        self.model = found["id"]
        return dict(found)

    async def metrics(self) -> str:
        """Return its metrics; empty if it has none."""
        try:
            response = await self._http.get("/metrics")
        except httpx.HTTPError:
            return ""
        return response.text if response.is_success else ""

    async def forget_everything(self) -> bool:
        """Empty the prefix cache where the engine has a way; returns whether it did."""
        for path, body in (("/reset_prefix_cache", None), ("/v1/sim/kv/flush", {"all": True})):
            try:
                if (await self._http.post(path, json=body)).is_success:
                    return True
            except httpx.HTTPError:
                return False
        return False

    async def ask(self, body: Mapping[str, Any], heard: Callable[[int], None] = lambda _: None) -> Timed:
        """Stream one answer.

        Args:
            body: The request; what makes it a stream is added.
            heard: Told how many pieces have come, with each.

        Raises:
            BackendUnavailable: The engine does not answer, or the stream broke.
            EngineRefused: It answered with an error.
        """
        wanted = {"model": self.model, "temperature": 0, **body}
        wanted |= {"stream": True, "stream_options": {"include_usage": True}}
        payload = json.dumps(wanted).encode()
        sent_s = time.monotonic()
        try:
            return await self._stream(payload, sent_s, heard)
        except httpx.HTTPError as error:
            raise BackendUnavailable(f"{self.root} broke off: {type(error).__name__} {error}") from error

    async def _stream(self, payload: bytes, sent_s: float, heard: Callable[[int], None]) -> Timed:
        came, usage = [], None
        headers = {"content-type": "application/json"}
        async with self._http.stream("POST", "/v1/chat/completions", content=payload, headers=headers) as response:
            if response.is_error:
                said = (await response.aread()).decode("utf-8", "replace")[:300]
                raise EngineRefused(
                    f"{self.root} answered {response.status_code}: {said}", status=response.status_code
                )
            splitter = reading.EventSplitter()
            async for data in response.aiter_bytes():
                now_s = time.monotonic()
                for event in splitter.feed(data):
                    if b'"content":"' in event or b'"content": "' in event:
                        came.append(now_s)
                        heard(len(came))
                    elif b'"usage"' in event:
                        usage = chat.usage_in(event) or usage
        return Timed(sent_s, tuple(_without_opening(came)), time.monotonic(), usage or Usage())


def _without_opening(came: list[float]) -> list[float]:
    """Drop the chunk that only says who speaks; it comes with the first token."""
    return came[1:] if len(came) > 1 else came
