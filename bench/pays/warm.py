"""Warm-ups against none, on the simulated engine: in tool waits, before a next stage, and after a night.

    python -m bench.pays.warm                        all of it, some minutes
    python -m bench.pays.warm --situation tools --seeds 2

    tools    agents call, wait for a tool, and call again; others use the engine too and push their cache out
    stages   a plan, then an order whose prompt begins with long rules, the same for all; others fill the cache
    night    threads are interrupted, the engine loses everything, the threads are resumed; the node's own code takes
             some seconds between resume and call

The arms: no warm-ups, those of ``WarmReturns`` alone, those of ``WarmNextStage`` alone, and both (the default). The
engines: a small model on two CPU cores, and one as on a GPU (prefill of 20,000 tokens/s). *Busy* is how much of the
engine's time others take.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from statistics import median
from typing import Any

from bench.lib.core import (
    Ask,
    Backend,
    Capability,
    Identity,
    InFlightCall,
    Outcome,
    Probe,
    Record,
    RunState,
    Support,
    Usage,
    arrive,
)
from bench.lib.core import START, Edge, Effect, GraphStructure
from bench.lib.figures import percentile, table
from bench.lib.progress import tell
from bench.pays.events import Reports, Telling
from orla_lg.core.engine.capabilities import Warmed
from orla_lg.core.memory.events import MemoryPolicy
from orla_lg.core.memory import policies as rules
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.testing.virtual import StillAdapter, VirtualServing
from orla_lg_sim.blocks import chain
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest
from orla_lg_sim.text import prose, tokenizer_of

CPU = EngineParameters(block_tokens=32)
GPU = EngineParameters(
    block_tokens=32, context_tokens=32_768, max_running=64, max_batch_tokens=8192, step_s=0.008, prefill_token_s=5e-5,
    prefill_attention_s=1e-10, decode_sequence_s=1e-4, decode_context_s=1e-8, request_s=0.002,
)  # fmt: skip
ENGINES = {"cpu": (CPU, 1200), "gpu": (GPU, 6000)}
"""Parameters, and the tokens of a workflow's first prompt, about."""

Message = dict[str, str]


def text(dice: Random, tokens: int) -> str:
    return "".join(prose(dice, max(1, tokens)))


def plain() -> list[MemoryPolicy]:
    return [
        rules.FlushAtBoundary(),
        rules.PreserveIncrements(),
        rules.DemoteInterrupted(),
        rules.FlushUnderPressure(),
    ]


ARMS: dict[str, Callable[[], MemoryPolicy] | None] = {
    "none": None,
    "returns": lambda: rules.Joined(*plain(), rules.WarmReturns()),
    "next stage": lambda: rules.Joined(*plain(), rules.WarmNextStage()),
    "both": rules.default,
}


class Warming(Telling):
    """An engine that can be asked to prefill."""

    def __init__(self, probe: Probe, arena: Arena, reports: Reports | None) -> None:
        super().__init__(probe, reports)
        self._arena = arena

    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        return await self._arena.warm(body)


@dataclass
class Seen:
    """One turn."""

    counted: list[Record] = field(default_factory=list)
    makespan_s: float = 0.0
    took_s: list[float] = field(default_factory=list)
    others_s: list[float] = field(default_factory=list)
    warmed: int = 0
    used: int = 0
    started: int = 0
    given_up: int = 0
    refused: dict[str, int] = field(default_factory=dict)


class Arena:
    """A core, an engine, and others that use it."""

    def __init__(self, parameters: EngineParameters, arm: str, seed: int, *, own: bool) -> None:
        arm, _, events = arm.partition(", ")
        self._own = own
        self.parameters, self.seed, self.seen = parameters, seed, Seen()
        self.engine = SimEngine(replace(parameters, kv_blocks=parameters.kv_blocks - 1))
        self.words = tokenizer_of(None)
        native = {Capability.CACHED_TOKENS, Capability.PRIORITY, Capability.WARM}
        can = {each: Support.NATIVE if each in native else Support.UNSUPPORTED for each in Capability}
        self.probe = Probe(
            capabilities=can,
            context_tokens=parameters.context_tokens,
            kv_tokens=parameters.kv_tokens,
            incarnation="1",
        )
        self.adapter = Warming(self.probe, self, Reports(self.engine) if events else None)
        backend, policy = Backend("e", "http://e/v1", engine="sim", max_concurrency=parameters.max_running), ARMS[arm]
        self._requests: dict[str, SimRequest] = {}
        self.virtual = VirtualServing[SimRequest](
            {backend: self.engine}, self._request, adapters={"e": self.adapter},
            memory="default" if policy is None else policy(), warm_up=None if policy is None else WarmUp(),
        )  # fmt: skip
        self._warms = 0

    @property
    def progress(self) -> Any:
        return self.virtual.serving.progress

    def dice(self, name: str) -> Random:
        """Return the dice of one part of the load: what others do must not change what it throws."""
        return Random(f"{self.seed} {name}")

    def _of(self, name: str, messages: Sequence[Message], answer: Sequence[str], priority: int = 0) -> SimRequest:
        prompt = self.words.prompt(messages)
        said = [token for piece in answer for token in self.words.encode(piece)[:1]]
        hashes = chain([*prompt, *said], self.parameters.block_tokens)
        return SimRequest(name, len(prompt), max(1, len(answer)), hashes, priority=priority)

    def _request(self, inflight: InFlightCall) -> SimRequest:
        inflight.sends({"messages": inflight.call.ask.messages})
        told = inflight.request_fields()["told"]
        return replace(self._requests[inflight.call.id], workflow=told.workflow)

    async def call(
        self, state: RunState, stage: str, messages: list[Message], answer_tokens: int, step: int
    ) -> tuple[Record, str]:
        """Make one call of a node, which is entered already."""
        services, answer = self.virtual.serving.services, prose(self.dice(f"{state.id} {step}"), answer_tokens)
        ask = Ask("auto", list(messages), stream=True, max_tokens=answer_tokens)
        inflight = arrive(
            services,
            Identity(state.workflow, state.id, stage, step, f"{stage}:{step}"),
            ask,
            call_id=services.new_id(),
        )
        self._requests[inflight.call.id] = self._of(inflight.call.id, messages, answer)
        return await self.virtual.serve(inflight), "".join(answer)

    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        self._warms += 1
        request = self._of(f"warm {self._warms}", body["messages"], [" a"], priority=10)
        event: Any = await self.virtual._drivers["e"].run(request.id, request, lambda: None)
        return Warmed(Effect.WARMED, Usage(event.prompt_tokens, event.cached_tokens, 1))

    async def crowd(self, busy: float, tokens: int, answer_tokens: int) -> None:
        """Others' calls, straight to the engine, as much as *busy* of its prefill; until cancelled."""
        if busy <= 0:
            return
        took_s = tokens * self.parameters.prefill_token_s + answer_tokens * self.parameters.decode_sequence_s
        dice = self.dice("crowd")
        async with asyncio.TaskGroup() as group:
            number = 0
            while True:
                await asyncio.sleep(dice.expovariate(busy / took_s))
                number += 1
                group.create_task(self._other(f"other {number}", tokens, answer_tokens))

    async def _other(self, name: str, tokens: int, answer_tokens: int) -> None:
        begin_s = self.virtual.clock()
        dice = self.dice(name)
        said = [{"role": "user", "content": text(dice, tokens)}]
        if self._own:
            state = self.progress.run_started(name, thread=None, graph="other")
            self.progress.node_entered(state, "other", "other:0", 0)
            await self.call(state, "other", said, answer_tokens, 0)
            self.progress.node_left(state, "other", "other:0")
            self.progress.run_ended(state.id, Outcome.DONE)
            self.seen.others_s.append(self.virtual.clock() - begin_s)
            return
        request = self._of(name, said, prose(dice, answer_tokens))
        await self.virtual._drivers["e"].run(request.id, request, lambda: None)
        self.seen.others_s.append(self.virtual.clock() - begin_s)

    def forget(self) -> None:
        """The engine comes back empty."""
        for value in self.engine.ownership.pool.all_known():
            self.engine.ownership.pool.forget(value)
        self.adapter._probe = replace(self.probe, incarnation="2")

    def run(self, main: Any, busy: float, tokens: int) -> Seen:
        async def whole() -> None:
            others = asyncio.create_task(self.crowd(busy, tokens, 32))
            begin_s = self.virtual.clock()
            await main(self)
            self.seen.makespan_s = self.virtual.clock() - begin_s
            others.cancel()

        with self.virtual as virtual:
            virtual.run(whole())
            said = virtual.serving.statistics().backends["e"].warm_ups
        self.seen.warmed, self.seen.used = said.warmed_tokens, said.used_tokens
        self.seen.started, self.seen.given_up = said.started, said.given_up
        self.seen.refused = said.refused
        return self.seen


async def tools(arena: Arena, tokens: int, wait_s: float) -> None:
    """Eight agents of six calls."""

    async def agent(number: int) -> None:
        await asyncio.sleep(number * wait_s / 4)
        begin_s, state = arena.virtual.clock(), arena.progress.run_started(f"a{number}", thread=None, graph="agent")
        dice = arena.dice(f"agent {number}")
        history: list[Message] = [{"role": "user", "content": text(dice, tokens)}]
        for at in range(6):
            arena.progress.node_entered(state, "think", f"think:{at}", at)
            record, answer = await arena.call(state, "think", history, 24, at)
            arena.progress.node_left(state, "think", f"think:{at}")
            if at:
                arena.seen.counted.append(record)
            history += [{"role": "assistant", "content": answer}, {"role": "user", "content": text(dice, 60)}]
            if at < 5:
                took_s = wait_s * dice.uniform(0.75, 1.25)
                arena.progress.node_entered(state, "tool", f"tool:{at}", at)
                arena.progress.tool_started(state, "tool", "look_up")
                await asyncio.sleep(took_s)
                arena.progress.tool_ended(state, "tool", "look_up", took_s)
                arena.progress.node_left(state, "tool", f"tool:{at}")
        arena.progress.run_ended(state.id, Outcome.DONE)
        arena.seen.took_s.append(arena.virtual.clock() - begin_s)

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(agent(number))


TWO_STAGES = GraphStructure({START: Edge(frozenset({"plan"})), "plan": Edge(frozenset({"order"})), "order": Edge()})


async def stages(arena: Arena, tokens: int, gap_s: float) -> None:
    """Sixteen runs of a plan and an order; the first four teach what the order begins with."""
    forecast = arena.virtual.serving.foresight.forecast("order", TWO_STAGES, {})
    rules_text, gaps = text(arena.dice("rules"), tokens), arena.dice("gaps")

    async def one(number: int) -> None:
        begin_s, state = (
            arena.virtual.clock(),
            arena.progress.run_started(f"s{number}", thread=None, forecast=forecast),
        )
        file = text(arena.dice(f"file {number}"), 60)
        for at, (stage, system, answer_tokens) in enumerate(
            (("plan", "You plan repairs.", 128), ("order", rules_text, 16))
        ):
            arena.progress.node_entered(state, stage, f"{stage}:{at}", at)
            said = [{"role": "system", "content": system}, {"role": "user", "content": file}]
            record, _ = await arena.call(state, stage, said, answer_tokens, at)
            arena.progress.node_left(state, stage, f"{stage}:{at}")
            if stage == "order" and number >= 4:
                arena.seen.counted.append(record)
        arena.progress.run_ended(state.id, Outcome.DONE)
        arena.seen.took_s.append(arena.virtual.clock() - begin_s)

    async with asyncio.TaskGroup() as group:
        for number in range(16):
            group.create_task(one(number))
            await asyncio.sleep(gaps.expovariate(1 / gap_s))


async def night(arena: Arena, tokens: int, prepare_s: float) -> None:
    """Eight threads interrupted, the engine restarted, the threads resumed some seconds after each other."""
    histories: dict[int, list[Message]] = {}
    gaps = arena.dice("gaps")
    for number in range(8):
        state = arena.progress.run_started(f"n{number}", thread=f"t{number}", graph="night")
        history = histories[number] = [{"role": "user", "content": text(arena.dice(f"night {number}"), tokens)}]
        arena.progress.node_entered(state, "first", "first:0", 0)
        _, answer = await arena.call(state, "first", history, 24, 0)
        arena.progress.node_left(state, "first", "first:0")
        history += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}]
        arena.progress.run_ended(state.id, Outcome.INTERRUPTED)
    arena.forget()
    await asyncio.sleep(60.0)

    async def resumed(number: int) -> None:
        begin_s = arena.virtual.clock()
        state = arena.progress.run_started(f"m{number}", thread=f"t{number}", graph="night")
        arena.progress.node_entered(state, "answer", "answer:1", 1)
        await asyncio.sleep(prepare_s)
        record, _ = await arena.call(state, "answer", histories[number], 24, 1)
        arena.progress.node_left(state, "answer", "answer:1")
        arena.progress.run_ended(state.id, Outcome.DONE)
        arena.seen.counted.append(record)
        arena.seen.took_s.append(arena.virtual.clock() - begin_s)

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(resumed(number))
            await asyncio.sleep(gaps.expovariate(1 / (2 * prepare_s)))


def ttfts(seen: Seen) -> list[float]:
    return [record.queue_wait_s + (record.ttft_s or 0.0) for record in seen.counted]


def lost(seen: Seen) -> float:
    return sum((record.prompt_tokens or 0) - (record.cached_tokens or 0) for record in seen.counted)


FIGURES: dict[str, tuple[Callable[[Seen], float], str]] = {
    "TTFT p50, s": (lambda seen: percentile(ttfts(seen), 0.5), ".3f"),
    "TTFT p95, s": (lambda seen: percentile(ttfts(seen), 0.95), ".3f"),
    "recomputed": (lost, ",.0f"),
    "run mean, s": (lambda seen: sum(seen.took_s) / len(seen.took_s), ".2f"),
    "makespan, s": (lambda seen: seen.makespan_s, ".1f"),
    "others' mean, s": (lambda seen: sum(seen.others_s) / max(1, len(seen.others_s)), ".3f"),
}
CASES: dict[str, tuple[Any, Sequence[float], int, Sequence[str]]] = {
    "tools": (tools, (2.0, 12.0), 5, ("none", "both", "both, events")),
    "stages": (stages, (6.0,), 4, ("none", "next stage", "next stage, events")),
    "night": (night, (0.5, 4.0), 20, ("none", "returns")),
}
"""What happens, its pace in seconds, for how many first prompts there is room, and the arms."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--situation", nargs="+", default=list(CASES), choices=CASES)
    options.add_argument("--engine", nargs="+", default=list(ENGINES), choices=ENGINES)
    options.add_argument("--busy", type=float, nargs="+", default=[0.0, 0.3])
    options.add_argument("--own", action="store_true", help="others' calls go through the core, too")
    args = options.parse_args()
    rows = []
    for name in args.situation:
        main_of, paces, room, arms = CASES[name]
        for engine in args.engine:
            parameters, tokens = ENGINES[engine]
            sized = replace(parameters, kv_blocks=room * tokens // 32)
            for pace in paces:
                for busy in args.busy:
                    found: dict[str, list[Seen]] = {arm: [] for arm in arms}
                    for seed in range(args.seeds):
                        for arm in arms:
                            tell(f"{name} {engine} {pace} {busy} seed {seed}: {arm}")
                            arena = Arena(sized, arm, seed, own=args.own)
                            found[arm].append(
                                arena.run(lambda at, pace=pace: main_of(at, tokens, pace), busy, tokens)
                            )
                    for arm, turns in found.items():
                        cells = []
                        for of, form in FIGURES.values():
                            middle = f"{median(map(of, turns)):{form}}"
                            if arm != arms[0]:
                                shares = [
                                    of(b) / of(a) if of(a) else 1.0
                                    for a, b in zip(found[arms[0]], turns, strict=True)
                                ]
                                middle += f" ×{median(shares):.2f} ({min(shares):.2f} … {max(shares):.2f})"
                            cells.append(middle)
                        tokens_said = [
                            sum(getattr(turn, each) for turn in turns)
                            for each in ("warmed", "used", "started", "given_up")
                        ]
                        tell(f"{name} {engine} {pace} {busy} {arm}: {[turn.refused for turn in turns]}", last=True)
                        rows.append(
                            [
                                name,
                                engine,
                                f"{pace:g} s",
                                f"{busy:.0%}",
                                arm,
                                *cells,
                                " / ".join(f"{each:,}" for each in tokens_said),
                            ]
                        )
    tell("done", last=True)
    print(
        "\n".join(
            table(
                ["situation", "engine", "pace", "busy", "arm", *FIGURES, "warmed / used / started / given up"], rows
            )
        )
    )


if __name__ == "__main__":
    main()
