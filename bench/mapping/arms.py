"""The requests of a block, and the arms: mappers on the engines at hand."""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.lib.core import NO_HINTS, Ask, Assignment, BackendView, Call, Identity, Mapper
from bench.lib.progress import tell
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
LIGHT, HEAVY, SECOND, WIDE = "light", "heavy", "second-heavy", "wide"


# The requests -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    text: str
    is_complex: bool
    max_tokens: int


def blocks_of(
    rows: Sequence[Row], blocks: int | None, size: int, tokens: tuple[int, int], dice: random.Random
) -> list[list[Request]]:
    """Return blocks with the paper's share of simple prompts, no prompt twice; as many as there are prompts for.

    Raises:
        SystemExit: There are too few for *blocks*.
    """
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


# The arms ---------------------------------------------------------------------------------------------------


class Rule:
    """Sends what a function finds simple to one backend, the rest to others in turn."""

    def __init__(self, name: str, is_simple: Callable[[str], bool], light: str, heavy: Sequence[str]) -> None:
        self.name, self.is_simple, self.light = name, is_simple, light
        self._turns = itertools.cycle(heavy)

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        prompt = prompt_of(call)
        assert prompt is not None
        simple = self.is_simple(prompt.text)
        return Assignment(self.light if simple else next(self._turns), mapper=self.name)


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
    is_baseline: bool = False
    runs: list[Run] = field(default_factory=list)


def arms_of(args: argparse.Namespace, rows: Sequence[Row], blocks: list[list[Request]], known: set[str]) -> list[Arm]:
    """Return the arms that the engines at hand allow."""
    found, light_price = [], args.light_billions / args.heavy_billions

    def never(text: str) -> bool:
        return False

    if WIDE in known:
        found.append(Arm("all heavy, one engine on all cores", Rule("all", never, LIGHT, [WIDE]), is_baseline=True))
    if {HEAVY, SECOND} <= known:
        both = Rule("all", never, LIGHT, [HEAVY, SECOND])
        found.append(Arm("all heavy, two engines of one core", both, is_baseline=True))
    labels = {row.prompt.text: row.label for row in rows}
    layouts = {"shared": WIDE, "split": HEAVY}
    main = args.layout if layouts[args.layout] in known else next(k for k, v in layouts.items() if v in known)
    heavy = layouts[main]
    found.append(Arm(f"labels, {main}", Rule("labels", lambda text: not labels[text], LIGHT, [heavy])))
    for other in {*layouts} - {main}:
        if layouts[other] in known:
            rule = Rule("labels", lambda text: not labels[text], LIGHT, [layouts[other]])
            found.append(Arm(f"labels, {other}", rule))
    if not args.labels_only:
        found.append(Arm(f"learned, {main}", OutOfFold(rows, LIGHT, heavy, light_price)))
        if args.judge:
            found.append(Arm(f"one-bit judge, {main}", OneBitStageMapper(LIGHT, heavy)))
        drawn = chosen_by_chance(blocks, random.Random(args.seed + 1))
        found.append(Arm(f"random, {main}", Rule("random", drawn.__contains__, LIGHT, [heavy])))
        cut = length_cut(rows)
        found.append(Arm(f"shortest to light, {main}", Rule("length", lambda t: len(t) <= cut, LIGHT, [heavy])))
        found.append(Arm("all light", Rule("all", lambda text: True, LIGHT, [heavy])))
    return found


def chosen_by_chance(blocks: list[list[Request]], dice: random.Random) -> set[str]:
    """Return the paper's share of each block's prompts, drawn without a look at them."""
    texts = [[request.text for request in block] for block in blocks]
    return {text for block in texts for text in dice.sample(block, round(PAPER_SIMPLE_SHARE * len(block)))}


def length_cut(rows: Sequence[Row]) -> int:
    """Return the length up to which the paper's share of all prompts lies."""
    lengths = sorted(len(row.prompt.text) for row in rows)
    return lengths[max(0, round(PAPER_SIMPLE_SHARE * len(lengths)) - 1)]


def on_all_prompts(arms: Sequence[Arm], rows: Sequence[Row]) -> str:
    """Return how the mappers do on every prompt there is, by label, so that a lucky block misleads nobody."""
    lines = []
    for arm in arms:
        if not isinstance(arm.mapper, OutOfFold) and getattr(arm.mapper, "name", "") not in ("length", "labels"):
            continue
        light = {False: 0, True: 0}
        for row in rows:
            ask = Ask("auto", [{"role": "user", "content": row.prompt.text}])
            call = Call("any", Identity("any", None, "answer"), ask, NO_HINTS, NO_HINTS, 0.0)
            sent = arm.mapper.map(call, ())  # type: ignore[union-attr]
            light[row.label] += sent is not None and sent.backend == LIGHT
        complex_ = sum(row.label for row in rows)
        simple_light, complex_light = light[False] / (len(rows) - complex_), light[True] / complex_
        share = PAPER_SIMPLE_SHARE
        lines.append(
            f"{arm.name}: {simple_light:.0%} of all simple and {complex_light:.0%} of all complex prompts to light; "
            f"at the paper's share {share * simple_light + (1 - share) * complex_light:.0%} to light, "
            f"score {1 - (1 - share) * complex_light:.2f}"
        )
    return "\n".join(lines)
