"""What a mapping decision costs: microseconds of one call's step 2, for each mapper, on four backends.

    python -m bench.mapping.decision            about ten seconds
    python -m bench.mapping.decision -n 2000

``views`` is the picture of the backends that every mapper is shown; the others are what comes on top: asking the
mapper and checking its answer. Nothing waits and nothing is sent. The goal is 50 µs for an explicit table.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bench.lib.command import parser
from bench.lib.core import (
    NO_HINTS,
    Ask,
    Backend,
    BackendView,
    Background,
    Call,
    Capability,
    Consultation,
    Cost,
    Identity,
    Mapper,
    Probe,
    Serving,
    SettledCandidates,
    Speed,
    Support,
    assign,
    drive,
    memory_policy,
    policy,
)
from bench.lib.flags import count
from orla_lg.mappers import CostQualityMapper, ExplicitMapper, LoadAware, NeedMapper, StageTable
from orla_lg.openai_api.adapter import OpenAIAdapter

GOAL_US = 50.0
NAMES = ("light", "middle", "heavy", "spare")
SPEED = Speed(2.0, 3000.0, 60.0, 150.0)
TEXT = "My router blinks red and nothing helps. " * 25


def core() -> Serving:
    backends = [
        Backend(name, f"http://{name}/v1", "m", cost=Cost(price, 2 * price), quality=0.6 + 0.1 * price)
        for price, name in enumerate(NAMES)
    ]
    serving = Serving(
        {backend: OpenAIAdapter(backend) for backend in backends},
        mapper=None,
        stage_policy=policy("fcfs"),
        request_policy=policy("fcfs"),
        memory=memory_policy("default"),
    )
    for scheduler in serving.schedulers.values():
        scheduler.health.probe = Probe(("m",), dict.fromkeys(Capability, Support.NATIVE), context_tokens=32_768)
        scheduler.pace.speed = SPEED
    return serving


def a_call() -> Call:
    ask = Ask("auto", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": TEXT}])
    return Call("c", Identity("w", "r", "support|reply"), ask, NO_HINTS, NO_HINTS, 0.0)


def timed(rounds: int, prepare: Callable[[], Any], work: Callable[[Any], object]) -> list[float]:
    """Return the microseconds of each of *rounds* runs of *work* on what *prepare* gives."""
    took = []
    gc.disable()
    try:
        for _ in range(rounds):
            given = prepare()
            begin = time.perf_counter()
            work(given)
            took.append((time.perf_counter() - begin) * 1e6)
    finally:
        gc.enable()
    return took


def report(name: str, took: list[float]) -> float:
    took.sort()
    median = statistics.median(took)
    print(f"{name:<34} {median:8.1f} {took[int(len(took) * 0.99)]:8.1f}")
    return median


def saturated(views: list[BackendView]) -> list[BackendView]:
    busy = replace(views[2], waiting=9, in_flight=4, max_concurrency=4, resident=lambda: 400)
    return [*views[:2], busy, views[3]]


def main() -> int:
    options = parser("mapping.decision", __doc__)
    options.add_argument(
        "-n", type=count, default=20_000, metavar="ROUNDS", help="decisions per mapper (default 20000)"
    )
    rounds = options.parse_args().n
    serving, background = core(), Background()
    consultation = Consultation(background, lambda *asked: iter(()))  # type: ignore[arg-type,return-value]
    table = {"classify": "light", "support|reply": ["heavy", "spare"], "*": "middle"}
    explicit = ExplicitMapper(table)
    seen = serving.views(a_call())
    mappers: list[tuple[str, Mapper, list[BackendView]]] = [
        ("explicit", explicit, seen),
        ("explicit, with parameters", ExplicitMapper({"*": {"to": "heavy", "temperature": 0}}), seen),
        ("table of mappers, by name", StageTable({**table, "plan": NeedMapper(["tools"])}), seen),
        ("need", NeedMapper(["tools", "context>16k"], "cheapest"), seen),
        ("load-aware, home has room", LoadAware(explicit), seen),
        ("load-aware, home is saturated", LoadAware(explicit), saturated(seen)),
        ("cost and quality, strict", CostQualityMapper(0.75, default="strict"), seen),
        ("cost and quality, prefer", CostQualityMapper(0.75), seen),
    ]
    print(f"{'µs of one decision, 4 backends':<34} {'median':>8} {'p99':>8}")
    report("views", timed(rounds, lambda: None, lambda _: serving.views(a_call())))
    medians = {}
    for name, mapper, views in mappers:
        given = timed(
            rounds,
            a_call,
            lambda call, m=mapper, v=views: drive(assign(call, (m,), SettledCandidates(v), consultation)),
        )
        medians[name] = report(name, given)
    serving.close()
    print(f"goal: explicit in {GOAL_US:g} µs: {'met' if medians['explicit'] <= GOAL_US else 'MISSED'}")
    return 0 if medians["explicit"] <= GOAL_US else 1


if __name__ == "__main__":
    sys.exit(main())
