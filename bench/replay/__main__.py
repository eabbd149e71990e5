"""Agents recorded on an engine under three policies, and what a replay of one record says of the other two.

    make bench-replay                                    starts its own vLLM on the CPU; five minutes; run it alone
    make bench-replay BENCH='--engine llamacpp'          its own llama.cpp with four slots
    make bench-replay BENCH='--simulate'                 on the simulated engine, in virtual time, some seconds
    make bench-replay BENCH='--again --write'            takes the records that are there; writes docs/replay.md

Twenty agents of one to five calls with tools between come four times a second; the engine is sent four calls at
once, so the order of the queue counts. Each policy writes a records file. Of each the unchanged setting is replayed
and held against what happened, and the other two policies are simulated from it and held against their own records.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.lib import plot
from bench.lib.calls import Turn
from bench.lib.command import DOCS, ended, finish, parser, tell, usual
from bench.lib.engines import LLAMACPP, VLLM_CPU, engine_at
from bench.lib.figures import table
from bench.lib.flags import count, whole
from bench.lib.kept import beside_others
from bench.pressure.workflows import Load, LocalWords, Shape, load_of, made_up
from bench.replay.turns import POLICIES, arm, live_turn, of_different_lengths, simulated_turn
from orla_lg.engines import EngineOptions
from orla_lg.replay.figures import MAKESPAN, MEAN_RUN, MEAN_TTFT, P95_RUN, Figure
from orla_lg.replay.reading import read
from orla_lg.replay.report import signed
from orla_lg.replay.study import Study, WhatIf
from orla_lg.replay.workload import workload_of
from orla_lg_sim.parameters import EngineParameters, load
from orla_lg_sim.text import WordTokenizer

BLOCKS, BLOCK_TOKENS = 240, 32
GOAL = 0.15
SHOWN = (MAKESPAN, MEAN_RUN, P95_RUN, MEAN_TTFT)
SLOTS, CONTEXT = 4, 4096
Found = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class FromRecords:
    """What a policy's records say: of itself, as it happened and unchanged, and of the others."""

    policy: str
    happened: Found
    replayed: Mapping[str, Found]
    """By policy, its own among them."""


def load_in(args: argparse.Namespace, words: Any) -> Load:
    """Return the agents."""
    shape = Shape(args.sessions)
    return of_different_lengths(load_of(made_up(args.sessions, shape.history_tokens), shape, words, args.seed))


def fresh(args: argparse.Namespace, policy: str) -> Path:
    """Return where a policy's records go, with none of an earlier turn."""
    path = records_of(args, policy)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def records_of(args: argparse.Namespace, policy: str) -> Path:
    return Path(args.records) / f"{policy}.jsonl"


def simulate(args: argparse.Namespace) -> None:
    """Record every policy in virtual time; step times vary, as those of an engine do."""
    given = load(args.parameters) if args.parameters else EngineParameters(jitter=0.1, held_token_s=3e-6)
    parameters, words = replace(given, kv_blocks=args.blocks, block_tokens=BLOCK_TOKENS), LocalWords(WordTokenizer())
    for policy in POLICIES:
        simulated_turn(parameters, words, arm(policy, fresh(args, policy)), load_in(args, words), args.cap)


async def measure(args: argparse.Namespace, engine: Any) -> None:
    """Record every policy on a real engine."""
    words = engine if args.engine == VLLM_CPU else LocalWords(WordTokenizer())
    for number, policy in enumerate(POLICIES):
        tell(f"{number + 1}/{len(POLICIES)} {policy}")
        given = load_in(args, words)
        turn: Turn = await beside_others(
            engine.url, live_turn(engine, args.engine, arm(policy, fresh(args, policy)), given, args.cap)
        )
        tell(f"{policy}: others took {turn.others:.0%} of the machine", last=True)
        of_runs_alone(records_of(args, policy))


def of_runs_alone(path: Path) -> None:
    """Leave in a records file the calls of runs: those that warmed the engine belong to no setting."""
    rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    warmed = [row for row in rows if (read := json.loads(row)).get("run") or "id" not in read]
    setting = next(
        (read["shape"]["setting"] for row in rows if "setting" in (read := json.loads(row)).get("shape", {})), None
    )
    first = json.loads(warmed[0])
    if setting is not None and "shape" in first:
        first["shape"]["setting"] = setting  # it may stand in a line that goes
        warmed[0] = json.dumps(first) + "\n"
    path.write_text("".join(warmed), encoding="utf-8")


def replay(args: argparse.Namespace, policy: str) -> FromRecords:
    """Replay a policy's records under all three."""
    study = Study(
        workload_of(read(records_of(args, policy))), kv_tokens={"*": args.kv_tokens} if args.kv_tokens else None
    )
    study.begin(lambda what: lambda done, total: None)
    for other in POLICIES:
        if other != policy:
            study.play(WhatIf(other, policy=other), lambda done, total: None)
    return FromRecords(policy, study.report.happened, {policy: study.report.unchanged, **study.report.others})


def part(figure: Figure, simulated: Found, happened: Found) -> float:
    """Return how far a simulated figure is off, as a part of what happened."""
    mine, theirs = simulated[figure.name], happened[figure.name]
    return mine / theirs - 1 if mine is not None and theirs else 0.0


def off(figure: Figure, simulated: Found, happened: Found) -> str:
    return signed(part(figure, simulated, happened))


def lines(args: argparse.Namespace, all_: Mapping[str, FromRecords]) -> list[str]:
    """Return the two tables: the unchanged setting, and each policy as the records of each say."""
    first = [
        [policy, *(f"{each.happened[f.name] or 0:.2f} s, replayed {off(f, each.replayed[policy], each.happened)}"
                   for f in SHOWN)]
        for policy, each in all_.items()
    ]  # fmt: skip
    worst = max(
        abs(part(f, each.replayed[p], each.happened))
        for p, each in all_.items()
        for f in (MAKESPAN, MEAN_RUN, P95_RUN)
    )
    order = ranking({policy: each.happened for policy, each in all_.items()})
    second = [
        ["*happened*", *(f"{all_[policy].happened[MEAN_RUN.name] or 0:.2f} s" for policy in all_), " < ".join(order)]
    ]
    right = 0
    for policy, each in all_.items():
        found = ranking(each.replayed)
        right += found == order
        means = [
            f"{each.replayed[p][MEAN_RUN.name] or 0:.2f} s ({off(MEAN_RUN, each.replayed[p], all_[p].happened)})"
            for p in all_
        ]
        second.append([f"from the records of {policy}", *means, " < ".join(found)])
    verdict = "met" if worst <= GOAL else "missed"
    said = f"{verdict}: unchanged, makespan, mean and p95 of runs are within {worst:.0%} (goal {GOAL:.0%})"
    return [
        "The unchanged setting, as it happened and replayed:", "",
        *table(["policy", *(figure.title for figure in SHOWN)], first), "",
        "The mean run under each policy, as it happened and as the records of another one say:", "",
        *table(["", *all_, "ranking"], second), "",
        f"{said}; {right} of {len(all_)} records rank the three policies as they were.",
    ]  # fmt: skip


def ranking(found: Mapping[str, Found]) -> list[str]:
    return sorted(found, key=lambda policy: found[policy][MEAN_RUN.name] or 0.0)


def draw(all_: Mapping[str, FromRecords], path: Path) -> None:
    """Draw each policy as it happened, beside what the records of each say of it."""
    figure, panes = plot.pyplot("replay").subplots(1, len(SHOWN), figsize=(3.2 * len(SHOWN), 2.8))
    colours = ("#3b7dd8", "#7fb069", "#e6aa68")
    for axes, shown in zip(panes, SHOWN, strict=True):
        places = range(len(all_))
        axes.bar([at - 0.3 for at in places], [all_[p].happened[shown.name] or 0 for p in all_], 0.2, color="#444",
                 label="happened")  # fmt: skip
        for number, (source, each) in enumerate(all_.items()):
            heights = [each.replayed[policy][shown.name] or 0 for policy in all_]
            axes.bar([at - 0.1 + 0.2 * number for at in places], heights, 0.2, color=colours[number],
                     label=f"from the records of {source}")  # fmt: skip
        axes.set(title=shown.title, xticks=[*places], xticklabels=[*all_], ylabel="seconds")
    plot.open_axes(*panes)
    named = panes[0].get_legend_handles_labels()
    figure.legend(*named, loc="lower center", ncols=4, frameon=False)
    plot.save(figure, path, tight=(0, 0.09, 1, 1))


def options() -> argparse.Namespace:
    options = parser("replay", __doc__)
    add = options.add_argument
    add("--engine", choices=(VLLM_CPU, LLAMACPP), default=VLLM_CPU, help="which engine of its own it starts (vllm)")
    add("--url", help="such an engine that runs already")
    add("--simulate", action="store_true", help="in virtual time, on the simulated engine")
    add("--parameters", type=Path, metavar="FILE", help="that engine, for --simulate")
    add("--again", action="store_true", help="measure nothing, take the records that are there")
    add("--records", default="replay-records", metavar="FOLDER", help="where records are kept (replay-records)")
    add("--sessions", type=count, default=20, metavar="N", help="agents (20)")
    add("--cap", type=count, default=4, metavar="N", help="calls at the engine at once (4)")
    add("--blocks", type=count, default=BLOCKS, metavar="N", help="of 32 tokens, in the engine's pool (240)")
    add("--kv-tokens", type=count, metavar="N", help="what the engine's cache holds, where its records do not say")
    add("--seed", type=whole, default=0, help="of the load (0)")
    usual(options, writes="docs/replay.md and docs/replay.svg")
    return options.parse_args()


def main() -> int:
    args = options()
    if args.simulate:
        simulate(args)
    elif not args.again:
        kinds = {VLLM_CPU: EngineOptions("vllm-cpu", kv_tokens=args.blocks * BLOCK_TOKENS),
                 LLAMACPP: EngineOptions("llamacpp", slots=SLOTS, context_tokens=CONTEXT)}  # fmt: skip
        with engine_at(kinds[args.engine], args.url) as engine:
            asyncio.run(measure(args, engine))
    all_ = {policy: replay(args, policy) for policy in POLICIES}
    where = "the simulated engine, in virtual time" if args.simulate else f"a real {args.engine}"
    setting = f"{args.sessions} agents on {where}, {args.cap} calls at once."
    if args.simulate:
        setting += " So this shows what records carry, and not how near a simulated engine is to a real one."
    if args.write:
        draw(all_, DOCS / "replay.svg")
    return finish([setting, "", *lines(args, all_)], "replay", DOCS / "replay.md" if args.write else None)


if __name__ == "__main__":
    sys.exit(ended(main, "start it again"))
