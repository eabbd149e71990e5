"""What a streamed chunk costs more through orla_lg than through plain ``ChatOpenAI.astream``, in CPU time.

    make bench-streaming                     about two minutes; run it alone
    python -m bench.streaming --rounds 20 --chunks 800

The stub engine is a process of its own and sends one chunk at a time, a millisecond apart, as an engine does.
Per round, each arm reads the same stream once, in changing order; the figure is the client process's CPU time
(all threads) divided by the chunks. Memory is what Python holds per stream while many are open and nobody
reads on.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from bench.lib.command import parser
from bench.lib.engines import stub
from bench.lib.figures import ratios, rotated, table
from bench.lib.flags import amount, count
from bench.lib.progress import tell
from orla_lg import Backend, ChatOrla, Orla

GOAL = 0.05
PROMPT = [("system", "You answer at length."), ("user", "Tell me about Paris.")]


class State(TypedDict):
    streams: int
    """0 reads one stream to its end; more opens so many and reads none on."""
    figure: float


@dataclass
class Arm:
    """A graph whose one node streams; the figure comes back in its state."""

    name: str
    model: Any
    wrap: Callable[[Any], Any]
    graph: Any = None
    chunk_us: list[float] = field(default_factory=list)
    stream_kib: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        graph = StateGraph(State).add_node("node", self.node).add_edge(START, "node")
        self.graph = self.wrap(graph.compile())

    async def node(self, state: State) -> dict[str, float]:
        return {"figure": await (self.hold(state["streams"]) if state["streams"] else self.read())}

    async def read(self) -> float:
        """Return the CPU time of a chunk, in microseconds."""
        chunks, start = 0, time.process_time()
        async for _ in self.model.astream(PROMPT):
            chunks += 1
        return (time.process_time() - start) / chunks * 1e6

    async def hold(self, streams: int) -> float:
        """Return what Python holds per open stream, in KiB."""
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        async with AsyncExitStack() as stack:
            for _ in range(streams):
                pieces: AsyncIterator[Any] = await stack.enter_async_context(aclosing(self.model.astream(PROMPT)))
                await anext(pieces)
            gc.collect()
            return (tracemalloc.get_traced_memory()[0] - before) / streams / 1024

    async def run(self, streams: int = 0) -> float:
        return (await self.graph.ainvoke({"streams": streams, "figure": 0.0}))["figure"]


async def measure(arms: list[Arm], rounds: int) -> None:
    for arm in arms:  # warm: connections, code, caches
        await arm.run()
    for number in range(rounds):
        for arm in rotated(arms, number):
            gc.collect()
            arm.chunk_us.append(await arm.run())
        tell(f"round {number + 1}/{rounds}", last=number == rounds - 1)


async def weigh(arms: list[Arm], streams: int) -> None:
    tracemalloc.start()
    for _ in range(3):
        for arm in arms:
            arm.stream_kib.append(await arm.run(streams))
    tracemalloc.stop()


def added(arm: Arm, plain: Arm) -> list[float]:
    """Return what *arm* adds, round by round, as a part of plain."""
    return [ratio - 1 for ratio in ratios(arm.chunk_us, plain.chunk_us)]


def report(arms: list[Arm]) -> str:
    plain = arms[0]
    head = ("through", "CPU per chunk, µs (min … max)", "added, median (quartiles)", "KiB per open stream")
    rows = []
    for arm in arms:
        low, _, high = statistics.quantiles(added(arm, plain), n=4)
        more = f"**{statistics.median(added(arm, plain)):+.1%}** ({low:+.1%} … {high:+.1%})"
        took = f"{statistics.median(arm.chunk_us):.1f} ({min(arm.chunk_us):.0f} … {max(arm.chunk_us):.0f})"
        rows.append([arm.name, took, "" if arm is plain else more, f"{statistics.median(arm.stream_kib):.1f}"])
    return "\n".join(table(head, rows))


async def main() -> int:
    options = parser("streaming", __doc__)
    options.add_argument("--rounds", type=count, default=30)
    options.add_argument("--chunks", type=count, default=500, help="chunks in a stream (default 500)")
    options.add_argument("--token-s", type=amount, default=0.001, help="seconds between chunks (default 0.001)")
    options.add_argument("--streams", type=count, default=100, help="open at once to see their memory (default 100)")
    args = options.parse_args()
    backend: dict[str, Any] = {"model": "stub-model", "max_concurrency": None}
    text = " ".join(f"word{n}" for n in range(args.chunks))
    with (
        stub("--text", text, "--token-s", str(args.token_s)) as url,
        Orla([Backend("main", url, **backend)], {"*": "main"}) as orla,
    ):
        plain = {"model": "stub-model", "base_url": url, "api_key": "any"}
        arms = [
            Arm("plain `ChatOpenAI`", ChatOpenAI(**plain), lambda graph: graph),
            Arm("intercepted `ChatOpenAI`", ChatOpenAI(**plain), orla.wrap),
            Arm("`ChatOrla`", ChatOrla(orla=orla, model="main"), lambda graph: graph),
        ]
        await measure(arms, args.rounds)
        await weigh(arms, args.streams)
    print(report(arms))
    missed = [arm.name for arm in arms[1:] if statistics.median(added(arm, arms[0])) > GOAL]
    print(f"goal, at most {GOAL:+.0%} CPU per chunk: {'missed by ' + ', '.join(missed) if missed else 'met'}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
