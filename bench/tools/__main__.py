"""Tools that start while the model decodes, and prompts prefilled while tools run: FTR and end to end.

    make bench-tools                              scripted engine (12 minutes), then llama.cpp and vLLM; run it alone
    make bench-tools BENCH='--quick'              under two minutes, on the scripted engine
    make bench-tools BENCH='--latencies FILE'     tools' seconds, one a line, or JSON: {"0.5": 0.8, "0.95": 6}
    make bench-tools BENCH='--write'              puts the figures into docs/tools-measured.md and docs/tools.svg
    python -m bench.tools --engine scripted --requests 200

*FTR* is the time to the first token of a request's final answer. Requests are drawn: one to four rounds of 1, 2, 3 or
5 calls (50, 20, 20, 10 %), each tool's time from a lognormal with a median of 1 s and sigma 1. A round's tools are
*parallel* (a ``ToolNode``) or *serial* (``tool.invoke``, one after the other). Every arm gets the same requests:
*bare*, *wrapped*, *early* (``tools_safe``), *split* (``split_prompts``), *both*.

The scripted engine has room for all and keeps what it had, so that what can be gained is arithmetic: the *law*
(bench/tools/law.py), computed for each request. Goals: bare is within 2 % of its own law, and an arm's gain within
3 points of what the law gives. With --scale engine and tools run faster than stated; figures stay in stated seconds,
so that what the client itself takes, and every wait that orla_lg counts in seconds, counts --scale times.

Real engines are met through a loopback proxy of the benchmark, since the small model calls no tool by itself: the
engine prefills and decodes for real, and each token is exchanged for the next piece of a planned answer. Requests
arrive at random times. *Load at equal FTR* is the rate, as a multiple of --rate, at which an arm's median FTR is
what bare's is at --rate.
"""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from bench.lib.command import DOCS, bar, ended, finish, parser, usual
from bench.lib.engines import started
from bench.lib.figures import Rounds
from bench.lib.flags import above_zero, count, whole
from bench.tools.arms import ARMS, Run, measure
from bench.tools.law import Pace, drawn, latencies
from bench.tools.real import RATES, loaded
from bench.tools.results import draw, report, verdict

PACES = {"30/1000": Pace(30, 1000), "30/4000": Pace(30, 4000), "60/8000": Pace(60, 8000)}
QUICK_REQUESTS, QUICK_SCALE, QUICK_PACES = 18, 1.5, ["30/4000", "60/8000"]


def options() -> Namespace:
    options = parser("tools", __doc__)
    add = options.add_argument
    add("--quick", action="store_true", help=f"scripted, {QUICK_REQUESTS} requests, {QUICK_SCALE:g} times as fast")
    add("--engine", nargs="+", choices=("scripted", *RATES), help="only these (all)")
    add("--requests", type=count, metavar="N", help="of each node, pace and arm (60)")
    add("--scale", type=above_zero, metavar="X", help="scripted engine and tools run so many times faster (1)")
    add("--lanes", type=count, default=6, metavar="N", help="requests of an arm at once, each on its own engine (6)")
    add(
        "--pace",
        nargs="+",
        choices=PACES,
        metavar="N/N",
        help=f"tokens a second, decoded and prefilled, of {[*PACES]}",
    )
    add("--latencies", type=Path, metavar="FILE", help="tools' seconds, one a line, or a JSON object of quantiles")
    add("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM", help=f"beside bare, of {[*ARMS]}")
    add("--load-requests", type=count, default=24, metavar="N", help="of each arm and rate, real engines (24)")
    add("--rate", type=above_zero, metavar="X", help=f"requests a second on real engines ({RATES})")
    add("--seed", type=whole, default=1, metavar="N", help="of the draws (1)")
    usual(options, writes="docs/tools-measured.md and docs/tools.svg")
    args = options.parse_args()
    args.engine = args.engine or (["scripted"] if args.quick else ["scripted", *RATES])
    args.requests = args.requests or (QUICK_REQUESTS if args.quick else 60)
    args.pace = args.pace or (QUICK_PACES if args.quick else [*PACES])
    args.scale = args.scale or (QUICK_SCALE if args.quick else 1.0)
    args.arms = [arm for arm in ARMS if arm == "bare" or arm in args.arms]
    return args


async def scripted(args: Namespace, url: str) -> dict[str, Rounds[Run]]:
    """Return the runs of each kind of node and pace."""
    requests = drawn(args.requests, args.seed, latencies(args.latencies)[0])
    found = {}
    for name in args.pace:
        pace = PACES[name]
        tick = bar(f"{name} tokens/s, both nodes", 2 * len(args.arms) * len(requests))
        async with asyncio.TaskGroup() as group:
            nodes = {
                node: group.create_task(measure(
                    url, pace, args.scale, requests, serial=node == "serial", arms=args.arms,
                    lanes=args.lanes, tick=tick,
                ))
                for node in ("parallel", "serial")
            }  # fmt: skip
        for node, runs in nodes.items():
            found[f"{node} tools, {name} tokens/s"] = Rounds(runs.result(), args.arms)
    return found


def setting(args: Namespace) -> str:
    return (
        f"Scripted engine: {args.requests} requests for each node and pace (tokens a second, decoded / prefilled); "
        f"tools: {latencies(args.latencies)[1]}; run {args.scale:g} times as fast as stated."
    )


def main() -> int:
    args = options()
    page, draw_one = DOCS / "tools-measured.md" if args.write else None, latencies(args.latencies)[0]
    for kind in args.engine:  # each is printed and written before the next one begins
        drawing: Sequence[str] = ()
        if kind == "scripted":
            with started("bench.tools.engine") as url:
                places = asyncio.run(scripted(args, url))
            lines = [setting(args), "", *report(places), *(f"* {line}" for line in verdict(places))]
            if args.write:
                draw(places, DOCS / "tools.svg")
                drawing = ["", "![What each arm gains, beside the law](tools.svg)"]
        else:
            rate = args.rate or RATES[kind]
            lines = asyncio.run(loaded(kind, args.arms, args.load_requests, rate, args.seed, draw_one))
        finish(lines, f"tools: {kind}", page, drawing)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "its engines are ended"))
