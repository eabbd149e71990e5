"""A replica: wrapped graphs that call through ``Orla.remote``, long calls to one engine and short ones to another.

Each call is a line of JSON when it begins and when it ended. Half of the callers are threads, half are tasks of a
loop. Its standard input has lines of JSON: ``{"long_s": 8, "short_s": 0.2}`` is what the next calls take,
``{"late_s": 3}`` keeps it from any core for so long, ``{"only": PORT}`` from all but one, and ``{"drops": true}``
ends its connection. It ends with its input.
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
from collections.abc import Mapping
from importlib import import_module
from itertools import count
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from orla_lg import Orla
from orla_lg.link import dialing
from orla_lg.link import serving as linked
from tests.scripted_engine import MODEL

LOCK = threading.Lock()
SHARED = "You are one of many replicas, and answer in a word. " * 20
STAGES = ("long", "short")


class State(TypedDict, total=False):
    answer: str


def tell(**said: Any) -> None:
    with LOCK:
        print(json.dumps({**said, "s": time.monotonic()}), flush=True)


class Network:
    """What this process reaches of its cores."""

    def __init__(self) -> None:
        self.late_until_s, self.only, self._dial = 0.0, 0, dialing.dial
        for name in ("greeting", "racing"):
            try:
                module = import_module(f"orla_lg.link.{name}")
            except ImportError:
                continue
            if hasattr(module, "dial"):
                setattr(module, "dial", self.dial)  # noqa: B010 - a module's function is no attribute to mypy

    def dial(self, address: dialing.ServerAddress, key: str | None, version: str) -> dialing.Dialed:
        """Connect, unless this process is late."""
        if time.monotonic() < self.late_until_s or (self.only and address.port != self.only):
            raise ConnectionRefusedError("the network is shut for this replica")
        return self._dial(address, key, version)


class Replica:
    """Callers that never stop asking."""

    def __init__(self, orla: Orla, network: Network, chosen: argparse.Namespace) -> None:
        self._orla, self._network, self._chosen = orla, network, chosen
        self._numbers, self._over = count(), threading.Event()
        self._model = ChatOpenAI(model=MODEL, base_url=chosen.engine, api_key="any", max_retries=0, timeout=120)
        self._takes_s: Mapping[str, float] = {"long": chosen.long_s, "short": chosen.short_s}
        self._by_thread = {stage: orla.wrap(self._graph(stage, self._caller(stage))) for stage in STAGES}
        self._by_task = {stage: orla.wrap(self._graph(stage, self._acaller(stage))) for stage in STAGES}

    def _graph(self, stage: str, node: Any) -> Any:
        return StateGraph(State).add_node(stage, node).add_edge(START, stage).compile()

    def _prompt(self, stage: str) -> tuple[str, list[tuple[str, str]]]:
        call, takes_s = f"{self._chosen.name}.{next(self._numbers)}", self._takes_s[stage]
        tell(begun=call, stage=stage, takes_s=takes_s)
        return call, [("system", SHARED), ("user", f"call-{call}-of-{takes_s}- go on")]

    def _caller(self, stage: str) -> Any:
        def call(state: State) -> State:
            name, prompt = self._prompt(stage)
            try:
                answer = self._model.invoke(prompt)
            except Exception as error:  # whatever it is, it is counted
                tell(ended=name, error=f"{type(error).__name__}: {error}")
                time.sleep(0.2)
                return {"answer": "none"}
            tell(ended=name)
            return {"answer": str(answer.content)}

        return call

    def _acaller(self, stage: str) -> Any:
        async def call(state: State) -> State:
            name, prompt = self._prompt(stage)
            try:
                answer = await self._model.ainvoke(prompt)
            except Exception as error:
                tell(ended=name, error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.2)
                return {"answer": "none"}
            tell(ended=name)
            return {"answer": str(answer.content)}

        return call

    def _ask_by_thread(self, stage: str) -> None:
        while not self._over.is_set():
            self._by_thread[stage].invoke({"answer": ""})

    async def _ask_by_tasks(self, stages: list[str]) -> None:
        async def ask(stage: str) -> None:
            while not self._over.is_set():
                await self._by_task[stage].ainvoke({"answer": ""})

        async with asyncio.TaskGroup() as group:
            for stage in stages:
                group.create_task(ask(stage))

    def run(self) -> None:
        """Ask until standard input ends."""
        stages = ["long"] * self._chosen.long + ["short"] * self._chosen.short
        threads = [threading.Thread(target=self._ask_by_thread, args=(stage,)) for stage in stages[::2]]
        threads.append(threading.Thread(target=lambda: asyncio.run(self._ask_by_tasks(stages[1::2]))))
        for thread in threads:
            thread.start()
        for line in sys.stdin:
            self._heed(json.loads(line))
        self._over.set()
        for thread in threads:
            thread.join()

    def _heed(self, said: Mapping[str, Any]) -> None:
        self._takes_s = {stage: said.get(f"{stage}_s", takes_s) for stage, takes_s in self._takes_s.items()}
        self._network.only = said.get("only", self._network.only)
        if "late_s" in said:
            self._network.late_until_s = time.monotonic() + said["late_s"]
        if said.get("drops"):
            serving: Any = self._orla.core.serving
            serving.link.drop("the network")


def believes_any_epoch() -> None:
    """Let this replica forget which epoch it met: the control."""
    hello = linked.hello
    setattr(linked, "hello", lambda link, version: hello(link, version)._replace(epoch=0))  # noqa: B010


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("server")
    add("engine", help="where the model's client points; calls go where the core sends them")
    add("--name", required=True)
    add("--long", type=int, default=4, help="callers of long calls")
    add("--short", type=int, default=1)
    add("--long-s", type=float, default=2.0)
    add("--short-s", type=float, default=0.3)
    add("--only", type=int, default=0)
    add("--any-epoch", action="store_true")
    chosen = parser.parse_args()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    network = Network()
    network.only = chosen.only
    if chosen.any_epoch:
        believes_any_epoch()
    with Orla.remote(chosen.server) as orla:
        tell(ready=chosen.name)
        Replica(orla, network, chosen).run()
    tell(over=chosen.name)


if __name__ == "__main__":
    main()
