"""Flush per request, per workflow, or leave it to the engine: the Orla paper's cache experiment on real engines.

    make bench-cache                                    starts its own engines; a quarter of an hour, run it alone
    python -m bench.cache --engine llamacpp --rounds 1  a first look, some minutes
    python -m bench.cache --write                       docs/cache.md and docs/cache.svg

docs/cache.md has the load and the arms. Each engine is there twice: *short* of room for all the cases that are under
way (llama.cpp: 3 slots, vLLM: 2,048 tokens), and with *room* for all (8 slots, 7,680 tokens). An engine of your own
(--url, with one --engine and one --pool) must be used by nothing else: vLLM with VLLM_SERVER_DEV_MODE=1 and
--enable-prompt-tokens-details, llama.cpp with --slot-save-path. On a vLLM without the orla_lg plugin the arms that
flush a workflow are left out. A run that is stopped (Ctrl-C) goes on from its last turn when it is started again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict

from bench.cache.arms import PLACES, ROOM, SHORT, Place, Turns, arms_at, draw, report, rounds_of, verdict
from bench.cache.workflows import ANSWER_TOKENS, STAGES, tickets
from bench.lib.calls import Turn
from bench.lib.command import DOCS, ended, finish, parser, tell, usual
from bench.lib.engines import LLAMACPP, VLLM_CPU, engine_at
from bench.lib.figures import Rounds
from bench.lib.flags import above_zero, count
from bench.lib.kept import Kept
from bench.lib.workflows import Session

CASES = 8


def measured(args: argparse.Namespace, place: Place) -> Rounds[Turn]:
    """Return the turns at a place, after measuring what is missing."""
    file = args.keep.with_name(f"{args.keep.stem}-{place.name}{args.keep.suffix}")
    if args.again:
        return rounds_of(place, Kept(file, {}).turns)
    with engine_at(place.options(), args.url) as engine:
        if not engine.has_plugin:
            tell(f"{place.name}: no orla_lg plugin here; the arms that flush a workflow are left out", last=True)
        load = {"cases": args.cases, "stages": len(STAGES), "answer_tokens": ANSWER_TOKENS}
        kept = Kept(file, {**asdict(place), **load, "model": engine.model, "plugin": engine.has_plugin})
        turns, arms, every_s = Turns(place, engine), arms_at(place, engine), args.every or place.every_s
        # Where all fits nothing can differ by much, so half of the rounds do.
        rounds = args.rounds if place.pool == SHORT else max(1, args.rounds // 2)

        def load(seed: int) -> list[Session]:
            return tickets(args.cases, every_s, seed)

        asyncio.run(kept.measure(engine.url, arms, rounds, load, turns.turn, place=place.name))
    if turns.resets_refused:
        tell(f"{place.name}: {turns.resets_refused} resets were refused, since calls ran", last=True)
    return rounds_of(place, kept.turns)


def options() -> argparse.Namespace:
    options = parser("cache", __doc__)
    add, engines, pools = options.add_argument, (LLAMACPP, VLLM_CPU), (SHORT, ROOM)
    add("--engine", nargs="+", default=engines, choices=engines, metavar="ENGINE", help="llamacpp, vllm (both)")
    add("--pool", nargs="+", default=pools, choices=pools, metavar="POOL", help="short, room (both)")
    add("--cases", type=count, default=CASES, metavar="N", help=f"in a round ({CASES})")
    add("--every", type=above_zero, metavar="S", help="between two arrivals, on the mean (llama.cpp 4, vLLM 1.2)")
    add("--url", help="an engine that runs already; with one --engine and one --pool")
    add("--again", action="store_true", help="measure nothing, take what is kept, each place in a file of its own")
    usual(options, rounds=2, keep="cache.json", writes="docs/cache.md and docs/cache.svg")
    args = options.parse_args()
    if args.url and (len(args.engine) != 1 or len(args.pool) != 1):
        options.error("--url is one engine: say which with one --engine and one --pool")
    return args


def main() -> int:
    args = options()
    places = [place for place in PLACES if place.engine in args.engine and place.pool in args.pool]
    found = {place: measured(args, place) for place in places}
    for engine in dict.fromkeys(place.engine for place in places):
        mine = {place: rounds for place, rounds in found.items() if place.engine == engine}
        lines = [line for place, rounds in mine.items() for line in report(place, rounds)]
        lines += [f"* {line}" for place, rounds in mine.items() for line in verdict(place, rounds)]
        finish(lines, f"cache: {engine}", DOCS / "cache.md" if args.write else None)
    if args.write:
        draw(found, DOCS / "cache.svg")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "the same command goes on with the turn that was broken off"))
