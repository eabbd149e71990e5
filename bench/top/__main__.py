"""Draws docs/top.svg: ``orla-lg top`` as it sees a real run, here of a support desk on two simulated engines.

``make picture-top`` writes the picture. The run is watched through its control socket, as from another terminal.
"""

from __future__ import annotations

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from bench.lib.command import DOCS, parser
from orla_lg import Backend, Orla
from orla_lg.control.client import Client
from orla_lg.top import view
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.server import SimServer

POLICY = "Answer as our support desk does, politely and in full sentences. " * 24
ROWS = 26
ENGINE = EngineParameters(kv_blocks=480)


class Ticket(TypedDict, total=False):
    text: str
    answers: Annotated[list[str], lambda old, new: old + new]


def support_desk(url: str) -> StateGraph[Ticket, None, Ticket, Ticket]:
    """Classify, look up with a tool, reply; each stage begins with the same policy."""
    llm = ChatOpenAI(base_url=url, model="sim", api_key="none", max_tokens=60)

    def ask(state: Ticket, what: str) -> dict[str, Any]:
        history = f"{state['text']} {what} {' '.join(state.get('answers', []))}"
        return {"answers": [str(llm.invoke([("system", POLICY), ("user", history)]).content)]}

    def look_up(state: Ticket) -> dict[str, Any]:
        time.sleep(0.5)  # the tool
        return {}

    def classify(state: Ticket) -> dict[str, Any]:
        return ask(state, "What is it about?")

    def reply(state: Ticket) -> dict[str, Any]:
        return ask(state, "Write to the customer.")

    return StateGraph(Ticket).add_sequence([classify, look_up, reply]).add_edge(START, "classify")


def run(orla: Orla, url: str, stop: threading.Event) -> None:
    """Send tickets, some of them urgent, until told to stop."""
    app = orla.wrap(support_desk(url).compile())

    def tickets(worker: int) -> None:
        number = worker
        while not stop.is_set():
            hints = {"priority": 8 if number % 4 == 0 else 5}
            config: Any = {"configurable": {"thread_id": f"ticket-{number:03}", "orla": hints}}
            app.invoke({"text": f"Ticket {number}: my lamp does not work any more."}, config)
            number += 24

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(tickets, range(24)))


def main() -> None:
    options = parser("top", __doc__)
    options.add_argument("--out", type=Path, default=DOCS / "top.svg")
    out = options.parse_args().out
    with (
        tempfile.TemporaryDirectory() as folder,
        SimServer(ENGINE, speed=3.0) as light,
        SimServer(ENGINE, speed=2.0) as heavy,
    ):
        backends = [
            Backend("light", light.url, model="sim", engine="sim", max_concurrency=4),
            Backend("heavy", heavy.url, model="sim", engine="sim", max_concurrency=6),
        ]
        orla = Orla(backends, {"classify": "light", "reply": "heavy"}, stage_policy="priority",
                    request_policy="priority", control=Path(folder) / "orla.sock")  # fmt: skip
        stop = threading.Event()
        running = threading.Thread(target=run, args=(orla, heavy.url, stop))
        running.start()
        history, paused = view.History(), False
        with Client(Path(folder) / "orla.sock") as client:
            for state in client.watch(0.5):
                history.add(state)
                light_now, heavy_now = state.backends["light"], state.backends["heavy"]
                if not paused and state.calls > 40:
                    orla.pause("heavy")
                    paused = True
                elif paused and light_now.waiting and 0 < heavy_now.in_flight < 6:
                    break
        view.save_svg(view.frame(state, history, rows=ROWS), out)
        stop.set()
        orla.resume("heavy")
        running.join()
        orla.close()
    print(out)


if __name__ == "__main__":
    main()
