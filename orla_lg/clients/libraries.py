"""Responses and errors of the HTTP library that a caller's client knows: httpx, or httpx2."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import httpx
import httpx2


class Turning(Protocol):
    """Turns an engine's stream into the caller's."""

    def feed(self, data: bytes) -> bytes:
        """Return what *data* brings for the caller."""
        ...

    def end(self) -> bytes:
        """Return what closes the caller's stream."""
        ...


class _Passing:
    """An engine's bytes on their way to the caller, in the caller's HTTP library.

    Args:
        response: The engine's, primed.
        request: The caller's.
        turning: What becomes of the bytes; ``None`` leaves them.
    """

    library: Library

    def __init__(self, response: httpx2.Response, request: Any, turning: Turning | None) -> None:
        self._response = response
        self._request = request
        self._turning = turning

    @property
    def elapsed(self) -> timedelta | None:
        """How long the response took, for ``Response.elapsed``."""
        return getattr(self._response.stream, "elapsed", None)


class _Sync(_Passing):
    def __iter__(self) -> Iterator[bytes]:
        turning = self._turning
        try:
            for data in self._response.stream:  # type: ignore[union-attr]
                if turning is None:
                    yield data
                elif turned := turning.feed(data):
                    yield turned
            if turning is not None and (last := turning.end()):
                yield last
        except httpx2.HTTPError as error:
            raise self.library.error(error, self._request) from error

    def close(self) -> None:
        self._response.close()


class _Async(_Passing):
    async def __aiter__(self) -> AsyncIterator[bytes]:
        turning = self._turning
        try:
            async for data in self._response.stream:  # type: ignore[union-attr]
                if turning is None:
                    yield data
                elif turned := turning.feed(data):
                    yield turned
            if turning is not None and (last := turning.end()):
                yield last
        except httpx2.HTTPError as error:
            raise self.library.error(error, self._request) from error

    async def aclose(self) -> None:
        await self._response.aclose()


@dataclass(frozen=True)
class Answered:
    """What an engine answered, as it is to be built anew for the caller."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    elapsed: timedelta
    extensions: Mapping[str, Any]
    """Of httpx: the version of HTTP, and what stands beside the status."""


class Library:
    """One HTTP library.

    Args:
        module: ``httpx`` or ``httpx2``, which differ in nothing that matters here.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.sync: type[_Sync] = type("Passing", (_Sync, module.SyncByteStream), {"library": self})
        self.asynchronous: type[_Async] = type("AsyncPassing", (_Async, module.AsyncByteStream), {"library": self})

    def whole(self, answered: Answered, content: bytes, request: Any, encoding: Any, *, unread: bool) -> Any:
        """Return a response with all its bytes; *unread* where the caller reads it itself."""
        said = {"stream": self.module.ByteStream(content)} if unread else {"content": content}
        return self._response(answered, request, encoding, said)

    def streamed(self, answered: Answered, stream: _Passing, request: Any, encoding: Any) -> Any:
        """Return a response whose bytes are still coming."""
        return self._response(answered, request, encoding, {"stream": stream})

    def _response(self, answered: Answered, request: Any, encoding: Any, said: dict[str, Any]) -> Any:
        response = self.module.Response(
            answered.status, headers=answered.headers, request=request, default_encoding=encoding,
            extensions=answered.extensions, **said,
        )  # fmt: skip
        response.elapsed = answered.elapsed
        return response

    def error(self, error: Exception, request: Any) -> Exception:
        """Return the library's own of an error of httpx2, without the engine's request."""
        kind = getattr(self.module, type(error).__name__, self.module.RequestError)
        return self.failed(kind.__name__, f"{error}", request)

    def failed(self, kind: str, message: str, request: Any) -> Exception:
        """Return an error of the library, by the name of its class."""
        made: Exception = getattr(self.module, kind)(message, request=request)
        return made


HTTPX, HTTPX2 = Library(httpx), Library(httpx2)
