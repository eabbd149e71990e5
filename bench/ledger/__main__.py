"""What the account of an engine's cache costs: memory for many workflows, and time for each event.

    make bench-ledger                         10,000 workflows of 8 turns, about a minute
    make bench-ledger BENCH='--workflows 500 --turns 20'
    python -m bench.ledger --help

Every workflow has one prompt in common with all others and one of its own; each turn adds an answer and a question.
All take their first turn, then all their second, and so on: as many as possible are open at once. One pass measures
memory (``tracemalloc``: what the account itself keeps, and the growth of the process), another one time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from bench.lib.command import parser
from bench.lib.core import Ask, CacheHandle, Doing, PrefixTree, References
from bench.lib.flags import count

GOAL_MB, GOAL_US = 100.0, 50.0
BEGINS = "You serve customers of a shop and follow its rules. " * 20
ANSWER_TOKENS = 60
QUESTION = "and what about the other one, which I have not received yet?"
EVENTS = ("call begins", "first token", "call ends", "call ends, corrected", "workflow turned")


@dataclass
class Load:
    """What happens to one account."""

    workflows: int
    turns: int
    corrected: int
    """Every so many calls, the engine found only what all prompts have in common."""
    nothing: bool
    """Then it found not even that, so what all workflows have is cut."""
    timed: Callable[[str], object]
    cache: PrefixTree = field(default_factory=PrefixTree)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.claims = References(self.cache)

    def run(self) -> None:
        for turn in range(self.turns):
            for number in range(self.workflows):
                self.now += 0.01
                self.take_turn(f"w{number}", turn, corrected=(turn * self.workflows + number) % self.corrected == 0)

    def take_turn(self, workflow: str, turn: int, *, corrected: bool) -> None:
        ask = Ask("auto", messages(workflow, turn))
        with self.timed("call begins"):
            stay = self.cache.begin(ask, 2.0 * ANSWER_TOKENS)
            self.cache.shrink(float("inf"))
            self.claims.enter(workflow, 500.0)
        with self.timed("first token"):
            self.cache.filled(stay)
        self.end(stay, workflow, corrected=corrected and turn > 0)
        with self.timed("workflow turned"):
            self.claims.turned(workflow, Doing.HUMAN, self.now)

    def end(self, stay: CacheHandle, workflow: str, *, corrected: bool) -> None:
        prompt = round(sum(piece.tokens for piece in stay.path))
        found = sum(stay.believed[: not self.nothing] if corrected else stay.believed)
        with self.timed("call ends, corrected" if corrected else "call ends"):
            self.cache.end(stay, prompt, ANSWER_TOKENS, round(found))
            self.claims.leave(workflow, "agent", stay.answer, self.now, followed=True)
            self.cache.shrink(float("inf"))


def messages(workflow: str, turn: int) -> list[dict[str, str]]:
    said = [{"role": "system", "content": BEGINS}, {"role": "user", "content": f"I am {workflow}. {QUESTION}"}]
    for nth in range(turn):
        said.append({"role": "assistant", "content": f"{workflow} {nth}: it is on its way and will be there soon."})
        said.append({"role": "user", "content": f"{nth} {QUESTION}"})
    return said


class Stopwatch:
    """Seconds of each event, by its name."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = {name: [] for name in EVENTS}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.taken[name].append(time.perf_counter() - began)


@contextmanager
def untimed(name: str) -> Iterator[None]:
    yield


def measure_memory(arguments: argparse.Namespace) -> Load:
    gc.collect()
    process = psutil.Process()
    rss = process.memory_info().rss
    tracemalloc.start()
    load = Load(arguments.workflows, arguments.turns, arguments.corrected, arguments.nothing, untimed)
    load.run()
    gc.collect()
    kept_mb, grown_mb = tracemalloc.get_traced_memory()[0] / 1e6, (process.memory_info().rss - rss) / 1e6
    traced_mb = tracemalloc.get_tracemalloc_memory() / 1e6
    tracemalloc.stop()
    print(f"memory: {kept_mb:.1f} MB kept by the account (tracemalloc; goal {GOAL_MB:.0f} MB), "
          f"{len(load.cache.pieces):,} pieces of {len(load.claims.by_workflow):,} workflows")  # fmt: skip
    print(f"        the process grew by {grown_mb:.1f} MB, of which tracemalloc itself holds {traced_mb:.1f} MB")
    return load


def measure_time(arguments: argparse.Namespace) -> None:
    watch = Stopwatch()
    load = Load(arguments.workflows, arguments.turns, arguments.corrected, arguments.nothing, watch)
    load.run()
    print(
        f"\n{'event':<24}{'count':>9}{'median µs':>12}{'p99 µs':>10}{'max µs':>10}   (goal: median {GOAL_US:.0f} µs)"
    )
    for name, taken in watch.taken.items():
        if len(taken) > 1:
            cuts = statistics.quantiles(taken, n=100)
            us = (statistics.median(taken) * 1e6, cuts[98] * 1e6, max(taken) * 1e6)
            print(f"{name:<24}{len(taken):>9,}{us[0]:>12.1f}{us[1]:>10.1f}{us[2]:>10.1f}")
    began = time.perf_counter()
    holdings = load.claims.holdings()
    taken_s = time.perf_counter() - began
    print(f"\nholdings of all {len(holdings):,} workflows: {taken_s * 1e3:.0f} ms; {load.cache.tokens:,.0f} tokens")
    began = time.perf_counter()
    load.claims.forget_older_than(load.now - arguments.workflows * 0.005)
    taken_s = time.perf_counter() - began
    print(f"forgetting the workflows that turned first, and what they left: {taken_s * 1e3:.0f} ms")
    pieces = len(load.cache.pieces)
    began = time.perf_counter()
    load.cache.shrink(0.0)
    taken_s = time.perf_counter() - began
    print(
        f"giving up {pieces:,} pieces at once: {taken_s * 1e3:.0f} ms, {taken_s / max(pieces, 1) * 1e6:.1f} µs each"
    )


def main() -> None:
    options = parser("ledger", __doc__)
    options.add_argument("--workflows", type=count, default=10_000, help="open at once (default: %(default)s)")
    options.add_argument("--turns", type=count, default=8, help="calls of each (default: %(default)s)")
    options.add_argument("--corrected", type=count, default=10, help="every so many answers, one found little (10)")
    options.add_argument("--nothing", action="store_true", help="those found nothing: what all prompts share is cut")
    options.add_argument("--check", action="store_true", help="check the account's integrity at the end (slow)")
    arguments = options.parse_args()
    load = measure_memory(arguments)
    if arguments.check:
        load.cache.check_integrity()
        load.claims.check_integrity()
        print("        all its promises hold")
    del load
    measure_time(arguments)


if __name__ == "__main__":
    main()
