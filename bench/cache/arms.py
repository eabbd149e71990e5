"""The places (engines with room for all cases, or short of it), the arms, one turn of an arm, and what turns say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.cache.workflows import graph_of, opening
from bench.lib import plot, workflows
from bench.lib.calls import Turn, bound, common, every, makespan_s, needed_tokens, recomputed, ttft_s, ttfts_s
from bench.lib.engines import LLAMACPP, VLLM_CPU, Engine
from bench.lib.figures import Column, Rounds
from bench.lib.workflows import Session
from orla_lg import Backend
from orla_lg.engines import EngineOptions

FORGET_PATIENCE_S = 5.0
CONTEXT_TOKENS = 1536
"""A case's last prompt and answer have some 1,050."""
BLOCK_TOKENS = 32
SHORT, ROOM = "short", "room"


@dataclass(frozen=True)
class Place:
    """An engine with a KV cache of a size."""

    engine: str
    pool: str
    holds: int
    """llama.cpp: slots; vLLM: blocks of 32 tokens."""
    every_s: float
    """Between two arrivals, on the mean: about as long as the engine needs for a case."""

    @property
    def block_tokens(self) -> int:
        """What is cached together or not at all: on llama.cpp each token is for itself."""
        return 1 if self.engine == LLAMACPP else BLOCK_TOKENS

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.pool}"

    @property
    def title(self) -> str:
        if self.engine == LLAMACPP:
            return f"llama.cpp, {self.holds} slots"
        return f"vLLM, {self.holds * BLOCK_TOKENS:,} tokens"

    def options(self) -> EngineOptions:
        """Return how its engine is started."""
        if self.engine == LLAMACPP:
            return EngineOptions("llamacpp", slots=self.holds, context_tokens=CONTEXT_TOKENS)
        kv_tokens = self.holds * BLOCK_TOKENS
        return EngineOptions("vllm-cpu", kv_tokens=kv_tokens, context_tokens=CONTEXT_TOKENS, plugin=True)


PLACES = (
    Place(LLAMACPP, SHORT, holds=3, every_s=4.0),
    Place(LLAMACPP, ROOM, holds=8, every_s=4.0),
    Place(VLLM_CPU, SHORT, holds=64, every_s=1.2),
    Place(VLLM_CPU, ROOM, holds=240, every_s=1.2),
)


@dataclass(frozen=True, slots=True)
class Arm(workflows.Arm):
    resets: bool = False
    """Bare, with the engine's whole cache reset after each call."""


PLAIN, AGAIN, EVERYTHING = "engine's own LRU", "the same again", "reset of everything per request"
PER_REQUEST, PER_WORKFLOW = "flush per request", "flush per workflow"
ARMS = (
    Arm(PLAIN),
    Arm(AGAIN),
    Arm(EVERYTHING, resets=True),
    Arm(PER_REQUEST, {"memory": "flush_per_request"}),
    Arm(PER_WORKFLOW, {"memory": "default"}),
)


def arms_at(place: Place, engine: Engine) -> list[Arm]:
    """Return the arms that make sense at a place.

    Where there is room for everything the baselines that flush say nothing new: only whether the policy costs
    anything is asked. A reset of everything is vLLM's; a workflow's flush takes its plugin there.
    """
    wanted = [PLAIN, AGAIN, PER_WORKFLOW]
    if place.pool == SHORT:
        wanted += [PER_REQUEST, *([EVERYTHING] if place.engine == VLLM_CPU else [])]
    return [arm for arm in ARMS if arm.name in wanted and (arm.orla is None or engine.has_plugin)]


class Turns:
    """Runs arms on one engine."""

    def __init__(self, place: Place, engine: Engine) -> None:
        self._place, self._engine = place, engine
        self.resets_refused = 0
        """How often the engine would not forget everything, because calls ran."""

    async def turn(self, arm: Arm, cases: list[Session], seed: int) -> Turn:
        """Run one arm from an empty cache."""
        shared, engine = common([self._engine.prompt(opening(case)) for case in cases]), self._engine
        backend = Backend("engine", engine.url, engine.model, engine=self._place.engine)
        after = self._reset if arm.resets else None
        return await workflows.turn_of(
            arm, engine, backend, cases, lambda model: graph_of(model, cases, after), seed=seed, shared=shared,
            place=self._place.name,
        )  # fmt: skip

    async def _reset(self) -> None:
        """Have vLLM forget everything, as the paper's baseline does; it refuses while any call holds blocks."""
        async with httpx.AsyncClient(timeout=FORGET_PATIENCE_S, trust_env=False) as http:
            answer = await http.post(self._engine.url.removesuffix("/v1") + "/reset_prefix_cache")
        if not (answer.is_success and answer.json().get("success") is True):
            self.resets_refused += 1


COLOURS = {PLAIN: "#444", AGAIN: "#999", EVERYTHING: "#e6a23c", PER_REQUEST: "#c33", PER_WORKFLOW: "#3b7dd8"}
P50, P95 = Column("TTFT p50, s", ttft_s(0.5)), Column("TTFT p95, s", ttft_s(0.95))
RECOMPUTED = Column("recomputed tokens", lambda turn: recomputed(every(turn)), ",.0f")


def over_bound(place: Place) -> Column:
    def of(turn: Turn) -> float:
        return recomputed(turn.calls) / bound(turn.calls, turn.shared_tokens, place.block_tokens)

    return Column("of the bound", of)


def rounds_of(place: Place, turns: Sequence[Turn]) -> Rounds[Turn]:
    """Return the rounds that every arm has had."""
    found = Rounds(turns, [arm.name for arm in ARMS])
    if not found.seeds:
        raise SystemExit(f"{place.name}: no round has been measured in every arm yet")
    return found


def report(place: Place, rounds: Rounds[Turn]) -> list[str]:
    """Return what was run and what it would have needed, and a row for each arm."""
    first, busiest = rounds.of(PLAIN)[0], max(turn.others for turn in rounds.all())
    setting = (
        f"{place.title}: {len(first.jobs)} cases of {len(first.calls) // len(first.jobs)} stages in each of "
        f"{len(rounds.seeds)} rounds. All together need {needed_tokens(first):,} tokens, the policy counted once. "
        f"Other processes took up to {busiest:.0%} of the machine."
    )
    columns = (P50, P95, RECOMPUTED, over_bound(place), Column("makespan, s", lambda turn: makespan_s(turn.jobs)))
    return [setting, "", *rounds.table(place.title, columns, always=False), ""]


def verdict(place: Place, rounds: Rounds[Turn]) -> list[str]:
    """Say what the policy gains over the baselines, and whether more than two equal arms differ by."""

    def ratios(arm: str, other: str) -> list[str]:
        return [f"{rounds.ratio(arm, other, column.of):.2f}" for column in (P50, P95, RECOMPUTED)]

    lines = []
    for other in (PER_REQUEST, EVERYTHING, PLAIN):
        if {other, PER_WORKFLOW} <= {*rounds.arms}:
            p50, p95, tokens = ratios(PER_WORKFLOW, other)
            gain = f"{p50} of the median TTFT of *{other}*, {p95} of its p95, and recomputes {tokens} of its tokens."
            lines.append(f"{PER_WORKFLOW} has {gain}")
    if AGAIN in rounds.arms:
        p50, p95, tokens = ratios(AGAIN, PLAIN)
        noise = f"{p50} of the median TTFT, {p95} of its p95, {tokens} of the tokens."
        lines.append(f"the engine's own LRU against itself: {noise}")
    return [f"{place.title}: {line}" for line in lines]


def draw(found: Mapping[Place, Rounds[Turn]], path: Path) -> None:
    room = {SHORT: "short of room"}
    panes = {f"{place.title}\n{room.get(place.pool, 'room for all')}": rounds for place, rounds in found.items()}
    plot.curves("cache", path, panes, lambda turn: ttfts_s(turn.calls), COLOURS)
