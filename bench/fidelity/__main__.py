"""How near the simulation is to the engine it was calibrated on: the same sessions on both, side by side.

    orla-lg sim calibrate --url http://127.0.0.1:8000/v1 --out engine.toml
    python -m bench.fidelity --sessions sessions.jsonl.gz --parameters engine.toml \\
        --tokenizer MODEL_FOLDER --url http://127.0.0.1:8000/v1 --tight-url http://127.0.0.1:8001/v1

Both engines serve the same model; the second was started with a small KV cache (vLLM: --num-gpu-blocks-override).
Each round replays other sessions of the file, with an empty cache at its begin. Arrivals, thinking times, prompts
and lengths of answers are the same on both sides, and a session's next call follows the end of the one before.
Run it alone: on a machine that does something else the engine is measured with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.lib import plot
from bench.lib.command import finish, parser, usual
from bench.lib.figures import table
from bench.lib.flags import above_zero, amount, count, share
from bench.lib.machine import Others
from bench.lib.marks import DOCS
from orla_lg.openai_api.metrics import samples
from orla_lg_sim.client import TimingClient
from orla_lg_sim.parameters import EngineParameters, load
from orla_lg_sim.replay import CallOutcome, VirtualReplay, live, summarise
from orla_lg_sim.sessions import Session, Shape, read
from orla_lg_sim.text import Tokenizer, tokenizer_of

GOAL_TIME, GOAL_CACHED = 0.15, 0.05


@dataclass(frozen=True, slots=True)
class Arm:
    """One engine, live and simulated."""

    name: str
    kv_blocks: int
    others: list[float]
    """Of each round, what other processes took of the machine."""
    live: list[CallOutcome]
    simulated: list[CallOutcome]


def sessions_of(args: argparse.Namespace, number: int) -> list[Session]:
    shape = Shape(args.count, number * args.count, args.turns, args.every, args.think, args.longest, seed=number)
    return read(args.sessions, shape)


async def measured(args: argparse.Namespace, name: str, url: str) -> dict[str, Any]:
    """Replay all rounds on a live engine."""
    client = TimingClient(url)
    rounds: list[list[dict[str, Any]]] = []
    shares: list[float] = []
    try:
        await client.served()
        text = await client.metrics()
        labels = next(labels for labels, _ in samples(text, "vllm:cache_config_info"))
        for number in range(args.rounds):
            for attempt in range(args.attempts):
                outcomes, others = await one_round(client, sessions_of(args, number), url)
                print(name, number, f"others {others:.1%}", summarise(outcomes), file=sys.stderr, flush=True)
                if others <= args.quiet or attempt == args.attempts - 1:
                    break
            rounds.append([asdict(outcome) for outcome in outcomes])
            shares.append(others)
    finally:
        await client.aclose()
    return {"name": name, "kv_blocks": int(labels["num_gpu_blocks"]) - 1, "rounds": rounds, "others": shares}


async def one_round(client: TimingClient, sessions: list[Session], url: str) -> tuple[list[CallOutcome], float]:
    """Replay once with an empty cache; returns also what others took of the machine meanwhile."""
    for _ in range(2):  # the first calls after a pause are slower
        await client.ask({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8})
    if not await client.forget_everything():
        sys.exit(f"{url} does not let its cache be emptied; start it with VLLM_SERVER_DEV_MODE=1")
    others = Others(url)
    return await live(sessions, client), others.share()


def simulated(
    args: argparse.Namespace, kept: dict[str, Any], parameters: EngineParameters, tokenizer: Tokenizer
) -> Arm:
    """Replay on the simulation what was replayed live."""
    blocks, rounds, same = kept["kv_blocks"], kept["rounds"], replace(parameters, kv_blocks=kept["kv_blocks"])
    made: list[CallOutcome] = []
    for number in range(len(rounds)):
        made += VirtualReplay(sessions_of(args, number), same, tokenizer).run()
    seen = [CallOutcome(**row) for one in rounds for row in one]
    return Arm(kept["name"], blocks, kept["others"], seen, made)


def rows(arms: Sequence[Arm]) -> list[str]:
    lines = []
    for arm in arms:
        real, ours = summarise(arm.live), summarise(arm.simulated)
        where = f"{arm.name}, {arm.kv_blocks} blocks"
        for title, a, b, unit, goal in (
            ("TTFT, median", real.ttft_s * 1e3, ours.ttft_s * 1e3, " ms", GOAL_TIME),
            ("completion, median", real.duration_s * 1e3, ours.duration_s * 1e3, " ms", GOAL_TIME),
            ("TTFT, mean", real.mean_ttft_s * 1e3, ours.mean_ttft_s * 1e3, " ms", None),
            ("completion, mean", real.mean_duration_s * 1e3, ours.mean_duration_s * 1e3, " ms", None),
            ("cached tokens", real.cached_tokens, ours.cached_tokens, "", GOAL_CACHED),
        ):
            off = b / a - 1
            told = (
                f"{off:+.1%}" if goal is None else f"**{off:+.1%}**" + ("" if abs(off) <= goal else " (goal missed)")
            )
            lines.append([where, title, f"{a:,.0f}{unit}", f"{b:,.0f}{unit}", told])
    return table(["cache", "figure", "vLLM", "simulated", "difference"], lines)


def draw(arms: Sequence[Arm]) -> None:
    size = (8, 2.6 * len(arms))
    figure, axes = plot.pyplot("orla_lg", 9, text=True).subplots(
        len(arms), 2, figsize=size, squeeze=False, layout="constrained"
    )
    titles = {"ttft_s": "time to first token", "duration_s": "completion"}
    for row, arm in zip(axes, arms, strict=True):
        for axis, (what, title) in zip(row, titles.items(), strict=True):
            for outcomes, label, style in ((arm.live, "vLLM", "-"), (arm.simulated, "simulated", "--")):
                plot.shares(axis, [getattr(outcome, what) for outcome in outcomes], label, ls=style)
            named = {"title": f"{title}, {arm.name}", "xlabel": "seconds", "ylabel": "part of calls"}
            axis.set(**named, xscale="log", ylim=(0, 1))
            axis.grid(alpha=0.3, which="both")
            axis.legend()
    plot.save(figure, DOCS / "sim-fidelity.svg", tight=None)


def options() -> argparse.Namespace:
    options = parser("fidelity", __doc__)
    add = options.add_argument
    add("--sessions", required=True, type=Path, help="JSON lines with messages, .gz or not")
    add("--parameters", required=True, type=Path, help="what `orla-lg sim calibrate` wrote")
    add("--tokenizer", required=True, type=Path, help="the model's folder")
    add("--url", help="the live engine")
    add("--tight-url", help="the same with a small KV cache")
    add("--again", action="store_true", help="take the live measurements kept before; simulate and draw only")
    add("--quiet", type=share, default=0.05, help="repeat a round in which others took more of the machine (0.05)")
    add("--attempts", type=count, default=2, help="how often at most (2)")
    add("--count", type=count, default=10, help="sessions in a round (10)")
    add("--turns", type=count, default=8, help="calls of each at most (8)")
    add("--every", type=above_zero, default=1.0, help="mean seconds between begins of sessions (1)")
    add("--think", type=amount, default=1.0, help="mean seconds between a call's end and the next (1)")
    add("--longest", type=count, default=12_500, help="longest prompt in characters")
    usual(options, rounds=3, keep="sim-fidelity.json", writes="docs/simulation.md and its figure")
    return options.parse_args()


def main() -> None:
    args = options()
    kept = json.loads(args.keep.read_text()) if args.keep.exists() else {}
    for name, url in (("no pressure", args.url), ("pressure", args.tight_url)):
        if url and not args.again:
            kept[name] = asyncio.run(measured(args, name, url))
            args.keep.write_text(json.dumps(kept))
    parameters, tokenizer = load(args.parameters), tokenizer_of(args.tokenizer)
    if not (arms := [simulated(args, one, parameters, tokenizer) for one in kept.values()]):
        raise SystemExit(f"{args.keep} holds no live measurements; give --url, --tight-url, or both")
    busiest = max(share for arm in arms for share in arm.others)
    setting = (
        f"{len(arms[0].live)} calls of {args.rounds * args.count} sessions in {args.rounds} rounds, on each engine. "
        f"Other processes took {busiest:.0%} of the machine in the worst round."
    )
    if args.write:
        draw(arms)
    finish([setting, "", *rows(arms)], "fidelity", DOCS / "simulation.md" if args.write else None)


if __name__ == "__main__":
    main()
