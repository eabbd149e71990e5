"""What warm-ups gain on real engines: after tool waits, before a next stage, and after a night.

    make bench-warm                                       all of it, three rounds; half an hour, run it alone
    python -m bench.warm --place llamacpp --rounds 1      a first look, five minutes
    python -m bench.warm --write                          docs/warm-up.md and docs/warm-up.svg

docs/warm-up.md has the situations. Every arm of a round gets the same load, in an order of its own, from an empty
cache: *bare* and *bare again* (plain ChatOpenAI; what differs between two equal arms is noise), *orla, no warm-ups*,
*orla, warm-ups*, and *orla, slots saved* (llama.cpp's night only: what is there to be restored is not warmed).

TTFT counts from the node's call, our queue included, of the calls that a situation is about: those after a tool, in
the second stage, after the resume. *Recomputed* are their prompt tokens that were not in the cache when they came.
*Warmed* are tokens that warm-ups computed: *used* are those that their call found, *wasted* those it did not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from bench.lib.calls import Turn
from bench.lib.command import ended, finish, parser, usual
from bench.lib.engines import LLAMACPP
from bench.lib.flags import above_zero, amount, count, folds, port
from bench.lib.kept import Kept
from bench.lib.marks import DOCS
from bench.lib.progress import bar, tell
from bench.warm import next_stage, night, tool_waits
from bench.warm.arms import AGAIN, ARMS, BARE, COLD, PLACES, SAVED, WARM, Arm, Place, crowded, draw, overnight, report

DRAWN = ["", "![Time to the first token of calls that were warmed for](warm-up.svg)"]


@dataclass(frozen=True, slots=True)
class Situation:
    """What is measured: the module with its turn, its load, its engine, and how many calls a turn's bar shows."""

    module: Any
    shape: Any
    engine: Callable[[Place, int], AbstractContextManager[Any]]
    steps: int
    arms: tuple[Arm, ...] = (BARE, AGAIN, COLD, WARM)

    def arms_at(self, place: Place, wanted: list[str]) -> list[Arm]:
        """Return the arms that make sense at a place: only llama.cpp saves slots."""
        found = [arm for arm in self.arms if arm.name in wanted]
        return [arm for arm in found if not arm.max_saved or place.engine == LLAMACPP]

    def measure(self, kept: Kept, place: Place, args: argparse.Namespace) -> None:
        """Run every turn at a place that is not kept yet."""
        where, arms = f"{self.module.SITUATION}, {place.title}", self.arms_at(place, args.arms)
        tell(f"{where}: starting the engine")
        with self.engine(place, args.port) as engine:

            def turn(arm: Arm, seed: int, _: int) -> Coroutine[Any, Any, Turn]:
                tick = bar(f"{where}, round {seed + 1}/{args.rounds}: {arm.name}", self.steps)
                return self.module.turn(place, engine, arm, seed, self.shape, tick)

            asyncio.run(kept.measure(engine.url, arms, args.rounds, int, turn, place=where))


def situations(args: argparse.Namespace) -> dict[str, Situation]:
    """Return the situations that are wanted, by name."""
    tools = tool_waits.Shape(args.workflows, args.calls, args.wait)
    stages, over = next_stage.Shape(args.runs), night.Shape(args.threads, args.prepare)
    every = {
        "tools": Situation(tool_waits, tools, crowded, tools.workflows * tools.calls),
        "stages": Situation(next_stage, stages, crowded, next_stage.LEARN + stages.runs),
        "night": Situation(night, over, overnight, over.runs, (BARE, COLD, SAVED, WARM)),
    }
    return {name: every[name] for name in args.situation}


def options() -> argparse.Namespace:
    options = parser("warm", __doc__)
    add, names, arms = options.add_argument, ("tools", "stages", "night"), list(ARMS)
    usual_places = [name for name in PLACES if name != "vllm-plugin"]
    add("--situation", nargs="+", default=names, choices=names, metavar="NAME", help="tools, stages, night (all)")
    add("--place", nargs="+", default=usual_places, choices=PLACES, metavar="PLACE",
        help="llamacpp, vllm (both); vllm-plugin: with orla_lg inside, which keeps what waits by itself")  # fmt: skip
    add("--arms", nargs="+", default=arms, choices=arms, metavar="ARM", help=f"of {arms}")
    add("--workflows", type=count, default=4, metavar="N", help="tools: at a time; the cache holds two (4)")
    add("--calls", type=folds, default=5, metavar="N", help="tools: of each workflow (5)")
    add("--wait", type=above_zero, default=12.0, metavar="S", help="tools: of a tool, on the mean (12)")
    add("--runs", type=count, default=6, metavar="N", help="stages: that count; three before them teach (6)")
    add("--threads", type=count, default=3, metavar="N", help="night: interrupted in a turn (3)")
    add("--prepare", type=amount, default=4.0, metavar="S", help="night: of own code between resume and call (4)")
    add("--tokens", type=count, metavar="N", help="of a workflow's first prompt, about (llama.cpp 600, vLLM 1400)")
    add("--cores", type=count, metavar="N", help="threads of the engine (one for each core)")
    add("--port", type=port, default=0, metavar="N", help="of the engine (a free one)")
    usual(options, rounds=3, keep="", writes="docs/warm-up.md and docs/warm-up.svg")
    return options.parse_args()


def command_line() -> str:
    """Return how this was started, for the reader of the figures."""
    words = shlex.join(word for word in sys.argv[1:] if word != "--write")
    return f"`make bench-warm BENCH={json.dumps(words, ensure_ascii=False)}`" if words else "`make bench-warm`"


def main() -> int:
    args = options()
    load = ("workflows", "calls", "wait", "runs", "threads", "prepare", "tokens", "cores")
    kept = Kept(args.keep, {name: getattr(args, name) for name in load})
    for name in args.place:
        place = replace(PLACES[name], tokens=args.tokens or PLACES[name].tokens, threads=args.cores)
        for situation in situations(args).values():
            situation.measure(kept, place, args)
    lines = [f"Measured with {command_line()}.", "", *report(kept.turns)]
    if args.write:
        draw(kept.turns, DOCS / "warm-up.svg")
    return finish(lines, "warm", DOCS / "warm-up.md" if args.write else None, DRAWN)


if __name__ == "__main__":
    sys.exit(ended(main, "its engine is ended"))
