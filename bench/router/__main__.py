"""Light or heavy: what a learned mapper is worth on labelled prompts, beside ways that need no learning.

    make bench-router BENCH='--data prompts.jsonl'
    python -m bench.router --data prompts.jsonl --judge-url http://127.0.0.1:8081/v1 --judge-model smollm2
    python -m bench.router --data prompts.jsonl --embed-url http://127.0.0.1:8082/v1

The data is what ``orla-lg mapper fit`` reads. Every learned figure is from nested cross-validation: features,
penalty, calibration and threshold are chosen without the rows they are tried on. The length threshold is the one
that is best on the whole data, which favours it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

from bench.lib import plot
from bench.lib.command import DOCS, parser, tell
from bench.lib.figures import table
from bench.lib.flags import amount, count, folds
from orla_lg.mappers.commands import Row, embed, read_rows, simple_ways
from orla_lg.mappers.fit import Goal, Repeat, Scores, Table, cross_validate, leave_one_out, mean_and_spread, score
from orla_lg.mappers.learned import Endpoint
from orla_lg.mappers.one_bit import OneBitStageMapper, last_user_text, parse

COLUMNS = ("accuracy", "light_share", "cost", "quality", "auc", "brier", "ece")
HEADS = ("accuracy", "to light", "cost", "quality", "AUC", "Brier", "ECE")
PROBABILITIES = ("auc", "brier", "ece")
"""Columns that only a way with probabilities has."""


@dataclass
class Way:
    name: str
    scores: list[Scores]
    probable: list[float] = field(default_factory=list)
    """Out-of-fold probabilities, for the curve."""

    def cells(self) -> list[str]:
        rows = [asdict(one) for one in self.scores]
        return [self._cell(name, [row[name] for row in rows]) for name in COLUMNS]

    def _cell(self, name: str, values: list[float]) -> str:
        if name in PROBABILITIES and not self.probable and not (name == "auc" and "long" in self.name):
            return "–"
        mean, spread = mean_and_spread(values)
        return f"{mean:.3f} ± {spread:.3f}" if len(values) > 1 else f"{mean:.3f}"


def learned(name: str, table: Table, labels: Sequence[bool], goal: Goal, args: argparse.Namespace) -> Way:
    def show(done: int, total: int) -> None:
        tell(f"{name}: {done}/{total}", last=done == total)

    passes = cross_validate(table, goal, folds=args.folds, repeats=args.repeats, progress=show)
    scores = [score(one.probable, one.sent, labels, goal.light_price) for one in passes]
    mean = [sum(each) / len(each) for each in zip(*(one.probable for one in passes), strict=True)]
    return Way(name, scores, mean)


def judged(args: argparse.Namespace, rows: Sequence[Row], labels: Sequence[bool]) -> tuple[Way, int]:
    """Ask a model about each prompt; one that says neither makes it complex, as ``OneBitStageMapper`` does."""
    sent, silent, judge = [], 0, OneBitStageMapper("light", "heavy")
    with httpx.Client(timeout=120) as http:
        for done, row in enumerate(rows, 1):
            body = {"model": args.judge_model, **judge._body(row.prompt.text, constrained=True)}
            answer = http.post(f"{args.judge_url.rstrip('/')}/chat/completions", json=body).raise_for_status().json()
            simple = parse(last_user_text([{**answer["choices"][0]["message"], "role": "user"}]))
            silent += simple is None
            sent.append(not simple)
            tell(f"judge: {done}/{len(rows)}", last=done == len(rows))
    scores = [score([0.5] * len(sent), sent, labels, args.light_price)]
    return Way(f"one-bit judge ({args.judge_model})", scores), silent


def groups_of(tried: dict[str, Repeat], labels: Sequence[bool], groups: Sequence[str], price: float) -> list[str]:
    lines = []
    for group in [*sorted(set(groups)), ""]:
        rows = [n for n, one in enumerate(groups) if not group or one == group]
        cells = []
        for one in tried.values():
            sent, probable = [one.sent[n] for n in rows], [one.probable[n] for n in rows]
            found = score(probable, sent, [labels[n] for n in rows], price)
            cells.append(f"{found.accuracy:.3f} ({found.light_share:.2f} to light)")
        lines.append([group or "together", str(len(rows)), *cells])
    return table(["left out in training", "prompts", *tried], lines)


def curve(probable: Sequence[float], labels: Sequence[bool], price: float) -> list[tuple[float, float]]:
    cuts = [2.0, *sorted(set(probable), reverse=True)]
    found = [score(probable, [p >= cut for p in probable], labels, price) for cut in cuts]
    return [(one.cost, one.quality) for one in found]


def draw(ways: Sequence[Way], labels: Sequence[bool], price: float, path: Path) -> None:
    """Draw cost against quality: a curve for what has probabilities, a point for every way."""
    figure, axes = plot.pyplot("router", 10).subplots(figsize=(7, 4.6))
    simple = 1 - sum(labels) / len(labels)
    axes.plot([price, 1], [simple, 1], color="#999", ls="--", lw=1, label="random")
    colours = iter(["#3b7dd8", "#4a9d5b", "#8a5bb0"])
    for way in ways:
        cost, _ = mean_and_spread([one.cost for one in way.scores])
        quality, _ = mean_and_spread([one.quality for one in way.scores])
        colour = next(colours) if way.probable else "#e08a3c"
        if way.probable:
            axes.plot(*zip(*curve(way.probable, labels, price), strict=True), color=colour, lw=1.5, label=way.name)
        axes.plot(cost, quality, "o", color=colour, ms=6)
        if not way.probable:
            beside = {"xytext": (7, -4), "ha": "left"}
            place = {"xytext": (-3, -17 if cost > 0.95 else 8), "ha": "right"} if cost > 0.8 else beside
            axes.annotate(way.name, (cost, quality), textcoords="offset points", fontsize=8, **place)
    axes.set_xlabel("cost, share of sending everything to heavy")
    axes.set_ylabel("prompts answered well")
    plot.open_axes(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    plot.save(figure, path)


def options() -> argparse.Namespace:
    options = parser("router", __doc__)
    add = options.add_argument
    add("--data", type=Path, required=True, metavar="FILE", help="labelled prompts, JSONL")
    add("--group-by", metavar="FIELD", help="also train without each value of this field and try it")
    add("--light-price", type=amount, default=0.1, metavar="P", help="a light call as a share of a heavy one (0.1)")
    add("--folds", type=folds, default=10)
    add("--repeats", type=count, default=10)
    add("--judge-url", metavar="URL", help="a model that says simple or complex")
    add("--judge-model", default="default", metavar="NAME")
    add("--embed-url", metavar="URL", help="an engine that serves /embeddings")
    add("--embed-model", default="default", metavar="NAME")
    add("--draw", action="store_true", help="draw docs/router.svg")
    return options.parse_args()


def main() -> int:
    args = options()
    rows = read_rows(args.data, args.group_by)
    labels, groups = [row.label for row in rows], [row.group for row in rows]
    goal, prompts = Goal(light_price=args.light_price), [row.prompt for row in rows]
    tables = {"learned, cheap features": Table(prompts, labels)}
    if args.embed_url:
        texts = (row.prompt.text for row in rows)
        vectors = embed(
            Endpoint(args.embed_url, args.embed_model), texts, lambda n: tell(f"embedding {n}/{len(rows)}")
        )
        tables["learned, with embeddings"] = Table(prompts, labels, list(vectors))
    made = [learned(name, table, labels, goal, args) for name, table in tables.items()]
    share, _ = mean_and_spread([one.light_share for one in made[0].scores])
    ways = [Way(name, [found]) for name, found in simple_ways(prompts, labels, share, args.light_price).items()]
    if args.judge_url:
        way, silent = judged(args, rows, labels)
        ways.append(way)
        print(f"the judge said neither {silent} times of {len(rows)}")
    ways += made
    print("\n".join(table(["way", *HEADS], [[way.name, *way.cells()] for way in ways])))
    if args.group_by:
        tried = {name: leave_one_out(each, goal, groups) for name, each in tables.items()}
        print("\n".join(["", *groups_of(tried, labels, groups, args.light_price)]))
    if args.draw:
        draw(ways, labels, args.light_price, DOCS / "router.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
