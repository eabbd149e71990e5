"""What a call costs more through orla_lg than through plain ``ChatOpenAI``, on the same stub server.

    make bench-overhead                      all of it, about eight minutes; run it alone
    make bench-overhead BENCH='--quick'      two minutes, without the memory run
    make check-overhead                      CPU time alone, against its goal; fails beyond it
    python -m bench.overhead --help

The arms run in alternating blocks of one run, and each figure is the difference between neighbouring blocks, so a
machine that slows down slows both. Beside wall time stands the CPU time of the caller's process (all its threads,
user and system), which a busy machine disturbs less; its ratio to the bare arm, the median over blocks, is what
``--check`` judges.

With ``--clients`` the same calls by an SDK that is met at its HTTP client: what that adds is set against what the
faster way of OpenAI's own SDK adds.
"""

from __future__ import annotations

import asyncio
import gc
import random
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypedDict

import psutil
from langgraph.graph import START, StateGraph

from bench.lib import plot
from bench.lib.command import DOCS, parser, tell
from bench.lib.figures import Rounds, at_rank, ratios, spread, table
from bench.lib.flags import count
from bench.lib.stub import Way, ways
from bench.overhead import other_sdk

GOAL_MEDIAN_MS, GOAL_P99_MS = 0.3, 2.0
GOAL_CPU_RATIO = {"invoke": 1.10, "ainvoke": 1.10, "astream": 1.10}
"""Of a wrapped call to a bare one, by form, one at a time; about 0.4 ms where a bare call takes 4."""
LEAST_BLOCKS = 9
"""Fewer do not make a median that can be judged."""
ANSWER = " ".join(f"word{n}" for n in range(16))
PROMPT = [("system", "You answer briefly. " * 20), ("user", "What is the capital of France?")]
FORMS = ("invoke", "ainvoke", "astream")
ALONE = "one at a time"


class State(TypedDict):
    form: str
    calls: int
    rate: float | None
    seed: int
    """Blocks with the same seed have the same arrivals, whatever their arm."""
    taken_ms: list[float]


class Block(NamedTuple):
    """What a block's calls took."""

    arm: str
    seed: int
    taken_ms: list[float]
    cpu_ms: float
    """Of the caller's process, per call."""


Found = dict[tuple[str, str], Rounds[Block]]
"""Blocks by form and load."""


class Arm:
    """A graph whose one node makes a block of calls and times each."""

    def __init__(self, way: Way) -> None:
        self.name, self.model, wrap = way

        def graph(node: Any) -> Any:
            return wrap(StateGraph(State).add_node("block", node).add_edge(START, "block").compile())

        self.graph, self.agraph = graph(self.sync_block), graph(self.async_block)

    def sync_block(self, state: State) -> dict[str, Any]:
        taken = []
        for _ in range(state["calls"]):
            start = time.perf_counter()
            self.model.invoke(PROMPT)
            taken.append((time.perf_counter() - start) * 1e3)
        return {"taken_ms": taken}

    async def async_block(self, state: State) -> dict[str, Any]:
        call = self.ainvoke if state["form"] == "ainvoke" else self.astream
        if state["rate"] is None:
            return {"taken_ms": [await timed(call) for _ in range(state["calls"])]}
        return {"taken_ms": await open_loop(call, state["calls"], state["rate"], random.Random(state["seed"]))}

    async def ainvoke(self) -> None:
        await self.model.ainvoke(PROMPT)

    async def astream(self) -> None:
        async for _ in self.model.astream(PROMPT):
            pass

    async def block(self, form: str, calls: int, rate: float | None, number: int) -> Block:
        """Make a block of calls; return what they took."""
        gc.collect()
        before_s = time.process_time()
        taken_ms = await self.run(form, calls, rate, number)
        return Block(self.name, number, taken_ms, (time.process_time() - before_s) * 1e3 / calls)

    async def run(self, form: str, calls: int, rate: float | None, seed: int = 0) -> list[float]:
        given: State = {"form": form, "calls": calls, "rate": rate, "seed": seed, "taken_ms": []}
        if form == "invoke":
            return (await asyncio.to_thread(self.graph.invoke, given))["taken_ms"]
        return (await self.agraph.ainvoke(given))["taken_ms"]


async def timed(call: Callable[[], Awaitable[None]]) -> float:
    start = time.perf_counter()
    await call()
    return (time.perf_counter() - start) * 1e3


async def open_loop(call: Callable[[], Awaitable[None]], calls: int, rate: float, dice: random.Random) -> list[float]:
    """Let calls arrive at *rate* per second, as they would from users who do not know of each other."""
    taken: list[float] = []

    async def arrive() -> None:
        taken.append(await timed(call))

    clock = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(calls):
            clock += dice.expovariate(rate)
            await asyncio.sleep(max(0.0, clock - time.perf_counter()))
            group.create_task(arrive())
    return taken


def loads(quick: bool, alone_only: bool = False) -> list[tuple[str, str, int, float | None]]:
    """Return form, name of the load, calls in a block, rate."""
    calls = 60 if quick else 150
    alone: list[tuple[str, str, int, float | None]] = [(form, ALONE, calls, None) for form in FORMS]
    return alone if alone_only else alone + [(form, "80 calls/s", calls * 2, 80.0) for form in ("ainvoke", "astream")]


async def measure(arms: Sequence[Arm], blocks: int, quick: bool, alone_only: bool = False) -> Found:
    found: Found = {}
    for form, load, calls, rate in loads(quick, alone_only):
        for arm in arms:  # warm: connections, code, caches
            await arm.run(form, 20, rate)
        made = []
        for number in range(blocks):
            for arm in arms if number % 2 == 0 else arms[::-1]:
                made.append(await arm.block(form, calls, rate, number))
            tell(f"{form:8} {load:14} block {number + 1}/{blocks}", last=number == blocks - 1)
        found[form, load] = Rounds(made, [arm.name for arm in arms])
    return found


def cpu_ms(block: Block) -> float:
    return block.cpu_ms


def middle_ms(block: Block) -> float:
    return median(block.taken_ms)


def added(blocks: Rounds[Block], arm: str, figure: Callable[[Block], float]) -> list[float]:
    """Return what an arm adds to the bare arm, block by block."""
    return [a - b for a, b in zip(blocks.column(arm, figure), blocks.column("bare", figure), strict=True)]


def pooled(blocks: Rounds[Block], arm: str) -> list[float]:
    return [each for block in blocks.of(arm) for each in block.taken_ms]


def added_p99_ms(blocks: Rounds[Block], arm: str) -> float:
    return at_rank(pooled(blocks, arm), 0.99) - at_rank(pooled(blocks, "bare"), 0.99)


def others(found: Found) -> Iterator[tuple[str, str, str, Rounds[Block]]]:
    """Yield form, load and name of each arm but the bare one, with its blocks."""
    yield from ((*load, arm, blocks) for load, blocks in found.items() for arm in blocks.arms if arm != "bare")


def report(found: Found) -> str:
    head = ("form", "load", "through", "plain median, ms", "added median, ms (min … max of blocks)", "added p99, ms")
    return "\n".join(table(head, (
        [*where, arm, f"{median(pooled(blocks, 'bare')):.2f}", spread(added(blocks, arm, middle_ms)).shown(bold=True),
         f"{added_p99_ms(blocks, arm):.2f}"]
        for *where, arm, blocks in others(found)
    )))  # fmt: skip


def report_cpu(found: Found) -> str:
    more, ratio = "added CPU, ms (min … max of blocks)", "ratio to plain (min … max)"
    head = ("form", "load", "through", "plain CPU, ms", more, ratio)
    return "\n".join(table(head, (
        [*where, arm, f"{median(blocks.column('bare', cpu_ms)):.2f}",
         spread(added(blocks, arm, cpu_ms)).shown(bold=True),
         spread(blocks.ratios(arm, "bare", cpu_ms)).shown(bold=True)]
        for *where, arm, blocks in others(found)
    )))  # fmt: skip


def beyond_goal(found: Found) -> list[str]:
    """Return what the CPU time of a wrapped call is to be, and is not."""
    return [
        f"{form}: a wrapped call takes {ratio:.3f} times the CPU time of a bare one, the goal is "
        f"{GOAL_CPU_RATIO[form]:.2f} (median of {len(blocks.seeds)} blocks)"
        for form, load, arm, blocks in others(found)
        if arm == "wrapped" and load == ALONE
        and (ratio := blocks.ratio(arm, "bare", cpu_ms)) > GOAL_CPU_RATIO[form]
    ]  # fmt: skip


def draw(found: Found, path: Path) -> None:
    """Draw the added medians with their spread."""
    rows = {
        f"{arm} · {form} · {load}": spread(added(blocks, arm, middle_ms)) for form, load, arm, blocks in others(found)
    }
    figure, axes = plot.pyplot("overhead").subplots(figsize=(8, 0.42 * len(rows) + 1.2))
    colours = ["#3b7dd8" if name.startswith("wrapped") else "#e08a3c" for name in rows]
    plot.bars(axes, rows, colours, GOAL_MEDIAN_MS, "#777")
    axes.text(GOAL_MEDIAN_MS, -0.9, " goal", color="#777", fontsize=8)
    axes.set_xlabel("added time per call, ms (median; whiskers: extreme blocks)")
    axes.invert_yaxis()
    plot.open_axes(axes)
    plot.save(figure, path)


def report_clients(found: Found) -> str:
    """Return what another SDK's calls add, as a ratio to what chat completions of OpenAI's own add."""
    return "\n".join(
        f"{form}: an SDK met at its HTTP client adds "
        f"{spread(ratios(added(blocks, 'other SDK', cpu_ms), added(blocks, 'wrapped', cpu_ms))).shown()} "
        "of what chat completions add"
        for (form, _), blocks in found.items()
    )


async def memory(arm: Arm, calls: int) -> None:
    """Make many calls through a wrapped graph and print what the process holds on the way."""
    process, held, step = psutil.Process(), [], calls // 10
    for done in range(0, calls + 1, step):
        gc.collect()
        held.append(process.memory_info().rss / 2**20)
        print(f"  {done:>7} calls: {held[-1]:.1f} MiB", flush=True)
        if done < calls:
            for _ in range(step // 500):
                await arm.run("ainvoke", 500, None)
    later = held[2:]
    slope = (later[-1] - later[0]) / (len(later) - 1) / step * 1e5
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"memory from the third sample on: {slope:+.1f} MiB per 100,000 calls; peak {peak:.0f} MiB")


async def main() -> int:
    options = parser("overhead", __doc__)
    add = options.add_argument
    add("--quick", action="store_true", help="smaller blocks, no memory run")
    add("--blocks", type=count, default=None, help="blocks per arm and load (default 10, quick 6)")
    add("--memory-calls", type=count, default=100_000, metavar="N")
    add("--only-memory", action="store_true")
    add("--check", action="store_true", help=f"CPU alone, at least {LEAST_BLOCKS} blocks; fails beyond the goal")
    add("--clients", action="store_true", help="CPU time of another client's calls alone")
    add("--draw", action="store_true", help="draw docs/overhead.svg")
    args, found = options.parse_args(), Found()
    with ways("--text", ANSWER) as three:
        arms = [Arm(way) for way in three]
        if args.clients:
            other = Arm(other_sdk.way(f"{three[0].model.openai_api_base}", three[1].wrap))
            found = await measure([*arms[:2], other], args.blocks or LEAST_BLOCKS, args.quick, alone_only=True)
            print(f"{report_cpu(found)}\n\n{report_clients(found)}")
            return 0
        if args.check:
            found = await measure(arms[:2], max(LEAST_BLOCKS, args.blocks or 0), args.quick, alone_only=True)
            print(report_cpu(found))
            print("\n".join(missed := beyond_goal(found)) or "within the goal")
            return 1 if missed else 0
        if not args.only_memory:
            found = await measure(arms, args.blocks or (6 if args.quick else 10), args.quick)
            print(f"{report(found)}\n\n{report_cpu(found)}")
        if not args.quick:
            await memory(arms[1], args.memory_calls)
    if args.draw:
        draw(found, DOCS / "overhead.svg")
    for form, load, arm, blocks in others(found):
        middle, p99_ms = median(added(blocks, arm, middle_ms)), added_p99_ms(blocks, arm)
        if arm == "wrapped" and (middle > GOAL_MEDIAN_MS or p99_ms > GOAL_P99_MS):
            print(f"goal missed: {form}, {load}: {middle:.2f} ms, p99 {p99_ms:.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
