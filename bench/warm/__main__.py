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
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from bench.lib.calls import Turn
from bench.lib.command import DOCS, bar, ended, finish, parser, tell, usual
from bench.lib.flags import above_zero, amount, count, folds, port
from bench.lib.kept import Kept
from bench.warm.arms import ARMS, PLACES, Arm, Place, draw, report
from bench.warm.situations import NextStage, Night, ToolWaits

DRAWN = ["", "![Time to the first token of calls that were warmed for](warm-up.svg)"]


def situations(args: argparse.Namespace) -> list[Any]:
    """Return the situations that are wanted."""
    tools = ToolWaits(args.workflows, args.calls, args.wait)
    every = {"tools": tools, "stages": NextStage(args.runs), "night": Night(args.threads, args.prepare)}
    return [every[name] for name in args.situation]


def measure(args: argparse.Namespace, kept: Kept, situation: Any, place: Place) -> None:
    """Run every turn of a situation at a place that is not kept yet."""
    where = situation.where(place)
    tell(f"{where}: starting the engine")
    with situation.engine(place, args.port) as engine:

        def turn(arm: Arm, seed: int, _: int) -> Coroutine[Any, Any, Turn]:
            tick = bar(f"{where}, round {seed + 1}/{args.rounds}: {arm.name}", situation.steps)
            return situation.turn(place, engine, arm, seed, tick)

        arms = situation.arms_at(place, args.arms)
        asyncio.run(kept.measure(engine.url, arms, args.rounds, int, turn, place=where))


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
        for situation in situations(args):
            measure(args, kept, situation, place)
    lines = [f"Measured with {command_line()}.", "", *report(kept.turns)]
    if args.write:
        draw(kept.turns, DOCS / "warm-up.svg")
    return finish(lines, "warm", DOCS / "warm-up.md" if args.write else None, DRAWN)


if __name__ == "__main__":
    sys.exit(ended(main, "its engine is ended"))
