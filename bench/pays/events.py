"""KV events against ``cached_tokens`` alone: what a core believes of an engine's cache that others use too.

    python -m bench.pays.events                      all of it, some minutes
    python -m bench.pays.events --seeds 2 --clients orla+foreign

Sessions of five calls (those of ``bench/pressure``) share one or two simulated engines. They belong to one core, to
two cores that do not know of each other, or in part to clients without any (*foreign*). With events, every core reads
each engine's stream of stored and removed blocks; without, answers are all that it learns from.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from bench.lib.calls import Turn, makespan_s, recomputed, ttfts_s
from bench.lib.core import Backend, Capability, InFlightCall, Probe, Serving, Support, memory_policy
from bench.lib.engines import Message
from bench.lib.figures import at_rank, percentile, table
from bench.lib.progress import tell
from bench.pressure.arms import Arm
from bench.pressure.simulated import PLAIN, Direct, Served, SimulatedTurns, Wrapped
from bench.pressure.workflows import Load, LocalWords, Shape, load_of, made_up
from orla_lg.core.engine.capabilities import BlocksRemoved, BlocksStored, KVEvent
from orla_lg.mappers import LoadAware
from orla_lg.testing.virtual import EngineDriver, StillAdapter, VirtualBackground, VirtualServing
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest
from orla_lg_sim.text import tokenizer_of

DELAY_S = 0.01
"""Between what happens in an engine and its report."""

CLIENTS = {
    "one orla": ("orla",),
    "orla+foreign": ("orla", "foreign"),
    "two orlas": ("orla", "orla"),
    "two orlas+foreign": ("orla", "orla", "foreign"),
}


class Reports:
    """What one engine reports, to all that listen."""

    def __init__(self, engine: SimEngine) -> None:
        self.listeners: list[asyncio.Queue[KVEvent]] = []
        scheduler, pool = engine.scheduler, engine.ownership.pool
        named, unname = scheduler._name_full, pool._unname

        def name_full(member: Any, full: int) -> None:
            start = member.named
            named(member, full)
            if full > start:
                hashes = [scheduler._hash(member, at) for at in range(start, full)]
                parent = scheduler._hash(member, start - 1) if start else None
                self._tell(BlocksStored(hashes, parent, engine.parameters.block_tokens, member.request.workflow))

        def forgotten(block: int) -> None:
            value = pool._hash[block]
            unname(block)
            self._tell(BlocksRemoved([value]))

        scheduler._name_full, pool._unname = name_full, forgotten  # type: ignore[method-assign]

    def _tell(self, event: KVEvent) -> None:
        for listener in self.listeners:
            asyncio.get_running_loop().call_later(DELAY_S, listener.put_nowait, event)


class Telling(StillAdapter):
    """An adapter whose engine reports."""

    def __init__(self, probe: Probe, reports: Reports | None) -> None:
        super().__init__(probe)
        self._reports = reports

    def kv_events(self) -> AsyncGenerator[Sequence[KVEvent]] | None:
        return None if self._reports is None else self._listen()

    async def _listen(self) -> AsyncGenerator[Sequence[KVEvent]]:
        heard = asyncio.Queue[KVEvent]()
        assert self._reports is not None
        self._reports.listeners.append(heard)
        while True:
            yield [await heard.get()]


class Beside(VirtualServing[SimRequest]):
    """Another core before the engines of a first one."""

    def __init__(
        self, first: VirtualServing[SimRequest], request_of: Callable[[InFlightCall], SimRequest], **options: Any
    ) -> None:
        self.clock, self._runner, self._drivers, self._request_of = (
            first.clock,
            first._runner,
            first._drivers,
            request_of,
        )
        self.serving = Serving(
            options["adapters"],
            mapper=options["mapper"],
            memory=memory_policy("default"),
            clock=self.clock,
            background=VirtualBackground(first._runner.get_loop()),  # type: ignore[arg-type]
        )

    def close(self) -> None:
        self.serving.close()


class Foreign(Direct):
    """Calls without any core, in turn to each engine."""

    def __init__(self, drivers: Sequence[EngineDriver[SimRequest]], clock: Any) -> None:
        self.clock = clock
        self._drivers = drivers

    async def ask(self, session: int, messages: Sequence[Message], request: SimRequest) -> Served:
        first_s: list[float] = []
        driver = self._drivers[session % len(self._drivers)]
        event = await driver.run(request.id, request, lambda: first_s.append(self.clock()))
        return Served(first_s[0], event.cached_tokens)


class Lines(Direct):
    """Sessions of several clients, in turn."""

    def __init__(self, lines: Sequence[Direct]) -> None:
        self.clock = lines[0].clock
        self._lines = lines

    def of(self, session: int) -> Direct:
        return self._lines[session % len(self._lines)]

    def begin(self, session: int) -> None:
        self.of(session).begin(session)

    async def ask(self, session: int, messages: Sequence[Message], request: SimRequest) -> Served:
        return await self.of(session).ask(session, messages, request)

    async def use_tool(self, session: int, wait_s: float) -> None:
        await self.of(session).use_tool(session, wait_s)

    def end(self, session: int) -> None:
        self.of(session).end(session)


@dataclass(frozen=True, slots=True)
class Seen:
    """One turn."""

    claimed: int
    verified: int
    wrong: int
    """What calls found, and what was believed that they would, apart: summed over calls."""
    found: int
    """Of all prompts of the cores, in the cache."""
    refuted: int
    recomputed: int
    makespan_s: float
    mean_s: float
    """A session's completion, on the mean."""
    p95_s: float
    ttft_s: float


class SharedTurns(SimulatedTurns):
    """Several clients on one or two engines."""

    def shared(self, load: Load, clients: Sequence[str], engines: int, *, events: bool) -> Seen:
        made = Turn("events" if events else "answers", load.seed, load.shared_tokens, [], [])
        blocks = (self.parameters.kv_blocks - 1) // engines
        at = {
            Backend(f"e{n}", f"http://e{n}/v1"): SimEngine(replace(self.parameters, kv_blocks=blocks))
            for n in range(engines)
        }
        reports = {backend.name: Reports(engine) for backend, engine in at.items()}
        native = {each: Support.NATIVE if each in PLAIN else Support.UNSUPPORTED for each in Capability}
        probe = Probe(
            capabilities=native,
            context_tokens=self.parameters.context_tokens,
            kv_tokens=blocks * self.parameters.block_tokens,
        )
        mapper = LoadAware({"*": [backend.name for backend in at]}) if engines > 1 else None
        virtuals: list[VirtualServing[SimRequest]] = []
        lines: list[Direct] = []
        for client in clients:
            if client == "foreign":
                lines.append(Foreign(list(virtuals[0]._drivers.values()), virtuals[0].clock))
                continue
            requests: dict[str, SimRequest] = {}

            def request_of(inflight: InFlightCall, requests: dict[str, SimRequest] = requests) -> SimRequest:
                told = inflight.request_fields()["told"]
                return replace(requests[inflight.call.id], workflow=told.workflow)

            adapters = {name: Telling(probe, each if events else None) for name, each in reports.items()}
            if virtuals:
                beside = {backend: adapters[backend.name] for backend in at}
                virtuals.append(Beside(virtuals[0], request_of, adapters=beside, mapper=mapper))
            else:
                virtuals.append(VirtualServing(at, request_of, adapters=adapters, mapper=mapper))
            lines.append(Wrapped(virtuals[-1], requests))
        virtuals[0].run(self._sessions(Lines(lines), Arm(made.arm), load, made))
        said = [each.memory.truth for virtual in virtuals for each in virtual.serving.statistics().backends.values()]
        records = [record for virtual in virtuals for record in virtual.serving.records.records()]
        wrong = sum(abs((each.expected_cached_tokens or 0) - (each.cached_tokens or 0)) for each in records)
        ours = [call for call in made.calls if clients[call.session % len(clients)] == "orla"]
        for virtual in reversed(virtuals):
            virtual.close()
        took = [job.ended_s - job.arrived_s for job in made.jobs if clients[job.session % len(clients)] == "orla"]
        return Seen(
            sum(each.claimed_tokens for each in said), sum(each.verified_tokens for each in said), wrong,
            sum(call.cached_tokens for call in ours), sum(sum(each.refuted.values()) for each in said),
            recomputed(made.calls), makespan_s(made.jobs), sum(took) / len(took), at_rank(took, 0.95),
            percentile(ttfts_s(ours), 0.5),
        )  # fmt: skip


FIGURES: dict[str, tuple[Callable[[Seen], float], str]] = {
    "claimed, verified": (lambda seen: seen.verified / max(1, seen.claimed), ".1%"),
    "found, claimed": (lambda seen: min(1.0, seen.verified / max(1, seen.found)), ".1%"),
    "wrong by": (lambda seen: seen.wrong / max(1, seen.found), ".1%"),
    "refuted": (lambda seen: seen.refuted, ".0f"),
    "recomputed": (lambda seen: seen.recomputed, ",.0f"),
    "makespan, s": (lambda seen: seen.makespan_s, ".1f"),
    "session mean, s": (lambda seen: seen.mean_s, ".2f"),
    "session p95, s": (lambda seen: seen.p95_s, ".2f"),
    "TTFT p50, s": (lambda seen: seen.ttft_s, ".2f"),
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=6)
    options.add_argument("--sessions", type=int, default=18)
    options.add_argument("--blocks", type=int, nargs="+", default=[240, 480])
    options.add_argument("--engines", type=int, nargs="+", default=[1, 2])
    options.add_argument("--clients", nargs="+", default=list(CLIENTS), choices=CLIENTS)
    args = options.parse_args()
    words, rows = LocalWords(tokenizer_of(None)), []
    shape = replace(Shape(), sessions=args.sessions)
    material = made_up(args.sessions, shape.history_tokens)
    for engines in args.engines:
        for blocks in args.blocks:
            turns = SharedTurns(replace(EngineParameters(), kv_blocks=blocks, block_tokens=32), words)
            for name in args.clients:
                seen: dict[bool, list[Seen]] = {False: [], True: []}
                for seed in range(args.seeds):
                    load = load_of(material, shape, words, seed)
                    for events in (False, True):
                        tell(f"{engines} engines, {blocks} blocks, {name}, seed {seed}, events {events}")
                        seen[events].append(turns.shared(load, CLIENTS[name], engines, events=events))
                rows.append(
                    [
                        str(engines),
                        str(blocks),
                        name,
                        "answers",
                        *(f"{median(map(of, seen[False])):{form}}" for of, form in FIGURES.values()),
                    ]
                )
                pairs = [
                    [of(b) - of(a) for a, b in zip(seen[False], seen[True], strict=True)]
                    for of, _ in FIGURES.values()
                ]
                said = [
                    f"{median(map(of, seen[True])):{form}} ({min(pair):+{form}} … {max(pair):+{form}})"
                    for pair, (of, form) in zip(pairs, FIGURES.values(), strict=True)
                ]
                rows.append(["", "", "", "events", *said])
    tell("done", last=True)
    print("\n".join(table(["engines", "blocks", "clients", "by", *FIGURES], rows)))


if __name__ == "__main__":
    main()
