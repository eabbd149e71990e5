"""The places (a llama.cpp and a vLLM, each too small for all that is under way), the arms, and what turns showed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lib import plot, workflows
from bench.lib.calls import Turn, makespan_s, recomputed, returning, ttft_s, ttfts_s
from bench.lib.engines import LLAMACPP, VLLM_CPU, Engine, LlamaProcess, engine_at
from bench.lib.figures import Column, Rounds
from orla_lg import Backend, Orla
from orla_lg.engines import EngineOptions, running_engine
from orla_lg_llamacpp.embedded import usable_cores

CONTEXT_TOKENS = 2048
SLOTS, POOL_TOKENS = 2, 4096
"""Of llama.cpp, and of vLLM: two workflows of up to ``CONTEXT_TOKENS``."""
NIGHT_SLOTS, NIGHT_POOL_TOKENS = 4, 8192
"""Over night there is room for all: what empties the cache is the restart."""
AT_ONCE = 16
"""Calls that vLLM takes at once (its ``--max-num-seqs``); where that is unknown, only an idle engine is warmed."""
BACKEND = "worker"


@dataclass(frozen=True, slots=True)
class Place:
    """A kind of engine, and prompts whose prefill takes it some two seconds."""

    engine: str
    title: str
    tokens: int
    """Of a workflow's first prompt, about."""
    plugin: bool = False
    threads: int | None = None
    """Of the engine; ``None``: one for each core."""


PLACES = {
    "llamacpp": Place(LLAMACPP, "llama.cpp", 600),
    "vllm": Place(VLLM_CPU, "vLLM", 1400),
    "vllm-plugin": Place(VLLM_CPU, "vLLM with the plugin", 1400, plugin=True),
}


def backend_at(place: Place, url: str, model: str, max_saved: int) -> Backend:
    """Return the engine as a backend."""
    if place.engine == LLAMACPP:
        return Backend(BACKEND, url, model, engine="llamacpp", max_saved=max_saved)
    return Backend(BACKEND, url, model, engine="vllm", max_concurrency=AT_ONCE)


def crowded(place: Place, port: int) -> AbstractContextManager[Engine]:
    """Give an engine that is too small for all; its cache can be emptied between turns."""
    return engine_at(_options(place, port, POOL_TOKENS))


def _options(place: Place, port: int, kv_tokens: int) -> EngineOptions:
    if place.engine == LLAMACPP:
        return EngineOptions("llamacpp", slots=SLOTS, context_tokens=CONTEXT_TOKENS, port=port, threads=place.threads)
    return EngineOptions(
        "vllm-cpu", kv_tokens=kv_tokens, context_tokens=CONTEXT_TOKENS, slots=AT_ONCE, port=port, plugin=place.plugin,
        threads=place.threads,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Overnight:
    """An engine that can be restarted at the same place."""

    url: str
    model: str
    restart: Callable[[], object]


@contextlib.contextmanager
def overnight(place: Place, port: int) -> Iterator[Overnight]:
    """Give an engine that can be restarted; llama.cpp's folder for saved slots outlasts that."""
    if place.engine == LLAMACPP:
        with (
            tempfile.TemporaryDirectory(prefix="bench-warm-") as folder,
            LlamaProcess(
                slots=NIGHT_SLOTS, context=CONTEXT_TOKENS, threads=place.threads or len(usable_cores()), port=port,
                cache_ram=0, save=f"{folder}/",
            ) as llama,
        ):  # fmt: skip
            yield Overnight(llama.url, llama.model, llama.restart)
    else:
        with running_engine(_options(place, port, NIGHT_POOL_TOKENS)) as own:
            yield Overnight(own.url, own.name, own.restart)


@dataclass(frozen=True, slots=True)
class Arm(workflows.Arm):
    max_saved: int = 0
    """Slots that the engine may keep on its disk; 0: none, so that what is lost must be computed."""


BARE, AGAIN = Arm("bare"), Arm("bare again")
COLD, WARM = Arm("orla, no warm-ups", {"warm_up": False}), Arm("orla, warm-ups", {"warm_up": True})
SAVED = Arm("orla, slots saved", {"warm_up": True}, max_saved=64)
ARMS = {arm.name: arm for arm in (BARE, AGAIN, COLD, WARM, SAVED)}
SHOWN = ("done", "given_up", "warmed_tokens", "used_tokens", "wasted_tokens", "refused")


def warm_ups_of(orla: Orla | None) -> dict[str, Any]:
    """Return what became of a turn's warm-ups: of ``WarmStatistics`` what is shown."""
    found = None if orla is None else orla.statistics().backends[BACKEND].warm_ups
    return {} if found is None else {name: getattr(found, name) for name in SHOWN}


COLOURS = {BARE.name: "#444", AGAIN.name: "#999", COLD.name: "#c33", SAVED.name: "#4a4", WARM.name: "#3b7dd8"}
HEADS = ("warmed", "used", "wasted", "done, given up")
p50, p95 = ttft_s(0.5, returning), ttft_s(0.95, returning)


def makespan(turn: Turn) -> float:
    return makespan_s(turn.jobs)


COLUMNS = (
    Column("TTFT p50, s", p50),
    Column("TTFT p95, s", p95),
    Column("recomputed", lambda turn: recomputed(turn.returning), ",.0f"),
    Column("makespan, s", makespan, ",.1f"),
)


def groups(turns: Sequence[Turn]) -> dict[str, Rounds[Turn]]:
    """Return the whole rounds of each situation and place, in the order in which they were measured."""
    places = dict.fromkeys(turn.place for turn in turns)
    found = {place: Rounds([turn for turn in turns if turn.place == place], [*ARMS]) for place in places}
    return {place: rounds for place, rounds in found.items() if rounds.seeds}


def rows(where: str, turns: Rounds[Turn]) -> list[str]:
    """Return a row for each arm; tokens of warm-ups are sums."""
    return turns.table(where, COLUMNS, heads=HEADS, cells=_warmed, always=False)


def _warmed(own: Sequence[Turn]) -> list[str]:
    if own[0].arm != WARM.name:
        return ["–"] * 4
    sums = {name: sum(turn.more[name] for turn in own) for name in own[0].more if name != "refused"}
    tokens = [f"{sums[name]:,}" for name in ("warmed_tokens", "used_tokens", "wasted_tokens")]
    return [*tokens, f"{sums['done']}, {sums['given_up']}"]


def verdict(where: str, turns: Rounds[Turn]) -> list[str]:
    """Say what warm-ups gain over the other arms, and how far two equal arms differ."""

    def ratios(arm: str, other: str) -> list[str]:
        return [f"{turns.ratio(arm, other, figure):.2f}" for figure in (p50, p95, makespan)]

    arms, lines = {*turns.arms}, []
    for other in (BARE.name, COLD.name, SAVED.name):
        if {other, WARM.name} <= arms:
            middle, tail, whole = ratios(WARM.name, other)
            lines.append(f"with warm-ups p50 is {middle} of that of *{other}*, p95 {tail}, the makespan {whole}")
    if {AGAIN.name, BARE.name} <= arms:
        middle, tail, whole = ratios(AGAIN.name, BARE.name)
        lines.append(f"*bare again* against *bare*: p50 {middle}, p95 {tail}, makespan {whole}")
    refused: dict[str, int] = {}
    for turn in turns.of(WARM.name):
        for reason, times in turn.more["refused"].items():
            refused[reason] = refused.get(reason, 0) + times
    if refused:
        reasons = ", ".join(f"{reason} {times}" for reason, times in refused.items())
        lines.append(f"wishes that came to nothing, by reason: {reasons}")
    return [f"{where}: {line}" for line in lines]


def report(turns: Sequence[Turn]) -> list[str]:
    lines = list[str]()
    for where, rounds in groups(turns).items():
        lines += [*rows(where, rounds), "", *(f"* {line}" for line in verdict(where, rounds)), ""]
    busiest = max((turn.others for turn in turns), default=0.0)
    return [*lines, f"Other processes took up to {busiest:.0%} of the machine."]


def draw(turns: Sequence[Turn], path: Path) -> None:
    plot.curves("warm", path, groups(turns), lambda turn: ttfts_s(turn.returning), COLOURS, wide=3)
