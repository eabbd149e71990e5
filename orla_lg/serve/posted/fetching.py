"""Questions to outside services that were posted: one POST or GET, bounded in time and in size, never redirected."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import aiohttp

from orla_lg.core.boundary.bounded import parse_json

MOST_BYTES = 1 << 20
"""Of an answer of a service that orders or prices; a longer one is not read."""


class OutsideFault(Exception):
    """A service did not answer what can be used; ``kind`` says how that is counted."""

    def __init__(self, kind: str, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind, self.status = kind, status


class OutsideClient:
    """Asks outside services. Of one event loop."""

    def __init__(self) -> None:
        self._session: aiohttp.ClientSession | None = None

    async def ask(
        self,
        method: str,
        url: str,
        body: Any = None,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> Any:
        """Return the JSON that a service answers.

        Raises:
            OutsideFault: There is none within *timeout_s*.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._asked(method, url, body, headers or {}, most_bytes)
        except TimeoutError:
            raise OutsideFault("timeout", f"no answer in {timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise OutsideFault("error", f"{type(error).__name__}: {error}") from error

    async def _asked(self, method: str, url: str, body: Any, headers: Mapping[str, str], most_bytes: int) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=None), trust_env=False
            )
        data = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", "Accept-Encoding": "identity", **headers}
        async with self._session.request(method, url, data=data, headers=sent, allow_redirects=False) as response:
            content = bytearray()
            async for part in response.content.iter_any():
                content += part
                if len(content) > most_bytes:
                    raise OutsideFault("error", f"an answer of more than {most_bytes} bytes")
            if not 200 <= response.status < 300:
                said = bytes(content[:200]).decode("utf-8", "replace")
                raise OutsideFault("error", f"status {response.status}: {said}", response.status)
            return parse_json(bytes(content))

    async def close(self) -> None:
        """Close its connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
