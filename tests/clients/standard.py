"""LangChain's own tests for a chat model, run so that they end bare as in the node of a wrapped graph."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from langchain_tests.integration_tests import ChatModelIntegrationTests

from orla_lg import Orla
from tests.clients.nodes import ainside, inside

ENDINGS = (Exception, pytest.skip.Exception, pytest.fail.Exception)
CUSTOMER = {"customer_name": "你好啊集団こんにちは株式会社", "description": "a customer"}
"""What a test of texts beyond ASCII expects in a tool call."""
PIXEL = b"\x89PNG\r\n\x1a\n"
TESTS = {name: test for name, test in vars(ChatModelIntegrationTests).items() if name.startswith("test_")}


class Alike(ChatModelIntegrationTests):
    """LangChain's tests of one chat model; a subclass serves its engines."""

    theirs: Any
    """The server at the URL in the code."""
    cores: tuple[tuple[Orla, Any], ...]
    """Each with the server of its backend."""

    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Some of these tests fetch an image."""
        monkeypatch.setattr(httpx, "get", lambda url, **how: httpx.Response(200, content=PIXEL))

    @staticmethod
    def asked(server: Any) -> int:
        """Return how many requests of models *server* got since it was last cleared."""
        raise NotImplementedError


def both_ways(standard: type[Alike]) -> type[Alike]:
    """Return the class that pytest runs: *standard*, each of whose tests runs bare and then in nodes."""
    alike: dict[str, Any] = {name: _ends_alike(test) for name, test in TESTS.items()}
    left_out = {"test_no_overrides_DO_NOT_OVERRIDE": None, "test_stream_time": None}
    return type("TestStandard", (standard,), {**alike, "__module__": standard.__module__, **left_out})


def _ends_alike(test: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test that runs *test* bare, then in a node, for each engine."""

    @functools.wraps(test)
    def run(self: Alike, *args: Any, **kwargs: Any) -> None:
        is_async = inspect.iscoroutinefunction(test)

        def once() -> Any:
            return test(self, *args, **kwargs)

        for server in (self.theirs, *(server for _, server in self.cores)):
            server.requests.clear()
        bare = _ending((lambda: asyncio.run(once())) if is_async else once)
        asked = self.asked(self.theirs)
        self.theirs.requests.clear()
        for orla, server in self.cores:
            assert _ending(functools.partial(ainside if is_async else inside, orla, once)) == bare
            assert not self.theirs.requests, "nothing went where the code says"
            assert self.asked(server) == asked
        if bare.startswith("Skipped"):
            pytest.skip("it does bare")
        assert bare == "passed", "the stand-in answers what LangChain expects"

    # A coroutine function would be awaited by pytest.
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


def _ending(run: Callable[[], Any]) -> str:
    """Return how a test ends."""
    try:
        run()
    except ENDINGS as end:
        return f"{type(end).__name__}: {end}".splitlines()[0]
    return "passed"
