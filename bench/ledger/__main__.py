"""What the account of an engine's cache costs: memory for many workflows, and time for each event.

    make bench-ledger                         10,000 workflows of 8 turns, about a minute
    make bench-ledger BENCH='--workflows 500 --turns 20'
    python -m bench.ledger --help

Every workflow has one prompt in common with all others and one of its own; each turn adds an answer and a question.
All take their first turn, then all their second, and so on: as many as possible are open at once. One pass measures
memory (``tracemalloc``: what the account itself keeps, and the growth of the process), another one time.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from bench.lib.command import parser
from bench.lib.core import Ask, CacheHandle, Doing, PrefixTree, References
from bench.lib.figures import table
from bench.lib.flags import count
from bench.lib.timing import taken

GOAL_MB, GOAL_US = 100.0, 50.0
BEGINS = "You serve customers of a shop and follow its rules. " * 20
ANSWER_TOKENS = 60
QUESTION = "and what about the other one, which I have not received yet?"


class Load:
    """What happens to one account, and the seconds of each event.

    Every *corrected* calls, the engine found only what all prompts have in common; with *nothing*, not even that.
    """

    def __init__(self, workflows: int, turns: int, corrected: int, nothing: bool) -> None:
        self.cache, self.now, self.taken = PrefixTree(), 0.0, defaultdict[str, list[float]](list)
        self.references, self._nothing = References(self.cache), nothing
        self._load = workflows, turns, corrected

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.taken[name].append(time.perf_counter() - began)

    def run(self) -> None:
        workflows, turns, corrected = self._load
        for number in range(workflows * turns):
            self.now += 0.01
            turn = number // workflows
            self.take_turn(f"w{number % workflows}", turn, corrected=turn > 0 and number % corrected == 0)

    def take_turn(self, workflow: str, turn: int, *, corrected: bool) -> None:
        ask = Ask("auto", messages(workflow, turn))
        with self.timed("call begins"):
            handle = self.cache.begin(ask, 2.0 * ANSWER_TOKENS)
            self.cache.shrink(float("inf"))
            self.references.enter(workflow, 500.0)
        with self.timed("first token"):
            self.cache.filled(handle)
        self.end(handle, workflow, corrected=corrected)
        with self.timed("workflow turned"):
            self.references.turned(workflow, Doing.HUMAN, self.now)

    def end(self, handle: CacheHandle, workflow: str, *, corrected: bool) -> None:
        prompt = round(sum(piece.tokens for piece in handle.path))
        found = sum(handle.believed[: not self._nothing] if corrected else handle.believed)
        with self.timed("call ends, corrected" if corrected else "call ends"):
            self.cache.end(handle, prompt, ANSWER_TOKENS, round(found))
            self.references.leave(workflow, "agent", handle.answer, self.now, followed=True)
            self.cache.shrink(float("inf"))


def messages(workflow: str, turn: int) -> list[dict[str, str]]:
    made = [{"role": "system", "content": BEGINS}, {"role": "user", "content": f"I am {workflow}. {QUESTION}"}]
    for nth in range(turn):
        made.append({"role": "assistant", "content": f"{workflow} {nth}: it is on its way and will be there soon."})
        made.append({"role": "user", "content": f"{nth} {QUESTION}"})
    return made


def measure_memory(load: Load) -> None:
    gc.collect()
    process = psutil.Process()
    rss = process.memory_info().rss
    tracemalloc.start()
    load.run()
    load.taken.clear()
    gc.collect()
    kept_mb, grown_mb = tracemalloc.get_traced_memory()[0] / 1e6, (process.memory_info().rss - rss) / 1e6
    traced_mb = tracemalloc.get_tracemalloc_memory() / 1e6
    tracemalloc.stop()
    print(f"memory: {kept_mb:.1f} MB kept by the account (tracemalloc; goal {GOAL_MB:.0f} MB), "
          f"{len(load.cache.pieces):,} pieces of {len(load.references.by_workflow):,} workflows")  # fmt: skip
    print(f"        the process grew by {grown_mb:.1f} MB, of which tracemalloc itself holds {traced_mb:.1f} MB")


def measure_time(load: Load, workflows: int) -> None:
    load.run()
    rows = [[name, f"{us.count:,}", *(f"{each:.1f}" for each in us[:3])]
            for name, us in ((name, taken(each)) for name, each in load.taken.items())]  # fmt: skip
    pieces = len(load.cache.pieces)
    load.taken.clear()
    with load.timed("holdings of all workflows"):
        load.references.holdings()
    with load.timed("forgetting the workflows that turned first, and what they left"):
        load.references.forget_older_than(load.now - workflows * 0.005)
    with load.timed(f"giving up {pieces:,} pieces at once"):
        load.cache.shrink(0.0)
    print("\n".join(["", *table(["event", "count", "median µs", "p99 µs", "max µs"], rows)]))
    print(f"goal: median {GOAL_US:.0f} µs\n")
    for name, (seconds,) in load.taken.items():
        print(f"{name}: {seconds * 1e3:.0f} ms")


def main() -> None:
    options = parser("ledger", __doc__)
    options.add_argument("--workflows", type=count, default=10_000, help="open at once (default: %(default)s)")
    options.add_argument("--turns", type=count, default=8, help="calls of each (default: %(default)s)")
    options.add_argument("--corrected", type=count, default=10, help="every so many answers, one found little (10)")
    options.add_argument("--nothing", action="store_true", help="those found nothing: what all prompts share is cut")
    options.add_argument("--check", action="store_true", help="check the account's integrity at the end (slow)")
    args = options.parse_args()
    shape = (args.workflows, args.turns, args.corrected, args.nothing)
    load = Load(*shape)
    measure_memory(load)
    if args.check:
        load.cache.check_integrity()
        load.references.check_integrity()
        print("        all its promises hold")
    del load
    measure_time(Load(*shape), args.workflows)


if __name__ == "__main__":
    main()
