"""Responses that a server packed unasked or labelled wrongly: what is tapped must be plain, and an error readable."""

from __future__ import annotations

import codecs
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import httpx2


def decode(response: httpx2.Response) -> None:
    """Put the bytes as they were before the server compressed them, though it was not asked to, into *response*."""
    if response.headers.get("content-encoding", "identity").strip().lower() in ("", "identity"):
        return
    packed = httpx2.Response(
        response.status_code, headers=response.headers, stream=response.stream, request=response.request
    )
    del response.headers["content-encoding"]
    response.headers.pop("content-length", None)
    response.stream = (
        _Decoded(packed) if isinstance(response.stream, httpx2.SyncByteStream) else _AsyncDecoded(packed)
    )


def heed_charset(response: httpx2.Response) -> None:
    """Let a text be read as UTF-8 whose charset has no lenient decoder: reading it would hide the error."""
    charset = response.charset_encoding
    if charset is None or charset.lower() == "utf-8":
        return
    try:
        codecs.getincrementaldecoder(charset)("replace").decode(b"text", final=True)
    except (LookupError, ValueError):
        response.encoding = "utf-8"


class _Decoded(httpx2.SyncByteStream):
    def __init__(self, packed: httpx2.Response) -> None:
        self._packed = packed

    def __iter__(self) -> Iterator[bytes]:
        return self._packed.iter_bytes()

    def close(self) -> None:
        self._packed.close()


class _AsyncDecoded(httpx2.AsyncByteStream):
    def __init__(self, packed: httpx2.Response) -> None:
        self._packed = packed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with aclosing(self._packed.aiter_bytes()) as passing:
            async for data in passing:
                yield data

    async def aclose(self) -> None:
        await self._packed.aclose()
