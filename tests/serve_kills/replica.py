"""A replica: a process whose wrapped graphs call through ``Orla.remote`` until its standard input ends.

Each call is a line of JSON when it begins and when it ended. Half of its callers are threads, half are tasks of a
loop. Every call has an id, which the scripted engine counts.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import signal
import sys
import threading
import time
from itertools import count
from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Orla
from tests.scripted_engine import MODEL

LOCK = threading.Lock()
SHARED = "You are one of many replicas, and answer in a word. " * 20


def tell(**said: Any) -> None:
    with LOCK:
        print(json.dumps({**said, "s": time.monotonic()}), flush=True)


class Replica:
    """Callers that never stop asking."""

    def __init__(self, orla: Orla, chosen: argparse.Namespace) -> None:
        self._chosen, self._numbers, self._over = chosen, count(), threading.Event()
        self._model = ChatOpenAI(
            model=MODEL, base_url=chosen.engine, api_key="any", max_retries=chosen.retries, timeout=120
        )
        self.threads = orla.wrap(self._graph(self._call))
        self.tasks = orla.wrap(self._graph(self._acall))

    def _graph(self, node: Any) -> Any:
        graph = StateGraph(MessagesState).add_node("draft", node).add_node("review", node)
        return graph.add_edge(START, "draft").add_edge("draft", "review").compile()

    def _prompt(self) -> tuple[str, list[tuple[str, str]]]:
        call = f"{self._chosen.name}.{next(self._numbers)}"
        return call, [("system", SHARED), ("user", f"call-{call}-of-{self._chosen.call_s}- go on")]

    def _call(self, state: MessagesState) -> Any:
        call, prompt = self._prompt()
        tell(begun=call)
        try:
            answer = self._model.invoke(prompt)
        except Exception as error:  # whatever it is, it is counted
            tell(ended=call, error=f"{type(error).__name__}: {error}")
            return {}
        tell(ended=call)
        return {"messages": [answer]}

    async def _acall(self, state: MessagesState) -> Any:
        call, prompt = self._prompt()
        tell(begun=call)
        try:
            answer = await self._model.ainvoke(prompt)
        except Exception as error:
            tell(ended=call, error=f"{type(error).__name__}: {error}")
            return {}
        tell(ended=call)
        return {"messages": [answer]}

    def ask_by_thread(self) -> None:
        while not self._over.is_set():
            self.threads.invoke({"messages": [("user", "begin")]})

    async def ask_by_tasks(self, tasks: int) -> None:
        async def ask() -> None:
            while not self._over.is_set():
                await self.tasks.ainvoke({"messages": [("user", "begin")]})

        async with asyncio.TaskGroup() as group:
            for _ in range(tasks):
                group.create_task(ask())

    def run(self) -> None:
        """Ask until standard input ends; each line of it is what calls take at the engine from then on."""
        tasks = self._chosen.callers // 2
        threads = [threading.Thread(target=self.ask_by_thread) for _ in range(self._chosen.callers - tasks)]
        threads.append(threading.Thread(target=lambda: asyncio.run(self.ask_by_tasks(tasks))))
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            self._chosen.call_s = float(line)
        self._over.set()
        for thread in threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("server")
    add("engine")
    add("--name", required=True)
    add("--callers", type=int, default=6)
    add("--call-s", type=float, default=0.02)
    add("--retries", type=int, default=0)
    chosen = parser.parse_args()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with Orla.remote(chosen.server) as orla:
        tell(ready=chosen.name)
        Replica(orla, chosen).run()
    tell(over=chosen.name)


if __name__ == "__main__":
    main()
