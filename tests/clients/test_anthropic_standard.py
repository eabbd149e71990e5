"""LangChain's own tests for ChatAnthropic: bare and in a node of a wrapped graph, they end alike."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from langchain_anthropic import ChatAnthropic, _client_utils
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from tests.conftest import BACKEND_KEY, CALLER_KEY
from tests.wires.messages_server import BOTH, MODEL, Answer, MessagesServer, tool_use

ENDINGS = (Exception, pytest.skip.Exception, pytest.fail.Exception)
CUSTOMER = {"customer_name": "你好啊集団こんにちは株式会社", "description": "a customer"}
PIXEL = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _own_http_clients() -> Iterator[None]:
    """LangChain keeps HTTP clients by URL, beyond their loop."""
    yield
    _client_utils._get_default_httpx_client.cache_clear()
    _client_utils._get_default_async_httpx_client.cache_clear()


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """LangChain's tests fetch an image."""
    monkeypatch.setattr(httpx, "get", lambda url, **how: httpx.Response(200, content=PIXEL))


def script(body: dict[str, Any]) -> Answer | None:
    """Call the tools of these tests with what they expect."""
    tool: dict[str, Any] = next(iter(body.get("tools") or []), {})
    name = (tool.get("function") or tool).get("name")
    if name == "magic_function":
        return Answer((tool_use("magic_function", input=3),))
    if name == "unicode_customer":
        return Answer((tool_use("unicode_customer", **CUSTOMER),))
    return None


def ending(run: Callable[[], Any]) -> str:
    """Return how a test ends."""
    try:
        run()
    except ENDINGS as end:
        return type(end).__name__
    return "passed"


class Standard(ChatModelIntegrationTests):
    """On a server of Messages."""

    theirs: MessagesServer
    cores: tuple[tuple[Orla, MessagesServer], ...]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        with (
            MessagesServer(script) as theirs,
            MessagesServer(script, speaks=BOTH) as native,
            MessagesServer(script, speaks=frozenset({"chat"})) as chat,
            Orla([Backend("main", native.url, model=MODEL, api_key=BACKEND_KEY)], mapper={"*": "main"}) as one,
            Orla([Backend("main", chat.url, model=MODEL, api_key=BACKEND_KEY)], mapper={"*": "main"}) as other,
        ):
            cls.theirs, cls.cores = theirs, ((one, native), (other, chat))
            yield

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatAnthropic

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "base_url": self.theirs.root, "api_key": CALLER_KEY, "max_retries": 0}

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True


def ends_alike(test: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test that runs *test* bare, then in a node, for each engine."""

    @functools.wraps(test)
    def run(self: Standard, *args: Any, **kwargs: Any) -> None:
        is_async = inspect.iscoroutinefunction(test)

        def once() -> Any:
            return test(self, *args, **kwargs)

        for server in (self.theirs, *(server for _, server in self.cores)):
            server.requests = []
        bare = ending((lambda: asyncio.run(once())) if is_async else once)
        asked, self.theirs.requests = len(self.theirs.served), []
        for orla, server in self.cores:
            assert ending(lambda orla=orla: in_node(orla, once, is_async=is_async)) == bare
            assert self.theirs.served == [], "nothing went where the code says"
            assert len(server.served) == asked
        if bare == "Skipped":
            pytest.skip("it does bare")
        assert bare == "passed", "the stand-in answers what LangChain expects"

    # A coroutine function would be awaited by pytest.
    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


def in_node(orla: Orla, test: Callable[[], Any], *, is_async: bool) -> None:
    def node(state: MessagesState) -> None:
        test()

    async def anode(state: MessagesState) -> None:
        await test()

    chosen: Any = anode if is_async else node
    graph = orla.wrap(StateGraph(MessagesState).add_node("node", chosen).add_edge(START, "node").compile())
    if is_async:
        asyncio.run(graph.ainvoke({"messages": []}))
    else:
        graph.invoke({"messages": []})


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
