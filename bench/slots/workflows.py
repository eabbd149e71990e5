"""The load of a round, the engine of an arm, and what turns showed of the calls that are not a workflow's first."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.lib import plot, workflows
from bench.lib.calls import Turn, makespan_s, recomputed, returning, ttft_s, ttfts_s
from bench.lib.engines import LlamaProcess
from bench.lib.figures import Column, Rounds
from bench.lib.workflows import Session
from orla_lg_sim.text import prose

KB_PER_TOKEN = 23.0
"""Of the demo's model."""

MARGIN_TOKENS = 64
"""Of a slot, for the chat template."""


@dataclass(frozen=True)
class Shape:
    """The load, and the engine's size; tokens of prompts are made up, one a word."""

    workflows: int
    slots: int
    calls: int
    tokens: int
    grow: int
    answer_tokens: int
    wait: float
    arrive: float
    cache_ram: int
    threads: int
    port: int

    @property
    def longest_tokens(self) -> int:
        """What a workflow may grow to, its last answer included."""
        return round(self.tokens * 1.15) + self.calls * (self.grow + self.answer_tokens + 16)

    @property
    def cached_workflows(self) -> int:
        """How many workflows a cache of ``cache_ram`` MiB holds at their ends."""
        return max(1, int(self.cache_ram * 1024 / (self.longest_tokens * KB_PER_TOKEN)))


@dataclass(frozen=True, slots=True)
class Arm(workflows.Arm):
    bounded: bool = True
    """Its cache beside the slots holds no more than ``cache_ram``."""


def sessions_of(shape: Shape, seed: int) -> list[Session]:
    """Make up the workflows of a round; no two of them begin alike."""
    dice, made = Random(seed), []
    for number in range(shape.workflows):
        lengths = [round(shape.tokens * dice.uniform(0.85, 1.15)), *[shape.grow] * (shape.calls - 1)]
        said = tuple("".join(prose(dice, tokens)) for tokens in lengths)
        waits_s = tuple(dice.uniform(0.5, 1.5) * shape.wait for _ in range(shape.calls))
        made.append(Session(number * shape.arrive, (f"Case {seed}.{number}: {said[0]}", *said[1:]), waits_s))
    return made


@dataclass(frozen=True)
class Engine:
    """A llama.cpp, and its folder."""

    url: str
    model: str
    pid: int
    folder: Path

    def peak_mib(self) -> float | None:
        """Return the most memory it ever had, in MiB; ``None`` where the system does not say."""
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
            return None if found is None else int(found[1]) / 1024
        return None

    def files_mib(self) -> float:
        return sum(path.stat().st_size for path in self.folder.iterdir()) / 2**20


@contextlib.contextmanager
def engine_for(arm: Arm, shape: Shape) -> Iterator[Engine]:
    """Start an engine as the arm wants it."""
    wrapped = arm.orla is not None
    room = 0 if wrapped else shape.cache_ram if arm.bounded else -1
    with (
        tempfile.TemporaryDirectory(prefix="bench-slots-") as folder,
        LlamaProcess(
            slots=shape.slots, context=shape.longest_tokens + MARGIN_TOKENS, threads=shape.threads, port=shape.port,
            cache_ram=room, save=f"{folder}/" * wrapped,
        ) as llama,
    ):  # fmt: skip
        yield Engine(llama.url, llama.model, llama.process.pid, Path(folder))


GOAL_P95 = 3.0
STOCK, AGAIN, ORLA = "stock", "stock again", "orla"
p50, p95 = ttft_s(0.5, returning), ttft_s(0.95, returning)
COLUMNS = (
    Column("TTFT p50, s", p50),
    Column("TTFT p95, s", p95),
    Column("recomputed, tokens", lambda turn: recomputed(turn.returning), ".0f"),
    Column("makespan, s", lambda turn: makespan_s(turn.jobs), ".0f"),
)


def report(turns: Rounds[Turn]) -> list[str]:
    """Return a row for each arm, with the engine's memory and its files."""

    def sizes(own: Sequence[Turn]) -> list[str]:
        peaks = [turn.more["peak_mib"] for turn in own if turn.more["peak_mib"] is not None]
        return [f"{max(peaks):.0f}" if peaks else "unknown", f"{max(turn.more['files_mib'] for turn in own):.0f}"]

    several = len(turns.seeds) > 1
    return turns.table("arm", COLUMNS, heads=("engine, MiB", "files, MiB"), cells=sizes, bold=True, always=several)


def verdict(turns: Rounds[Turn]) -> list[str]:
    """Say whether the goals are met, and how far two equal arms differ."""
    lines = []
    if {STOCK, ORLA} <= {*turns.arms}:
        for name, figure, goal in (("p95", p95, GOAL_P95), ("p50", p50, 1.0)):
            less = turns.ratio(STOCK, ORLA, figure)
            said = "met" if less >= goal else "MISSED"
            lines.append(f"{name} of those that return, {less:.1f} times shorter: {said}")
    if {STOCK, AGAIN} <= {*turns.arms}:
        noise = turns.ratios(STOCK, AGAIN, p95)
        lines.append(f"two equal arms differ in p95 by a factor of {min(noise):.2f} … {max(noise):.2f}")
    return lines


def draw(turns: Rounds[Turn], path: Path) -> None:
    """Draw which part of the returning calls had its first token by when."""
    plot.curves("slots", path, {"calls that return": turns}, lambda turn: ttfts_s(turn.returning))
