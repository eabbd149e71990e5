"""Cores and replicas by the number: added wait, calls a second, and what one core takes of a CPU for each call.

    make bench-scale-out                          all of it, a quarter of an hour; run it alone
    make bench-scale-out BENCH='--quick'          two minutes, as a first look
    make bench-scale-out BENCH='--only cost'      what a call costs a core, with a profile
    make bench-scale-out BENCH='--write'          writes docs/scale-out.md too
    python -m bench.scale_out --help

Two experiments. **Wait**: processes of wrapped LangGraph graphs, 4 to 16 of them, against 1, 2 and 4 cores with an
engine each, and against a core in each process itself; arms are interleaved in rounds. The replicas' own CPU is the
limit on a small machine. **Cost**: callers that speak the link's messages and do nothing else, so that a core's own
CPU is seen, for prompts of 10, 60 and 200 messages; then once more under a profiler. The cores have one CPU of the
machine to themselves, all else has the other.
"""

from __future__ import annotations

import os
import sys

from bench.lib.command import DOCS, ended, parser, put, usual
from bench.scale_out import cost, waits
from bench.serve.servers import cores


def main() -> int:
    options = parser("scale_out", __doc__)
    usual(options, rounds=5, writes="docs/scale-out.md")
    add = options.add_argument
    add("--quick", action="store_true", help="two rounds of few calls, and fewer replicas")
    add("--only", choices=("wait", "cost"), help="one of the two experiments")
    add("--pools", action="store_true", help="cores of pools on one store, instead of servers that know nothing "
        "of each other")  # fmt: skip
    args = options.parse_args()
    os.sched_setaffinity(0, {cores()[1]})  # what is started here inherits it
    rounds = 2 if args.quick else args.rounds
    lines, missed = list[str](), list[str]()
    if args.only != "wait":
        costs = cost.measure(rounds, 2_000 if args.quick else 10_000)
        lines += [*cost.report(costs), "", *cost.profiled(2_000 if args.quick else 10_000), ""]
        missed += cost.beyond_goal(costs)
    if args.only != "cost":
        arms = waits.QUICK if args.quick else waits.ARMS
        blocks = waits.measure(arms, rounds, 40 if args.quick else 200, pooled=args.pools)
        lines += waits.report(blocks)
    print("\n".join([*lines, "", *(missed or ["within the goals"])]))
    if args.write:
        put(DOCS / "scale-out.md", "scale_out", lines)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "nothing was written"))
