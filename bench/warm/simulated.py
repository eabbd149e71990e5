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

from bench.lib import core
from bench.lib.command import parser, tell
from bench.lib.figures import percentile, ratios, spread, table
from bench.lib.flags import count, share
from bench.lib.virtual import PLAIN, Runs, probe_of, request_of
from orla_lg.testing.virtual import StillAdapter
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
NATIVE = (*PLAIN, core.Capability.WARM, core.Capability.STATS)

Message = dict[str, str]


def text(dice: Random, tokens: int) -> str:
    return "".join(prose(dice, max(1, tokens)))


def says(role: str, content: str) -> Message:
    return {"role": role, "content": content}


class Warming(StillAdapter):
    """An engine that can be asked to prefill, and how busy it is."""

    def __init__(
        self,
        probe: core.Probe,
        engine: SimEngine,
        warm: Callable[[Mapping[str, Any]], Coroutine[Any, Any, core.Warmed]],
    ) -> None:
        super().__init__(probe)
        self._engine, self.warm = engine, warm

    async def stats(self) -> core.EngineStats:
        state = self._engine.state()
        return core.EngineStats(running=state.running, waiting=state.waiting, kv_usage=state.kv_usage)

    def restarted(self, probe: core.Probe) -> None:
        self._probe = probe


@dataclass
class Seen:
    """One turn."""

    counted: list[core.Record] = field(default_factory=list)
    makespan_s: float = 0.0
    took_s: list[float] = field(default_factory=list)
    others_s: list[float] = field(default_factory=list)
    warmed: int = 0
    used: int = 0
    given_up: int = 0


class Arena:
    """A core, an engine, and others that use it."""

    def __init__(self, parameters: EngineParameters, seed: int, *, warm_up: bool, foreign: bool) -> None:
        self._foreign, self.parameters, self.seed, self.seen = foreign, parameters, seed, Seen()
        self.engine, self.words = (
            SimEngine(replace(parameters, kv_blocks=parameters.kv_blocks - 1)),
            tokenizer_of(None),
        )
        self._adapter = Warming(probe_of(parameters, NATIVE, "1"), self.engine, self.warm)
        self.runs = Runs(
            core.Backend("e", "http://e/v1", engine="sim", max_concurrency=parameters.max_running), self.engine,
            adapter=self._adapter, sent=self._sent, warm_up=core.WarmUp() if warm_up else None,
        )  # fmt: skip
        self.clock, self._numbers = self.runs.clock, itertools.count(1)

    def dice(self, name: str) -> Random:
        """Return the dice of one part of the load: what others do must not change what it throws."""
        return Random(f"{self.seed} {name}")

    def _of(self, name: str, messages: Sequence[Message], answer: Sequence[str], priority: int = 0) -> SimRequest:
        return request_of(self.words, name, messages, answer, self.parameters.block_tokens, priority)

    @staticmethod
    def _sent(inflight: core.InFlightCall, request: SimRequest) -> SimRequest:
        inflight.sends({"messages": inflight.call.ask.messages})
        inflight.request_fields()
        return request

    async def call(
        self, state: core.RunState, stage: str, messages: list[Message], answer_tokens: int, step: int
    ) -> tuple[core.Record, str]:
        """Make one call of a node, which is entered already."""
        answer = prose(self.dice(f"{state.id} {step}"), answer_tokens)
        ask = core.Ask("auto", list(messages), stream=True, max_tokens=answer_tokens)
        request = self._of(f"call {next(self._numbers)}", messages, answer)
        record = await self.runs.call(state, stage, ask, request, step=step, namespace=f"{stage}:{step}")
        return record, "".join(answer)

    async def in_node(
        self,
        state: core.RunState,
        stage: str,
        messages: list[Message],
        answer_tokens: int,
        step: int,
        own_s: float = 0.0,
    ) -> tuple[core.Record, str]:
        """Enter a node, run its own code for a while, and make its one call."""
        with self.runs.node(state, stage, f"{stage}:{step}", step):
            if own_s:
                await asyncio.sleep(own_s)
            return await self.call(state, stage, messages, answer_tokens, step)

    def ended(self, state: core.RunState, begin_s: float) -> None:
        self.runs.end(state)
        self.seen.took_s.append(self.clock() - begin_s)

    async def warm(self, body: Mapping[str, Any]) -> core.Warmed:
        request = self._of(f"warm {next(self._numbers)}", body["messages"], [" a"], priority=10)
        event: Any = await self._run(request)
        return core.Warmed(core.Effect.WARMED, core.Usage(event.prompt_tokens, event.cached_tokens, 1))

    async def _run(self, request: SimRequest) -> Any:
        return await self.runs.virtual._drivers["e"].run(request.id, request, lambda: None)

    async def crowd(self, busy: float, tokens: int, answer_tokens: int) -> None:
        """Make others' calls, as much as *busy* of the engine's prefill; until cancelled."""
        if busy <= 0:
            return
        took_s = tokens * self.parameters.prefill_token_s + answer_tokens * self.parameters.decode_sequence_s
        dice = self.dice("crowd")
        async with asyncio.TaskGroup() as group:
            for number in itertools.count(1):
                await asyncio.sleep(dice.expovariate(busy / took_s))
                group.create_task(self._other(f"other {number}", tokens, answer_tokens))

    async def _other(self, name: str, tokens: int, answer_tokens: int) -> None:
        begin_s, dice = self.clock(), self.dice(name)
        said = [says("user", text(dice, tokens))]
        if self._foreign:
            await self._run(self._of(name, said, prose(dice, answer_tokens)))
        else:
            state = self.runs.begin(name, graph="other")
            await self.call(state, "other", said, answer_tokens, 0)
            self.runs.end(state)
        self.seen.others_s.append(self.clock() - begin_s)

    def forget(self) -> None:
        """The engine comes back empty."""
        for value in self.engine.ownership.pool.all_known():
            self.engine.ownership.pool.forget(value)
        self._adapter.restarted(probe_of(self.parameters, NATIVE, "2"))

    def run(self, main: Coroutine[Any, Any, None], busy: float, tokens: int) -> Seen:
        async def whole() -> None:
            begin_s = self.clock()
            async with asyncio.TaskGroup() as group:
                others = group.create_task(self.crowd(busy, tokens, 32))
                await main
                self.seen.makespan_s = self.clock() - begin_s
                others.cancel()

        with self.runs.virtual as virtual:
            virtual.run(whole())
            found = virtual.serving.statistics().backends["e"].warm_ups
        return replace(self.seen, warmed=found.warmed_tokens, used=found.used_tokens, given_up=found.given_up)


async def arriving(count: int, one: Callable[[int], Coroutine[Any, Any, None]], gap_s: Callable[[], float]) -> None:
    """Let *count* of them begin, with a gap after each."""
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(one(number))
            await asyncio.sleep(gap_s())


async def tools(arena: Arena, tokens: int, wait_s: float) -> None:
    """Eight agents of six calls."""

    async def agent(number: int) -> None:
        await asyncio.sleep(number * wait_s / 4)
        begin_s, state = arena.clock(), arena.runs.begin(f"a{number}", graph="agent")
        dice = arena.dice(f"agent {number}")
        history = [says("user", text(dice, tokens))]
        for at in range(6):
            record, answer = await arena.in_node(state, "think", history, 24, at)
            if at:
                arena.seen.counted.append(record)
            history += [says("assistant", answer), says("user", text(dice, 60))]
            if at < 5:
                took_s = wait_s * dice.uniform(0.75, 1.25)
                with arena.runs.node(state, "tool", f"tool:{at}", at):
                    arena.runs.progress.tool_started(state, "tool", "look_up")
                    await asyncio.sleep(took_s)
                    arena.runs.progress.tool_ended(state, "tool", "look_up", took_s)
        arena.ended(state, begin_s)

    await arriving(8, agent, lambda: 0.0)


TWO_STAGES = core.GraphStructure(
    {core.START: core.Edge(frozenset({"plan"})), "plan": core.Edge(frozenset({"order"})), "order": core.Edge()}
)


async def stages(arena: Arena, tokens: int, gap_s: float) -> None:
    """Sixteen runs of a plan and an order; the first four teach what the order begins with."""
    forecast = arena.runs.virtual.serving.lookahead.forecast("order", TWO_STAGES, {})
    rules_text, gaps = text(arena.dice("rules"), tokens), arena.dice("gaps")

    async def one(number: int) -> None:
        begin_s, state = arena.clock(), arena.runs.begin(f"s{number}", forecast=forecast)
        file = text(arena.dice(f"file {number}"), 60)
        two = (("plan", "You plan repairs.", 128), ("order", rules_text, 16))
        for at, (stage, system, answer_tokens) in enumerate(two):
            said = [says("system", system), says("user", file)]
            record, _ = await arena.in_node(state, stage, said, answer_tokens, at)
            if stage == "order" and number >= 4:
                arena.seen.counted.append(record)
        arena.ended(state, begin_s)

    await arriving(16, one, lambda: gaps.expovariate(1 / gap_s))


async def night(arena: Arena, tokens: int, prepare_s: float) -> None:
    """Eight threads interrupted, the engine restarted, the threads resumed some seconds after each other."""
    histories: dict[int, list[Message]] = {}
    gaps = arena.dice("gaps")
    for number in range(8):
        state = arena.runs.begin(f"n{number}", thread=f"t{number}", graph="night")
        history = histories[number] = [says("user", text(arena.dice(f"night {number}"), tokens))]
        _, answer = await arena.in_node(state, "first", history, 24, 0)
        history += [says("assistant", answer), says("user", "Go on.")]
        arena.runs.end(state, core.Outcome.INTERRUPTED)
    arena.forget()
    await asyncio.sleep(60.0)

    async def resumed(number: int) -> None:
        begin_s, state = arena.clock(), arena.runs.begin(f"m{number}", thread=f"t{number}", graph="night")
        record, _ = await arena.in_node(state, "answer", histories[number], 24, 1, prepare_s)
        arena.seen.counted.append(record)
        arena.ended(state, begin_s)

    await arriving(8, resumed, lambda: gaps.expovariate(1 / (2 * prepare_s)))


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
Play = Callable[[Arena, int, float], Coroutine[Any, Any, None]]
SITUATIONS: dict[str, tuple[Play, tuple[float, ...], int]] = {
    "tools": (tools, (2.0, 12.0), 5),
    "stages": (stages, (6.0,), 4),
    "night": (night, (0.5, 4.0), 20),
}
"""What happens, at which paces in seconds, and for how many first prompts there is room."""


def turn(name: str, engine: str, pace_s: float, busy: float, seed: int, *, warm_up: bool, foreign: bool) -> Seen:
    """Run one arm of a situation."""
    (play, _, room), (parameters, tokens) = SITUATIONS[name], ENGINES[engine]
    sized = replace(parameters, kv_blocks=room * tokens // parameters.block_tokens)
    arena = Arena(sized, seed, warm_up=warm_up, foreign=foreign)
    return arena.run(play(arena, tokens, pace_s), busy, tokens)


def rows(where: Sequence[str], without: Sequence[Seen], with_them: Sequence[Seen]) -> list[list[str]]:
    """Return a row for each arm."""
    plain, warmed = list[str](), list[str]()
    for of, form in FIGURES.values():
        before, after = [of(seen) for seen in without], [of(seen) for seen in with_them]
        plain.append(f"{median(before):{form}}")
        warmed.append(f"{median(after):{form}} ×{spread(ratios(after, before)).shown()}")
    sums = (sum(getattr(seen, each) for seen in with_them) for each in ("warmed", "used", "given_up"))
    used = " / ".join(f"{each:,}" for each in sums)
    return [[*where, "none", *plain, "–"], ["", "", "", "", "warm-ups", *warmed, used]]


def main() -> None:
    options = parser("warm.simulated", __doc__)
    add, names = options.add_argument, list(SITUATIONS)
    add("--situation", nargs="+", default=names, choices=names, metavar="NAME", help="tools, stages, night")
    add("--engine", nargs="+", default=list(ENGINES), choices=ENGINES, metavar="NAME", help="cpu, gpu")
    add("--busy", type=share, nargs="+", default=[0.0, 0.3], metavar="SHARE", help="by others (0 and 0.3)")
    add("--foreign", action="store_true", help="others' calls go straight to the engine")
    add("--seeds", type=count, default=5, help="loads drawn (5)")
    args = options.parse_args()
    found = list[list[str]]()
    for name in args.situation:
        for engine, pace_s, busy in itertools.product(args.engine, SITUATIONS[name][1], args.busy):
            tell(f"{name}, {engine}, {pace_s:g} s, busy {busy:.0%}")
            without, with_them = (
                [turn(name, engine, pace_s, busy, seed, warm_up=warm_up, foreign=args.foreign)
                 for seed in range(args.seeds)]
                for warm_up in (False, True)
            )  # fmt: skip
            found += rows([name, engine, f"{pace_s:g} s", f"{busy:.0%}"], without, with_them)
    tell("simulated", last=True)
    head = ["situation", "engine", "pace", "busy", "arm", *FIGURES, "warmed / used / given up"]
    print("\n".join(table(head, found)))


if __name__ == "__main__":
    main()
