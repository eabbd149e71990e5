"""A process to look into: a stub engine that answers nothing until told, and calls of two stages that wait for it.

``python -m tests.waiting_app SOCKET`` prints ``ready`` once the calls wait; ``open`` on its input lets the engine
answer, and it prints how many calls came back.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Happening, Orla
from tests.conftest import at, chat
from tests.stub_engine import Gate, Reply, StubEngine
from tests.test_lifecycle import Watch

CALLS, LIMIT = 6, 2
SECRET = "a prompt that is nobody's business"


def main(socket: str) -> None:
    gate = Gate()
    with StubEngine() as light, StubEngine(slots=2, models=("large",)) as heavy, ThreadPoolExecutor(CALLS) as pool:
        light.rule = lambda seen: Reply(gate=gate)
        backends = [at(light, "light", max_concurrency=LIMIT), at(heavy, "heavy", engine="llamacpp", model="large")]
        with Orla(backends, mapper={"draft": "light", "*": "heavy"}, control=socket) as orla:
            watch, llm = Watch(orla), chat(light)
            node = lambda state: {"messages": [llm.invoke(state["messages"])]}  # noqa: E731
            graph = StateGraph(MessagesState).add_node("note", node).add_node("draft", node)
            app = orla.wrap(graph.add_edge(START, "note").add_edge("note", "draft").compile())
            asked = {"messages": [("user", SECRET)]}
            threads = [{"configurable": {"thread_id": f"t{n}", "orla": {"priority": n}}} for n in range(CALLS)]
            runs = [pool.submit(app.invoke, asked, each) for each in threads]
            watch.wait(Happening.DISPATCHED, CALLS + LIMIT)
            light.wait(lambda engine: engine.in_flight == LIMIT)
            while orla.statistics().backends["light"].queue.waiting < CALLS - LIMIT:
                time.sleep(0.01)
            print("ready", flush=True)
            assert sys.stdin.readline() == "open\n"
            gate.open()
            print(len([run.result() for run in runs]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
