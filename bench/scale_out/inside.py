"""What a call costs a core by itself: its links are driven in this process, without sockets; nothing else is timed.

    python -m bench.scale_out.inside                     CPU and functions for a call, by length and by pressure
    python -m bench.scale_out.inside --against TREE      the same and another checkout's, block by block in turn
    python -m bench.scale_out.inside --profile 10 full   where the time goes

Timed is the thread's CPU within the core's callbacks, which is steadier than a process among others; functions are
Python's and C's, as many on each machine. *Roomy*: all that is under way fits the engine's KV cache. *Full*: half of
it does, and the other half waits.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import gc
import json
import os
import pstats
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, cast

from bench.lib import core, flags
from bench.lib.command import ROOT, parser
from bench.lib.figures import table
from bench.scale.pools import CoreMeter, Wire
from bench.scale_out.caller import TOKENS, TURNS, enter, prompts
from orla_lg.link.framing import FrameReader, frame
from orla_lg.link.messages import PROTOCOL, End, FirstToken, Grant, Hello, Message, Ready, Signal, flat, read
from orla_lg.serve.access.access import Access
from orla_lg.serve.access.keys import Keyring, KeyScope
from orla_lg.serve.link.host import LinkHost
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.store import MemoryStore
from orla_lg.testing.virtual import StillAdapter

MESSAGES, LANES, ANSWER = (10, 40, 160), 64, 16
WARM, CALLS, COUNTED, BLOCKS = 320, 320, 320, 7
SHAPES = [(messages, full) for full in (False, True) for messages in MESSAGES]


class Adapter(StillAdapter):
    """An engine that needs no fields of its own."""

    def request_fields(self, ask: Any, told: Any) -> dict[str, Any]:
        return {}


class Lane:
    """A caller that makes one call after another: five for each workflow, with two more messages each time."""

    def __init__(self, number: int, messages: int) -> None:
        self._number, self._given = number, prompts(messages, number)
        self._calls = count()
        self.call, self.workflow, self.turn, self.hashes = "", "", 0, list[int]()

    def begins(self) -> Iterator[Message]:
        """Yield what is said when the next call comes."""
        self.turn, self.workflow, self.hashes, chars = next(self._given)
        self.call = f"{self._number}.{next(self._calls)}"
        if not self.turn:
            yield Signal("run_started", self.workflow)
        yield enter(self.call, self.workflow, self.hashes, chars, "main")

    def ends(self, grant: Grant) -> Iterator[Message]:
        """Yield what is said when it is over; the engine found what was expected."""
        yield End(self.call, None, False, len(self.hashes) * TOKENS, grant.expected_tokens or 0, ANSWER)
        if self.turn == TURNS - 1:
            yield Signal("run_ended", self.workflow, {"outcome": "done"})


class Inside:
    """One core, one link, so many lanes."""

    def __init__(self, messages: int, *, full: bool) -> None:
        kv_tokens = (LANES // 2 if full else 100 * LANES) * (messages * TOKENS + 2 * ANSWER)
        backend = core.Backend("main", "http://127.0.0.1:1/v1", max_concurrency=2_000)
        adapter = Adapter(core.Probe(kv_tokens=kv_tokens))
        self.serving = core.Serving({backend: adapter}, mapper=None, memory=core.memory_policy("default"))
        store = MemoryStore()
        self.host = LinkHost(self.serving, store, CoreLease(store))  # fmt: skip
        self._access = Access(Keyring(store))
        self._lanes = {lane: Lane(lane, messages) for lane in range(LANES)}
        self._grants = list[Grant]()
        self._reader = FrameReader()

    async def start(self) -> None:
        """Connect, and wait until the engine is known."""
        await self.host.start()
        self.session = self.host.session(self._access.admit([], scope=KeyScope.LINK, loopback=True))
        self.session.connection_made(Wire(self._received))
        self._say(Hello(PROTOCOL, "inside"), Ready())
        probing = self.serving.schedulers["main"].health.connect()
        if probing is not None:
            await asyncio.wrap_future(probing)

    def _say(self, *messages: Message) -> None:
        for message in messages:
            self.session.data_received(frame(flat(message)))

    def _received(self, data: bytes) -> None:
        for fields in self._reader.feed(data):
            message = read(fields)
            if isinstance(message, Grant):
                self._grants.append(message)

    async def run(self, calls: int, *, begin: bool = False) -> None:
        """Let so many calls end; each is followed by the next one of its lane."""
        if begin:
            for lane in self._lanes.values():
                self._say(*lane.begins())
        while calls > 0:
            await asyncio.sleep(0)
            granted, self._grants = self._grants, []
            for grant in granted:
                self._say(FirstToken(grant.call, grant.attempt))
            await asyncio.sleep(0)
            for grant in granted:
                lane = self._lanes[int(grant.call.partition(".")[0])]
                self._say(*lane.ends(grant))
                self._say(*lane.begins())
                calls -= 1

    async def close(self) -> None:
        await self.host.close()
        self.serving.close()


async def block(messages: int, full: bool, work: Callable[[Inside], Any]) -> Any:
    """Return what *work* finds on a core that is warm."""
    inside = Inside(messages, full=full)
    await inside.start()
    await inside.run(WARM, begin=True)
    gc.collect()
    gc.freeze()
    try:
        return await work(inside)
    finally:
        gc.unfreeze()
        await inside.close()


def measured(messages: int, full: bool) -> tuple[float, float]:
    """Return the core's CPU for a call, in microseconds, and the functions that it calls."""
    meter = CoreMeter()

    async def work(inside: Inside) -> tuple[float, float]:
        meter.spent_s.clear()
        await inside.run(CALLS)
        us = meter.spent_s["calls"] / CALLS * 1e6
        meter.counts = True
        await inside.run(COUNTED)
        return us, meter.functions / COUNTED

    with meter.on():
        return cast("tuple[float, float]", asyncio.run(block(messages, full, work)))


def profiled(messages: int, full: bool) -> None:
    """Print where a core's time goes."""

    async def work(inside: Inside) -> None:
        profile = cProfile.Profile()
        profile.enable()
        await inside.run(CALLS)
        profile.disable()
        stats = pstats.Stats(profile)
        print("calls a call", stats.total_calls / CALLS)  # type: ignore[attr-defined]
        stats.sort_stats("tottime").print_stats(45)
        stats.sort_stats("cumtime").print_stats(90)

    asyncio.run(block(messages, full, work))


def serve() -> None:
    """Measure what standard input asks for, a line at a time."""
    for line in sys.stdin:
        print(json.dumps(measured(*json.loads(line))), flush=True)


def in_turn(trees: Sequence[Path], blocks: int) -> list[str]:
    """Measure checkouts block by block in turn, each in a process of its own; return the table."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve"], cwd=tree, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": f"{tree}:{tree}/adapters"},
        )
        for tree in trees
    ]  # fmt: skip
    found: dict[tuple[int, int, bool], list[tuple[float, float]]] = {}
    for number in range(blocks):
        for shape in SHAPES:
            order = range(len(trees)) if number % 2 else reversed(range(len(trees)))
            for tree in order:
                process = processes[tree]
                assert process.stdin is not None and process.stdout is not None
                print(json.dumps(shape), file=process.stdin, flush=True)
                found.setdefault((tree, *shape), []).append(tuple(json.loads(process.stdout.readline())))
            print(number + 1, shape, *(found[tree, *shape][-1] for tree in range(len(trees))), file=sys.stderr)
    for process in processes:
        process.terminate()
    rows = []
    for messages, full in SHAPES:
        us = [[us for us, _ in found[tree, messages, full]] for tree in range(len(trees))]
        functions = [median(each for _, each in found[tree, messages, full]) for tree in range(len(trees))]
        row = [f"{messages} messages, {'full' if full else 'roomy'}", f"{median(us[0]):.0f}", f"{functions[0]:.0f}"]
        if len(trees) > 1:
            ratio = median(mine / other for mine, other in zip(*us, strict=True))
            row += [f"{median(us[1]):.0f}", f"{functions[1]:.0f}", f"{ratio:.2f}"]
        rows.append(row)
    head = ["prompts of", "CPU of the core per call, µs", "functions"]
    return table([*head, *(["the other's CPU", "functions", "ratio of CPU"] if len(trees) > 1 else [])], rows)


def main() -> None:
    options = parser("scale_out.inside", __doc__)
    options.add_argument("--against", type=Path, help="another checkout")
    options.add_argument("--blocks", type=flags.count, default=BLOCKS)
    options.add_argument("--profile", nargs=2, metavar=("MESSAGES", "PRESSURE"))
    options.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.serve:
        serve()
    elif args.profile:
        profiled(int(args.profile[0]), args.profile[1] == "full")
    else:
        print("\n".join(in_turn([ROOT, *([args.against] if args.against else [])], args.blocks)))


if __name__ == "__main__":
    main()
