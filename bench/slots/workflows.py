"""The load of a round, and the engine of an arm."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bench.lib.engines import LlamaProcess
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


@dataclass(frozen=True)
class Arm:
    name: str
    wrapped: bool
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
    room = 0 if arm.wrapped else shape.cache_ram if arm.bounded else -1
    with (
        tempfile.TemporaryDirectory(prefix="bench-slots-") as folder,
        LlamaProcess(
            slots=shape.slots, context=shape.longest_tokens + MARGIN_TOKENS, threads=shape.threads, port=shape.port,
            cache_ram=room, save=f"{folder}/" * arm.wrapped,
        ) as llama,
    ):  # fmt: skip
        yield Engine(llama.url, llama.process.pid, Path(folder))
