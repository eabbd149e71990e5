"""A server with work to show: a support desk and a research agent by links, and callers of the gateway.

The engines are stubs that take their time. ``python -m bench.page.scenario`` serves it until Ctrl-C.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from pydantic import SecretStr

from orla_lg import Orla
from orla_lg.demo.graph import chat_model, support_graph
from orla_lg.testing.faults import Reply, Seen
from tests.serve.in_thread import Running, server
from tests.stub_engine import StubEngine

CONFIG = """
policy = "priority"
[backends.light]
url = "{light}"
max_concurrency = 4
[backends.heavy]
url = "{heavy}"
max_concurrency = 6
[mapping]
classify = "light"
plan = "light"
"*" = "heavy"
"""

TICKETS = ("My lamp arrived broken and I want my money back.", "Where is my parcel?", "I cannot log in any more.")


class Work:
    """A running server, and applications that call it until the end."""

    def __init__(self, served: Running, engines: list[StubEngine]) -> None:
        self.served, self.engines = served, engines
        self.ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, *targets: Any) -> None:
        """Run coroutines' functions, each in a thread of its own."""
        for target in targets:
            thread = threading.Thread(target=lambda target=target: asyncio.run(target(self)), daemon=True)
            self._threads.append(thread)
            thread.start()

    def end(self) -> None:
        """Have all end."""
        self.ending.set()
        for thread in self._threads:
            thread.join(30.0)


def timed(seen: Seen) -> Reply:
    """Answer as an engine does: a prefill, then some twenty tokens."""
    return Reply(before_s=random.uniform(0.15, 0.7), token_s=random.uniform(0.02, 0.08))


@contextlib.contextmanager
def working(*, store: Any = None) -> Iterator[Work]:
    """Serve two stubs; ``Work.start`` begins what calls them."""
    with tempfile.TemporaryDirectory() as folder, StubEngine(rule=timed) as light, StubEngine(rule=timed) as heavy:
        file = Path(folder, "orla.toml")
        file.write_text(CONFIG.format(light=light.url, heavy=heavy.url), encoding="utf-8")
        with server(file, store=store) as served:
            until_ready(served.url)
            work = Work(served, [light, heavy])
            try:
                yield work
            finally:
                work.end()


def until_ready(url: str) -> None:
    """Wait until a server takes calls."""
    while not httpx.get(f"{url}/readyz").is_success:
        time.sleep(0.02)


async def desk(work: Work, tickets: int = 6) -> None:
    """The demo's support desk, several tickets at once."""
    url = work.served.url + "/v1"
    with Orla.remote(work.served.url) as orla:
        graph = orla.wrap(
            support_graph(chat_model(url, "light"), chat_model(url, "heavy"), None).compile(name="support desk")
        )

        async def one(number: int) -> None:
            turn = 0
            while not work.ending.is_set():
                turn += 1
                thread = {"configurable": {"thread_id": f"ticket-{number}-{turn}"}}
                with contextlib.suppress(Exception):
                    await graph.ainvoke({"ticket": random.choice(TICKETS)}, thread)
                await asyncio.sleep(random.uniform(0.2, 1.5))

        async with asyncio.TaskGroup() as tasks:
            for number in range(tickets):
                tasks.create_task(one(number))


@tool
async def search(query: str) -> str:
    """Look something up."""
    await asyncio.sleep(random.uniform(0.4, 1.2))
    return f"found: {query}"


async def research(work: Work, agents: int = 4) -> None:
    """An agent that plans, looks things up in turns, and writes."""
    model = ChatOpenAI(base_url=work.served.url + "/v1", model="auto", api_key=SecretStr("none"), max_tokens=60)  # type: ignore[call-arg]

    async def plan(state: MessagesState) -> Any:
        return {"messages": [await model.ainvoke(state["messages"])]}

    async def look_up(state: MessagesState) -> Any:
        async for _ in model.astream(state["messages"]):
            pass
        call = {"name": "search", "args": {"query": "lamps"}, "id": f"call-{random.random()}", "type": "tool_call"}
        return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}

    async def write(state: MessagesState) -> Any:
        async for _ in model.astream([("user", "Write it down.")]):
            pass
        return {"messages": [("assistant", "done")]}

    builder = StateGraph(MessagesState)
    for name, node in (("plan", plan), ("look_up", look_up), ("tools", ToolNode([search])), ("write", write)):
        builder.add_node(name, node)
    builder.add_edge(START, "plan").add_edge("plan", "look_up").add_edge("look_up", "tools")
    builder.add_conditional_edges(
        "tools", lambda state: random.choice(["look_up", "write"]), ["look_up", "write"]
    ).add_edge("write", END)
    with Orla.remote(work.served.url) as orla:
        graph = orla.wrap(builder.compile(name="research"))

        async def one(number: int) -> None:
            turn = 0
            while not work.ending.is_set():
                turn += 1
                config: Any = {"configurable": {"thread_id": f"topic-{number}-{turn}", "orla": {"tenant": "acme"}}}
                with contextlib.suppress(Exception):
                    await graph.ainvoke({"messages": [("user", f"Find out about lamps, {number}")]}, config)
                await asyncio.sleep(random.uniform(0.1, 0.6))

        async with asyncio.TaskGroup() as tasks:
            for number in range(agents):
                tasks.create_task(one(number))


async def callers(work: Work, clients: int = 4) -> None:
    """Programs that know nothing of LangGraph, at the gateway."""
    async with httpx.AsyncClient(timeout=60.0) as http:

        async def one(number: int) -> None:
            while not work.ending.is_set():
                body = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": f"Hello {number}"}]}
                headers = {
                    "x-orla-workflow-run": f"notebook-{number}",
                    "x-orla-stage": random.choice(["chat", "sum"]),
                }
                with contextlib.suppress(httpx.HTTPError):
                    async with http.stream(
                        "POST", work.served.url + "/v1/chat/completions", json=body, headers=headers
                    ) as reply:
                        async for _ in reply.aiter_bytes():
                            pass
                await asyncio.sleep(random.uniform(0.3, 2.0))

        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(one(number))


if __name__ == "__main__":
    with working() as shown:
        shown.start(desk, research, callers)
        print(shown.served.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(1.0)
