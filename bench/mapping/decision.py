"""What a mapping decision costs: microseconds of one call's step 2, for each mapper, on four backends.

    make bench-mapping-decision                 a minute
    python -m bench.mapping.decision -n 2000

``views`` is the picture of the backends that every mapper is shown; the others are what comes on top: asking the
mapper and checking its answer. Nothing waits and nothing is sent. Goals, as medians: 50 µs for an explicit table, and
300 µs for the learned mapper at 500 characters, with every weight in use or with a model of your own (--model).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace

from bench.lib import core
from bench.lib.command import parser
from bench.lib.core import NO_HINTS, Ask, Backend, BackendView, Call, Cost, Identity, Mapper, Serving
from bench.lib.figures import table
from bench.lib.flags import count
from bench.lib.timing import timed
from orla_lg.mappers import CostQualityMapper, ExplicitMapper, LoadAware, NeedMapper, StageTable
from orla_lg.mappers.features import DENSE
from orla_lg.mappers.learned import LearnedMapper, Model, load
from orla_lg.openai_api.adapter import OpenAIAdapter

GOAL_US, GOAL_LEARNED_US = 50.0, 300.0
NAMES = ("light", "middle", "heavy", "spare")
SPEED = core.Speed(2.0, 3000.0, 60.0, 150.0)
TEXT = "My router blinks red and nothing helps. " * 25
WORDS = "the answer of if find total 12 x^2 $3.50 polynomial number each why? code, and \\frac{1}{2} many = is"


def serving_of() -> Serving:
    """Return a core with four backends that have been probed."""
    backends = [
        Backend(name, f"http://{name}/v1", "m", cost=Cost(price, 2 * price), quality=0.6 + 0.1 * price)
        for price, name in enumerate(NAMES)
    ]
    fcfs, memory = core.policy("fcfs"), core.memory_policy("default")
    adapters = {backend: OpenAIAdapter(backend) for backend in backends}
    serving = Serving(adapters, mapper=None, stage_policy=fcfs, request_policy=fcfs, memory=memory)
    can = dict.fromkeys(core.Capability, core.Support.NATIVE)
    for scheduler in serving.schedulers.values():
        scheduler.health.probe = core.Probe(("m",), can, context_tokens=32_768)
        scheduler.speed_meter.speed = SPEED
    return serving


def call_of(text: str) -> Call:
    ask = Ask("auto", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}])
    return Call("c", Identity("w", "r", "support|reply"), ask, NO_HINTS, NO_HINTS, 0.0)


def calls_of(count: int) -> list[Call]:
    return [call_of(TEXT) for _ in range(count)]


def calls(chars: int, count: int) -> Iterator[Call]:
    """Yield calls with different prompts of the same length, so that no cache of ours could help."""
    dice, words = random.Random(chars), WORDS.split()
    for _ in range(count):
        yield call_of(" ".join(dice.choice(words) for _ in range(chars // 3))[:chars])


def mappers(seen: list[BackendView]) -> Iterator[tuple[str, Mapper, list[BackendView]]]:
    """Yield mappers with a name, and the backends as each sees them."""
    stages = {"classify": "light", "support|reply": ["heavy", "spare"], "*": "middle"}
    explicit = ExplicitMapper(stages)
    busy = replace(seen[2], waiting=9, in_flight=4, max_concurrency=4, resident=lambda: 400)
    yield "explicit", explicit, seen
    yield "explicit, with parameters", ExplicitMapper({"*": {"to": "heavy", "temperature": 0}}), seen
    yield "table of mappers, by name", StageTable({**stages, "plan": NeedMapper(["tools"])}), seen
    yield "need", NeedMapper(["tools", "context>16k"], "cheapest"), seen
    yield "load-aware, home has room", LoadAware(explicit), seen
    yield "load-aware, home is saturated", LoadAware(explicit), [*seen[:2], busy, seen[3]]
    yield "cost and quality, strict", CostQualityMapper(0.75, default="strict"), seen
    yield "cost and quality, prefer", CostQualityMapper(0.75), seen


def by_mapper(rounds: int) -> bool:
    """Print what every mapper takes; returns whether the goal is met."""
    serving = serving_of()
    consultation = core.Consultation(core.Background(), lambda *asked: iter(()))
    found = {"views": timed(serving.views, calls_of(rounds))}
    for name, mapper, views in mappers(serving.views(call_of(TEXT))):

        def decide(call: Call, mapper: Mapper = mapper, views: list[BackendView] = views) -> None:
            core.drive(core.assign(call, (mapper,), core.SettledCandidates(views), consultation))

        found[name] = timed(decide, calls_of(rounds))
    serving.close()
    rows = [[name, f"{each.median:.1f}", f"{each.p99:.1f}"] for name, each in found.items()]
    print("\n".join(table(["µs of one decision, 4 backends", "median", "p99"], rows)))
    return found["explicit"].median <= GOAL_US


def learned(model: str | None, rounds: int) -> bool:
    """Print what the learned mapper takes, by the prompt's length; returns whether the goal is met."""
    dense = Model(0.1, tuple(0.01 for _ in DENSE), 0.5)
    words = replace(dense, buckets=1024, hashed=dict.fromkeys(range(1024), 0.01))
    models = {model: load(model)} if model else {"counts": dense, "counts and words": words}
    rows, met = [], True
    for name, each in models.items():
        mapper = LearnedMapper(each)
        for chars in (50, 500, 5_000, 100_000):
            timed(lambda call: mapper.map(call, ()), calls(chars, 100))  # noqa: B023
            took = timed(lambda call: mapper.map(call, ()), [*calls(chars, min(rounds, 20_000_000 // chars))])  # noqa: B023
            met &= chars != 500 or took.median <= GOAL_LEARNED_US
            rows.append([name, str(chars), f"**{took.median:.0f}**", f"{took.p99:.0f}"])
    print("\n".join(table(["features", "characters", "median, µs", "99th percentile, µs"], rows)))
    return met


def main() -> int:
    options = parser("mapping.decision", __doc__)
    options.add_argument("-n", type=count, default=5_000, metavar="ROUNDS", help="decisions per row (5000)")
    options.add_argument("--model", metavar="FILE", help="a learned mapper's file")
    args = options.parse_args()
    met = {
        f"explicit in {GOAL_US:g} µs": by_mapper(args.n),
        f"learned in {GOAL_LEARNED_US:g} µs": learned(args.model, args.n),
    }
    for goal, is_met in met.items():
        print(f"goal: {goal}: {'met' if is_met else 'MISSED'}")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
