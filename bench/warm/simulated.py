"""Warm-ups against none in virtual time, on simulated engines: in tool waits, before a next stage, after a night.

    python -m bench.warm.simulated                                  all of it, some minutes
    python -m bench.warm.simulated --situation stages --foreign     others' calls do not go through the core

    tools    eight agents call, wait for a tool, and call again, where there is room for five
    stages   a plan, then an order whose prompt begins with long rules, the same for all
    night    threads are interrupted, the engine loses everything, the threads are resumed; the node's own code takes
             some seconds between resume and call

Engines are a small model on two CPU cores, and one as on a GPU (prefill of 20,000 tokens/s). *Busy* is how much of
the engine's time others take, who push out what is cached. Cells are medians over the seeds; behind × what they are
of the arm without warm-ups, seed by seed, with the extremes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from statistics import median
from typing import Any

from bench.lib.command import parser
from bench.lib.core import (
    START,
    Ask,
    Backend,
    Capability,
    Edge,
    Effect,
    EngineStats,
    GraphProgress,
    GraphStructure,
    Identity,
    InFlightCall,
    Outcome,
    Probe,
    Record,
    RunState,
    Support,
    Usage,
    Warmed,
    WarmUp,
    arrive,
)
from bench.lib.figures import percentile, ratios, spread, table
from bench.lib.flags import count, share
from bench.lib.progress import tell
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


class Warming(StillAdapter):
    """An engine that can be asked to prefill, and how busy it is."""

    def __init__(
        self, probe: Probe, engine: SimEngine, warm: Callable[[Mapping[str, Any]], Coroutine[Any, Any, Warmed]]
    ) -> None:
        super().__init__(probe)
        self._engine = engine
        self.warm = warm

    async def stats(self) -> EngineStats:
        state = self._engine.state()
        return EngineStats(running=state.running, waiting=state.waiting, kv_usage=state.kv_usage)

    def restarted(self, probe: Probe) -> None:
        self._probe = probe


@dataclass
class Seen:
    """One turn."""

    counted: list[Record] = field(default_factory=list)
    makespan_s: float = 0.0
    took_s: list[float] = field(default_factory=list)
    others_s: list[float] = field(default_factory=list)
    warmed: int = 0
    used: int = 0
    given_up: int = 0


class Arena:
    """A core, an engine, and others that use it."""

    def __init__(self, parameters: EngineParameters, seed: int, *, warm_up: bool, foreign: bool) -> None:
        self._foreign = foreign
        self.parameters, self.seed, self.seen = parameters, seed, Seen()
        self.engine = SimEngine(replace(parameters, kv_blocks=parameters.kv_blocks - 1))
        self.words = tokenizer_of(None)
        native = {Capability.CACHED_TOKENS, Capability.PRIORITY, Capability.WARM, Capability.STATS}
        can = {each: Support.NATIVE if each in native else Support.UNSUPPORTED for each in Capability}
        self.probe = Probe(
            capabilities=can,
            context_tokens=parameters.context_tokens,
            kv_tokens=parameters.kv_tokens,
            incarnation="1",
        )
        self.adapter = Warming(self.probe, self.engine, self.warm)
        backend = Backend("e", "http://e/v1", engine="sim", max_concurrency=parameters.max_running)
        self._requests: dict[str, SimRequest] = {}
        self.virtual = VirtualServing[SimRequest](
            {backend: self.engine}, self._request, adapters={"e": self.adapter},
            warm_up=WarmUp() if warm_up else None,
        )  # fmt: skip
        self._warms = 0

    @property
    def progress(self) -> GraphProgress:
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
        inflight.request_fields()
        return self._requests[inflight.call.id]

    async def call(
        self, state: RunState, stage: str, messages: list[Message], answer_tokens: int, step: int
    ) -> tuple[Record, str]:
        """Make one call of a node, which is entered already."""
        services, answer = self.virtual.serving.services, prose(self.dice(f"{state.id} {step}"), answer_tokens)
        ask = Ask("auto", list(messages), stream=True, max_tokens=answer_tokens)
        identity = Identity(state.workflow, state.id, stage, step, f"{stage}:{step}")
        inflight = arrive(services, identity, ask, call_id=services.new_id())
        self._requests[inflight.call.id] = self._of(inflight.call.id, messages, answer)
        return await self.virtual.serve(inflight), "".join(answer)

    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        self._warms += 1
        request = self._of(f"warm {self._warms}", body["messages"], [" a"], priority=10)
        event: Any = await self.virtual._drivers["e"].run(request.id, request, lambda: None)
        return Warmed(Effect.WARMED, Usage(event.prompt_tokens, event.cached_tokens, 1))

    async def crowd(self, busy: float, tokens: int, answer_tokens: int) -> None:
        """Make others' calls, as much as *busy* of the engine's prefill; until cancelled."""
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
        if self._foreign:
            request = self._of(name, said, prose(dice, answer_tokens))
            await self.virtual._drivers["e"].run(request.id, request, lambda: None)
        else:
            state = self.progress.run_started(name, thread=None, graph="other")
            await self.call(state, "other", said, answer_tokens, 0)
            self.progress.run_ended(state.id, Outcome.DONE)
        self.seen.others_s.append(self.virtual.clock() - begin_s)

    def forget(self) -> None:
        """The engine comes back empty."""
        for value in self.engine.ownership.pool.all_known():
            self.engine.ownership.pool.forget(value)
        self.adapter.restarted(replace(self.probe, incarnation="2"))

    def run(self, main: Coroutine[Any, Any, None], busy: float, tokens: int) -> Seen:
        async def whole() -> None:
            begin_s = self.virtual.clock()
            async with asyncio.TaskGroup() as group:
                others = group.create_task(self.crowd(busy, tokens, 32))
                await main
                self.seen.makespan_s = self.virtual.clock() - begin_s
                others.cancel()

        with self.virtual as virtual:
            virtual.run(whole())
            said = virtual.serving.statistics().backends["e"].warm_ups
        self.seen.warmed, self.seen.used, self.seen.given_up = said.warmed_tokens, said.used_tokens, said.given_up
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
        begin_s = arena.virtual.clock()
        state = arena.progress.run_started(f"s{number}", thread=None, forecast=forecast)
        file = text(arena.dice(f"file {number}"), 60)
        two = (("plan", "You plan repairs.", 128), ("order", rules_text, 16))
        for at, (stage, system, answer_tokens) in enumerate(two):
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


@dataclass(frozen=True, slots=True)
class Situation:
    """What happens, at which paces in seconds, and for how many first prompts there is room."""

    play: Callable[[Arena, int, float], Coroutine[Any, Any, None]]
    paces_s: Sequence[float]
    room: int


SITUATIONS = {
    "tools": Situation(tools, (2.0, 12.0), 5),
    "stages": Situation(stages, (6.0,), 4),
    "night": Situation(night, (0.5, 4.0), 20),
}


def turn(name: str, engine: str, pace_s: float, busy: float, seed: int, *, warm_up: bool, foreign: bool) -> Seen:
    """Run one arm of a situation."""
    situation, (parameters, tokens) = SITUATIONS[name], ENGINES[engine]
    sized = replace(parameters, kv_blocks=situation.room * tokens // parameters.block_tokens)
    arena = Arena(sized, seed, warm_up=warm_up, foreign=foreign)
    return arena.run(situation.play(arena, tokens, pace_s), busy, tokens)


def rows(where: Sequence[str], without: Sequence[Seen], with_them: Sequence[Seen]) -> list[list[str]]:
    """Return a row for each arm."""
    plain, warmed = list[str](), list[str]()
    for of, form in FIGURES.values():
        before, after = [of(seen) for seen in without], [of(seen) for seen in with_them]
        plain.append(f"{median(before):{form}}")
        warmed.append(f"{median(after):{form}} ×{spread(ratios(after, before)).shown()}")
    used = " / ".join(
        f"{sum(getattr(seen, each) for seen in with_them):,}" for each in ("warmed", "used", "given_up")
    )
    return [[*where, "none", *plain, "–"], ["", "", "", "", "warm-ups", *warmed, used]]


def main() -> None:
    options = parser("warm.simulated", __doc__)
    add = options.add_argument
    add(
        "--situation",
        nargs="+",
        default=list(SITUATIONS),
        choices=SITUATIONS,
        metavar="NAME",
        help="tools, stages, night",
    )
    add("--engine", nargs="+", default=list(ENGINES), choices=ENGINES, metavar="NAME", help="cpu, gpu")
    add("--busy", type=share, nargs="+", default=[0.0, 0.3], metavar="SHARE", help="by others (0 and 0.3)")
    add("--foreign", action="store_true", help="others' calls go straight to the engine")
    add("--seeds", type=count, default=5, help="loads drawn (5)")
    args = options.parse_args()
    found = list[list[str]]()
    for name in args.situation:
        for engine, pace_s, busy in itertools.product(args.engine, SITUATIONS[name].paces_s, args.busy):
            seen: dict[bool, list[Seen]] = {False: [], True: []}
            for seed in range(args.seeds):
                for warm_up in seen:
                    tell(f"{name}, {engine}, {pace_s:g} s, busy {busy:.0%}, seed {seed}, warm-ups {warm_up}")
                    seen[warm_up].append(
                        turn(name, engine, pace_s, busy, seed, warm_up=warm_up, foreign=args.foreign)
                    )
            found += rows([name, engine, f"{pace_s:g} s", f"{busy:.0%}"], seen[False], seen[True])
    tell("simulated", last=True)
    head = ["situation", "engine", "pace", "busy", "arm", *FIGURES, "warmed / used / given up"]
    print("\n".join(table(head, found)))


if __name__ == "__main__":
    main()
