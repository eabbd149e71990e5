"""LangChain's own tests for ChatOpenAI on the Responses API: bare and in a wrapped graph's node, they end alike."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from tests.conftest import BACKEND_KEY, CALLER_KEY
from tests.wire.machine import Machine
from tests.wires.chatting_server import ChattingServer
from tests.wires.responses_server import MODEL, ResponsesServer, Turn, usual_turn

ENDINGS = (Exception, pytest.skip.Exception, pytest.fail.Exception)
CUSTOMER = '{"customer_name": "你好啊集团", "description": "a customer"}'


def script(body: dict[str, Any]) -> Turn:
    """Answer as these tests expect."""
    if any(tool.get("name") == "unicode_customer" for tool in body.get("tools") or ()):
        return Turn(calls=(("unicode_customer", CUSTOMER),))
    return usual_turn(body)


def ending(run: Callable[[], Any]) -> str:
    """Return how a test ends."""
    try:
        run()
    except ENDINGS as end:
        return type(end).__name__
    return "passed"


class Standard(ChatModelIntegrationTests):
    """On a server of the Responses API."""

    theirs: ResponsesServer
    cores: tuple[tuple[Orla, ResponsesServer | ChattingServer], ...]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _serve(cls) -> Iterator[None]:
        def backend(server: Any) -> Backend:
            return Backend("main", server.url, model=MODEL, api_key=BACKEND_KEY)

        with (
            ResponsesServer(script, machine=Machine(token_s=0)) as theirs,
            ResponsesServer(script, machine=Machine(token_s=0)) as native,
            ChattingServer(script, machine=Machine(token_s=0)) as chatting,
            Orla([backend(native)], mapper={"*": "main"}) as one,
            Orla([backend(chatting)], mapper={"*": "main"}) as other,
        ):
            cls.theirs, cls.cores = theirs, ((one, native), (other, chatting))
            yield

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        named = {"model": MODEL, "base_url": self.theirs.url, "api_key": CALLER_KEY}
        return {**named, "max_retries": 0, "use_responses_api": True}

    @property
    def supports_image_inputs(self) -> bool:
        return True

    @property
    def supports_image_tool_message(self) -> bool:
        return True

    @property
    def supports_json_mode(self) -> bool:
        return True


def ends_alike(test: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test that runs *test* bare, then in a node, for each engine."""

    @functools.wraps(test)
    def run(self: Standard, *args: Any, **kwargs: Any) -> None:
        is_async = inspect.iscoroutinefunction(test)

        def once() -> Any:
            return test(self, *args, **kwargs)

        self.theirs.requests = []
        bare = ending((lambda: asyncio.run(once())) if is_async else once)
        asked, self.theirs.requests = len(self.theirs.bodies()), []
        for orla, server in self.cores:
            server.requests = []
            assert ending(lambda orla=orla: in_node(orla, once, is_async=is_async)) == bare
            assert self.theirs.requests == [], "nothing went where the code says"
            assert len(server.bodies()) == asked
        if bare == "Skipped":
            pytest.skip("it does bare")

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
