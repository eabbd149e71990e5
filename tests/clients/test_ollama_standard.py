"""LangChain's own tests for ChatOllama: bare and in a node of a wrapped graph, they end alike."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_ollama import ChatOllama
from langchain_tests.integration_tests import ChatModelIntegrationTests

from orla_lg import Orla
from tests.clients.nodes import ainside, inside
from tests.clients.ollama_graphs import OURS, THEIRS, backend, model, served
from tests.wire.ollama_native import Said
from tests.wire.ollama_server import OllamaServer

ENDINGS = (Exception, pytest.skip.Exception, pytest.fail.Exception)
EXPECTED: dict[str, dict[str, Any]] = {
    "magic_function": {"input": 3},
    "unicode_customer": {"customer_name": "你好啊集团こんにちは株式会社", "description": "a customer"},
}
"""Arguments that the tests expect of a model."""


def script(asked: dict[str, Any]) -> Said:
    """Answer by rule, and call the tools of these tests with what they expect."""
    said = model(asked)
    if (asked.get("response_format") or {}).get("type") == "json_object":
        return Said('{"setup": "knock", "punchline": "who"}')
    return Said(said.text, said.thinking, tuple((name, EXPECTED.get(name, given)) for name, given in said.calls))


def asked(server: OllamaServer) -> int:
    paths = ("/api/chat", "/v1/chat/completions")
    return len([seen for seen in server.requests if seen.path in paths and seen.body])


def ending(run: Callable[[], Any]) -> str:
    """Return how a test ends."""
    try:
        run()
    except ENDINGS as end:
        return f"{type(end).__name__}: {end}".splitlines()[0]
    return "passed"


class Standard(ChatModelIntegrationTests):
    """On a scripted Ollama; its features are those that langchain-ollama's own run of these tests names, without
    images, which the tests would load from the network."""

    theirs: OllamaServer
    cores: tuple[tuple[Orla, OllamaServer], ...]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with (
            served(THEIRS, script=script) as theirs,
            served(OURS, script=script) as native,
            served(OURS, script=script, native=False) as chat,
            Orla([backend(native)], mapper={"*": "main"}) as one,
            Orla([backend(chat)], mapper={"*": "main"}) as other,
        ):
            cls.theirs, cls.cores = theirs, ((one, native), (other, chat))
            yield

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOllama

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": THEIRS, "base_url": self.theirs.root}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def has_tool_choice(self) -> bool:
        return False


def ends_alike(test: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test that runs *test* bare, then in a node, for each engine."""

    @functools.wraps(test)
    def run(self: Standard, *args: Any, **kwargs: Any) -> None:
        is_async = inspect.iscoroutinefunction(test)

        def once() -> Any:
            return test(self, *args, **kwargs)

        for server in (self.theirs, *(server for _, server in self.cores)):
            server.requests.clear()
        bare = ending((lambda: asyncio.run(once())) if is_async else once)
        calls = asked(self.theirs)
        self.theirs.requests.clear()
        for orla, server in self.cores:
            assert ending(functools.partial(ainside if is_async else inside, orla, once)) == bare
            assert not self.theirs.requests, "nothing went where the code says"
            assert asked(server) == calls
        if bare.startswith("Skipped"):
            pytest.skip("it does bare")
        assert bare == "passed", "the stand-in answers what LangChain expects"

    # A coroutine function would be awaited by pytest.
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


TESTS = {name: test for name, test in vars(ChatModelIntegrationTests).items() if name.startswith("test_")}
TestStandard = type(
    "TestStandard",
    (Standard,),
    {
        **{name: ends_alike(test) for name, test in TESTS.items()},
        "__module__": __name__,
        "test_no_overrides_DO_NOT_OVERRIDE": None,
        "test_stream_time": None,
    },
)
