"""The requests of a block, the arms (mappers on the engines at hand), and their figures against all heavy."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from bench.lib import plot
from bench.lib.command import tell
from bench.lib.core import NO_HINTS, Ask, Assignment, BackendView, Call, Identity, Mapper
from bench.lib.figures import Rounds, Spread, spread, table
from orla_lg.mappers import OneBitStageMapper
from orla_lg.mappers.commands import Row
from orla_lg.mappers.features import prompt_of
from orla_lg.mappers.fit import Goal, Table, model_of, train
from orla_lg.mappers.learned import LearnedMapper

PAPER_SIMPLE_SHARE = 956 / 2294
USD_PER_MTOKEN_PER_BILLION = 0.1
"""The price of a token, read or written, goes by the model's parameters: the paper does not give its prices."""

BILLIONS = {"smollm2": 0.135, "dummy-0.5b": 0.446, "dummy-1b": 1.07}
FOLDS = 10
LIGHT, HEAVY, WIDE = "light", "heavy", "wide"
BASE = "all heavy, one engine on all cores"


@dataclass(frozen=True)
class Request:
    text: str
    is_complex: bool
    max_tokens: int


def blocks_of(
    rows: Sequence[Row], blocks: int | None, size: int, tokens: tuple[int, int], dice: random.Random
) -> list[list[Request]]:
    """Return blocks with the paper's share of simple prompts, no prompt twice; as many as there are prompts for."""
    simple = round(PAPER_SIMPLE_SHARE * size)
    wanted = {False: simple, True: size - simple}
    kinds = {label: list(dict.fromkeys(row.prompt.text for row in rows if row.label is label)) for label in wanted}
    most = min(len(texts) // max(1, wanted[label]) for label, texts in kinds.items())
    if not most or (blocks or 0) > most:
        raise SystemExit(f"there are prompts for {most} blocks of {size}, each with {wanted[False]} simple ones")
    for texts in kinds.values():
        dice.shuffle(texts)
    made = []
    for _ in range(blocks or most):
        block = [Request(kinds[label].pop(), label, tokens[label]) for label in wanted for _ in range(wanted[label])]
        dice.shuffle(block)
        made.append(block)
    return made


@dataclass(frozen=True)
class Rule:
    """Sends what a function finds simple to one backend, the rest to another one."""

    name: str
    is_simple: Callable[[str], bool]
    light: str
    heavy: str

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        prompt = prompt_of(call)
        assert prompt is not None
        return Assignment(self.light if self.is_simple(prompt.text) else self.heavy, mapper=self.name)


class OutOfFold:
    """Asks, for each prompt, the learned mapper that was trained without it."""

    def __init__(self, rows: Sequence[Row], light: str, heavy: str, light_price: float) -> None:
        self._mappers: dict[str, LearnedMapper] = {}
        folds = folds_of(rows)
        goal = Goal(light_share=PAPER_SIMPLE_SHARE, light_price=light_price)
        for number, fold in enumerate(folds, 1):
            tell(f"training the learned mapper, fold {number}/{len(folds)}", last=number == len(folds))
            left_out = {rows[n].prompt.text for n in fold}
            known = [row for row in rows if row.prompt.text not in left_out]
            table = Table([row.prompt for row in known], [row.label for row in known])
            model = model_of(table, train(table, (table.y >= 0).nonzero()[0], goal), goal, None)
            mapper = LearnedMapper(model, light, heavy)
            self._mappers |= dict.fromkeys(left_out, mapper)

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        prompt = prompt_of(call)
        assert prompt is not None
        return self._mappers[prompt.text].map(call, backends)


def folds_of(rows: Sequence[Row]) -> list[list[int]]:
    """Return row numbers in folds that hold each label alike; a prompt that comes twice stays in one fold."""
    texts = list(dict.fromkeys((row.label, row.prompt.text) for row in rows))
    random.Random(0).shuffle(texts)
    texts.sort(key=lambda one: one[0])
    fold_of = {text: n % FOLDS for n, (_, text) in enumerate(texts)}
    return [[n for n, row in enumerate(rows) if fold_of[row.prompt.text] == fold] for fold in range(FOLDS)]


@dataclass(frozen=True)
class Run:
    """One arm's turn in a block."""

    arm: str
    seed: int
    """The block's number."""
    wall_s: float
    completion_s: float
    """The mean, from a request's arrival to its last token."""
    cost_usd: float
    score: float
    light_share: float
    answer_tokens: int
    cached_tokens: int


@dataclass
class Arm:
    name: str
    mapper: Mapper


def arms_of(args: argparse.Namespace, rows: Sequence[Row], blocks: list[list[Request]]) -> list[Arm]:
    """Return the arms of a layout."""
    heavy, layout = {"shared": WIDE, "split": HEAVY}[args.layout], args.layout
    labels, cut = {row.prompt.text: row.label for row in rows}, length_cut(rows)
    drawn = chosen_by_chance(blocks, random.Random(args.seed + 1))
    judge = [Arm(f"one-bit judge, {layout}", OneBitStageMapper(LIGHT, heavy))] if args.judge else []
    return [
        Arm(BASE, Rule("all", lambda text: False, LIGHT, WIDE)),
        Arm(f"labels, {layout}", Rule("labels", lambda text: not labels[text], LIGHT, heavy)),
        Arm(f"learned, {layout}", OutOfFold(rows, LIGHT, heavy, args.light_billions / args.heavy_billions)),
        *judge,
        Arm(f"random, {layout}", Rule("random", drawn.__contains__, LIGHT, heavy)),
        Arm(f"shortest to light, {layout}", Rule("length", lambda text: len(text) <= cut, LIGHT, heavy)),
        Arm("all light", Rule("all", lambda text: True, LIGHT, heavy)),
    ]


def chosen_by_chance(blocks: list[list[Request]], dice: random.Random) -> set[str]:
    """Return the paper's share of each block's prompts, drawn without a look at them."""
    texts = [[request.text for request in block] for block in blocks]
    return {text for block in texts for text in dice.sample(block, round(PAPER_SIMPLE_SHARE * len(block)))}


def length_cut(rows: Sequence[Row]) -> int:
    """Return the length up to which the paper's share of all prompts lies."""
    lengths = sorted(len(row.prompt.text) for row in rows)
    return lengths[max(0, round(PAPER_SIMPLE_SHARE * len(lengths)) - 1)]


def on_all_prompts(arms: Sequence[Arm], rows: Sequence[Row]) -> list[str]:
    """Return how the mappers do on every prompt there is, by label, so that a lucky block misleads no reader."""
    lines, share, complex_ = [], PAPER_SIMPLE_SHARE, sum(row.label for row in rows)
    for arm in arms:
        if not isinstance(arm.mapper, OutOfFold) and getattr(arm.mapper, "name", "") not in ("length", "labels"):
            continue
        light = {False: 0, True: 0}
        for row in rows:
            ask = Ask("auto", [{"role": "user", "content": row.prompt.text}])
            call = Call("any", Identity("any", None, "answer"), ask, NO_HINTS, NO_HINTS, 0.0)
            sent = arm.mapper.map(call, ())
            light[row.label] += sent is not None and sent.backend == LIGHT
        simple_light, complex_light = light[False] / (len(rows) - complex_), light[True] / complex_
        lines.append(
            f"{arm.name}: {simple_light:.0%} of all simple and {complex_light:.0%} of all complex prompts to light; "
            f"at the paper's share {share * simple_light + (1 - share) * complex_light:.0%} to light, "
            f"score {1 - (1 - share) * complex_light:.2f}"
        )
    return lines


GOALS = {"wall_s": -0.38, "completion_s": -0.60, "cost_usd": -0.35}
"""Of the mapped arms against all heavy: the paper's figures."""


def figure(name: str) -> Callable[[Run], float]:
    return lambda run: float(getattr(run, name))


def change(runs: Rounds[Run], arm: str, name: str) -> Spread:
    """Return by how much an arm differs from all heavy in the same block, with the extreme blocks."""
    return spread([ratio - 1 for ratio in runs.ratios(arm, BASE, figure(name))])


def report(runs: Rounds[Run]) -> list[str]:
    head, lines = ["arm", "to light"], []
    for title in ("wall-clock, s", "mean completion, s", "cost, µ$"):
        head += [title, "change"]
    for arm in runs.arms:
        light, score = (fmean(runs.column(arm, figure(name))) for name in ("light_share", "score"))
        cells = []
        for name, scale in (("wall_s", 1), ("completion_s", 1), ("cost_usd", 1e6)):
            shown = "baseline" if arm == BASE else change(runs, arm, name).shown("+.0%", bold=True)
            cells += [f"{median(runs.column(arm, figure(name))) * scale:.1f}", shown]
        lines.append([arm, f"{light:.0%}", *cells, f"{score:.2f}"])
    return table([*head, "score"], lines)


def draw(runs: Rounds[Run], path: Path) -> None:
    """Draw the changes against all heavy with the extreme blocks, and the score."""
    titles = {"wall_s": "wall-clock", "completion_s": "mean completion time", "cost_usd": "cost"}
    scores = {arm: fmean(runs.column(arm, figure("score"))) for arm in runs.arms}
    size = (11, 0.4 * len(scores) + 1.3)
    drawn, panes = plot.pyplot("mapping", 8).subplots(1, 4, figsize=size, sharey=True)
    colours = ["#999" if arm == BASE else "#e08a3c" if score < 1 else "#3b7dd8" for arm, score in scores.items()]
    for axes, (name, title) in zip(panes, titles.items(), strict=False):
        changed = {arm: spread(runs.ratios(arm, BASE, figure(name))) for arm in runs.arms}
        plot.bars(axes, changed, colours, 1 + GOALS[name], "#777")
        axes.set(title=title, xlabel="of all heavy (dashed: goal)")
    panes[3].barh([*scores], [*scores.values()], color=colours, height=0.6)
    panes[3].set(title="score", xlabel="answered by a model that can")
    panes[0].invert_yaxis()
    plot.open_axes(*panes)
    plot.save(drawn, path)


def misses(runs: Rounds[Run]) -> list[str]:
    """Return what the mapped arms with the full score, or learned, do not reach."""
    return [
        f"goal missed: {arm}: {name.rpartition('_')[0]} {middle:+.0%}, wanted {goal:+.0%}"
        for arm in runs.arms
        if arm.startswith(("labels", "learned"))
        for name, goal in GOALS.items()
        if (middle := change(runs, arm, name).middle) > goal
    ]
