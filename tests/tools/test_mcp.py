"""Tools of a real MCP server over stdio: its ``readOnlyHint`` is believed where that is asked for, and only there."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import HumanMessage
from langchain_core.tools import BaseTool, InjectedToolArg, StructuredTool, ToolException

from tests.tools.conftest import Lab, shown
from tests.tools.planned_engine import Answer

mcp = pytest.importorskip("mcp", reason="needs the package mcp")

SERVER = Path(__file__).with_name("mcp_server.py")


def by_hand(session: Any, known: Any) -> BaseTool:
    """Return a server's tool as ``langchain-mcp-adapters`` makes it, whatever version of ``mcp`` is installed."""

    tool_interceptors = None

    async def call(runtime: Annotated[object | None, InjectedToolArg()] = None, **arguments: Any) -> str:
        assert tool_interceptors is None, "these alone would be given the runtime"
        answer = (await session.call_tool(known.name, arguments)).model_dump(by_alias=True)
        said = "".join(part["text"] for part in answer["content"])
        if answer["isError"]:
            raise ToolException(said)
        return said

    call.__module__ = "langchain_mcp_adapters.tools"
    plain = known.model_dump(by_alias=True)
    return StructuredTool(
        name=known.name, description=known.description or "", args_schema=plain["inputSchema"], coroutine=call,
        metadata=plain["annotations"], handle_tool_error=True,
    )  # fmt: skip


async def tools_by_hand(session: Any) -> list[BaseTool]:
    return [by_hand(session, known) for known in (await session.list_tools()).tools]


async def tools_of_the_adapters(session: Any) -> list[BaseTool]:
    from langchain_mcp_adapters.tools import load_mcp_tools  # type: ignore[import-not-found, unused-ignore]

    return list(await load_mcp_tools(session))


HAS_ADAPTERS = importlib.util.find_spec("langchain_mcp_adapters") is not None
LOADERS = [
    pytest.param(tools_by_hand, id="by hand"),
    pytest.param(
        tools_of_the_adapters, id="langchain-mcp-adapters",
        marks=pytest.mark.skipif(not HAS_ADAPTERS, reason="langchain-mcp-adapters is not installed: it needs mcp<2"),
    ),
]  # fmt: skip


@asynccontextmanager
async def connected(called: Path) -> AsyncIterator[Any]:
    """Start the server and talk to it."""
    from mcp.client.stdio import stdio_client

    parameters = mcp.StdioServerParameters(command=sys.executable, args=[str(SERVER), str(called)])
    async with stdio_client(parameters) as (read, write), mcp.ClientSession(read, write) as session:
        await session.initialize()
        yield session


CALLS = (("look", {"x": 1}), ("fail", {"x": 2}), ("send", {"x": 3}), ("look", {"x": 4}))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_servers_hint_is_believed_if_that_is_asked_for(
    lab: Lab, served: Callable[..., Any], tmp_path: Path, loader: Callable[..., Any]
) -> None:
    called = tmp_path / "called"
    lab.plan = [Answer(CALLS)]

    def counts() -> dict[str, int]:
        found = Counter(called.read_text().split())
        called.write_text("")
        return dict(found)

    async def all_of_it() -> None:
        async with connected(called) as session:
            tools: Sequence[BaseTool] = await loader(session)

            async def ask(**how: Any) -> Any:
                graph = create_agent(lab.model(), tools)
                graph = served(graph, backend={"assemble": True}, **how) if how else graph
                state = shown(await graph.ainvoke({"messages": [HumanMessage("Hello")]}))
                return re.sub(
                    r"'id': '[^']*'", "", repr(state)
                )  # the adapters make ids of parts, other ones each time

            without = await ask()
            assert counts() == {"look": 2, "fail": 1, "send": 1}

            assert await ask(tools_safe=()) == without
            assert (counts(), lab.early.started) == ({"look": 2, "fail": 1, "send": 1}, 0), "a hint alone is nothing"

            lab.awaits = 2
            assert await ask(tools_safe={"look"}) == without
            assert (counts(), lab.early.started, lab.early.used) == ({"look": 2, "fail": 1, "send": 1}, 2, 2)

            lab.awaits = 5
            assert await ask(tools_safe_mcp=True) == without
            assert counts() == {"look": 2, "fail": 2, "send": 1}, "an error is met again in its place"
            assert (lab.early.started, lab.early.used, lab.early.failed) == (5, 4, 1)

            for each in tools:  # what a tool declares itself is stronger than its server's hint
                each.metadata = {**(each.metadata or {}), "orla": {"safe": False}}
            assert await ask(tools_safe_mcp=True) == without
            assert (counts(), lab.early.started) == ({"look": 2, "fail": 1, "send": 1}, 5)

    asyncio.run(all_of_it())
