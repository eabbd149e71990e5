"""What a streamed chunk costs more through orla_lg than through plain ``ChatOpenAI.astream``, in CPU time.

    make bench-streaming                     about two minutes; run it alone
    python -m bench.streaming --rounds 20 --chunks 800
    python -m bench.streaming --assembled    answers that are only invoked, streamed beneath and watched

The stub engine is a process of its own and sends one chunk at a time, a millisecond apart, as an engine does.
Per round, each arm reads the same stream once, in changing order; the figure is the client process's CPU time
(all threads) divided by the chunks. Memory is what Python holds per stream while many are open and nobody
reads on.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, aclosing
from statistics import median, quantiles
from typing import Any, TypedDict

from langgraph.graph import START, StateGraph

from bench.lib.command import parser, tell
from bench.lib.figures import ratios, rotated, spread, table
from bench.lib.flags import amount, count
from bench.lib.stub import Way, ways
from bench.streaming.assembled import measure as measure_assembled

GOAL = 0.05
PROMPT = [("system", "You answer at length."), ("user", "Tell me about Paris.")]
NAMES = {"bare": "plain `ChatOpenAI`", "wrapped": "intercepted `ChatOpenAI`", "ChatOrla": "`ChatOrla`"}


class State(TypedDict):
    streams: int
    """0 reads one stream to its end; more opens so many and reads none on."""
    figure: float


class Arm:
    """A graph whose one node streams; the figure comes back in its state."""

    def __init__(self, way: Way) -> None:
        self.name, self.model = NAMES[way.name], way.model
        self.graph = way.wrap(StateGraph(State).add_node("node", self.node).add_edge(START, "node").compile())
        self.chunk_us, self.stream_kib = list[float](), list[float]()

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


async def measure(arms: Sequence[Arm], rounds: int, streams: int) -> None:
    for arm in arms:  # warm: connections, code, caches
        await arm.run()
    for number in range(rounds):
        for arm in rotated(arms, number):
            gc.collect()
            arm.chunk_us.append(await arm.run())
        tell(f"round {number + 1}/{rounds}", last=number == rounds - 1)
    tracemalloc.start()
    for _ in range(3):
        for arm in arms:
            arm.stream_kib.append(await arm.run(streams))
    tracemalloc.stop()


def added(arm: Arm, plain: Arm) -> list[float]:
    """Return what *arm* adds, round by round, as a part of plain."""
    return [ratio - 1 for ratio in ratios(arm.chunk_us, plain.chunk_us)]


def row(arm: Arm, plain: Arm) -> list[str]:
    more, took = added(arm, plain), spread(arm.chunk_us)
    low, _, high = quantiles(more, n=4) if len(more) > 1 else (more * 3)
    shown = "" if arm is plain else f"**{median(more):+.1%}** ({low:+.1%} … {high:+.1%})"
    cpu = f"{took.middle:.1f} ({took.least:.0f} … {took.most:.0f})"
    return [arm.name, cpu, shown, f"{median(arm.stream_kib):.1f}"]


async def main() -> int:
    options = parser("streaming", __doc__)
    options.add_argument("--rounds", type=count, default=30)
    options.add_argument("--chunks", type=count, default=500, help="chunks in a stream (default 500)")
    options.add_argument("--token-s", type=amount, default=0.001, help="seconds between chunks (default 0.001)")
    options.add_argument("--streams", type=count, default=100, help="open at once to see their memory (default 100)")
    options.add_argument("--assembled", action="store_true", help="measure answers that are only invoked instead")
    args = options.parse_args()
    if args.assembled:
        print("\n".join(await asyncio.to_thread(measure_assembled, args.rounds, 200, args.token_s)))
        return 0
    text = " ".join(f"word{n}" for n in range(args.chunks))
    with ways("--text", text, "--token-s", str(args.token_s), max_concurrency=None) as found:
        arms = [Arm(way) for way in found]
        await measure(arms, args.rounds, args.streams)
    head = ("through", "CPU per chunk, µs (min … max)", "added, median (quartiles)", "KiB per open stream")
    print("\n".join(table(head, [row(arm, arms[0]) for arm in arms])))
    missed = [arm.name for arm in arms[1:] if median(added(arm, arms[0])) > GOAL]
    print(f"goal, at most {GOAL:+.0%} CPU per chunk: {'missed by ' + ', '.join(missed) if missed else 'met'}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
