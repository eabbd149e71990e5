"""Cost and quality: the cheapest backend that is good enough for a stage, where good is learned from feedback.

For each stage and backend there is a belief about the share of good answers, a Beta distribution that begins at the
backend's stated quality. Where the target is *preferred*, Thompson sampling tries a backend as often as it is likely
to be good enough; where it is *strict*, only what is believed counts and nothing is ever tried out on the user.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from orla_lg.arguments import answering
from orla_lg.core.boundary import checked
from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.boundary.stage_rules import StageRules
from orla_lg.core.call import ANSWER_TOKENS, CHARS_PER_TOKEN, Assignment, Call, Considered, Usage
from orla_lg.core.engine.backend import price
from orla_lg.core.engine.speed import averaged
from orla_lg.core.placement.view import BackendView, unfit
from orla_lg.core.record import Record
from orla_lg.errors import ConfigError, MappingError, did_you_mean, shown
from orla_lg.mappers.stages import check_stages
from orla_lg.mappers.table import unknown_backends

Strictness = Literal["strict", "prefer"]

PRIOR_WEIGHT = 10.0
"""A stated quality counts as much as so many scores."""

UNKNOWN_QUALITY = 0.5
"""Of a backend that states none."""

ANSWER_WEIGHT = 0.1
"""Of the newest answer's length in a stage's mean."""

KEEP = 10_000
"""Scored backends of stages, stages and runs remembered; the one not touched longest goes."""

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Belief:
    """What is believed of a backend on a stage: good and bad answers, the stated quality counted in."""

    good: float
    bad: float

    @classmethod
    def of(cls, stated: float | None, good: float = 0.0, bad: float = 0.0) -> Belief:
        """Return the belief after good and bad scores in a backend that states a quality, 0 to 1."""
        mean = UNKNOWN_QUALITY if stated is None else stated
        return cls(PRIOR_WEIGHT * mean + good, PRIOR_WEIGHT * (1 - mean) + bad)

    @property
    def mean(self) -> float:
        """The expected share of good answers."""
        return self.good / (self.good + self.bad)

    def sample(self, chance: random.Random) -> float:
        """Draw a share of good answers that this belief allows."""
        if not (self.good and self.bad):  # a stated 0 or 1 is taken for certain until a score says otherwise
            return self.mean
        return chance.betavariate(self.good, self.bad)


@dataclass(frozen=True, slots=True)
class Option:
    """A backend with what it would cost and how good it is thought to be."""

    view: BackendView
    cost_usd: float
    quality: float
    """The believed mean."""
    judged: float
    """What counts against the target: a sample, or the mean."""


@answering
class CostQualityMapper:
    """Takes the cheapest backend that reaches a target quality, else the best.

    Args:
        target: The share of good answers wanted, 0 to 1.
        stages: ``strict`` or ``prefer`` by stage; found like the entries of a mapping.
        default: For all other stages.
        among: The backends to choose from; all if empty.
        budget_usd: Per run. What a run has left decides what it can afford; when nothing is left it gets the
            cheapest, on strict stages too.
        seed: For the samples; for tests.

    Raises:
        ConfigError: A value is not allowed.
    """

    def __init__(
        self,
        target: float = 0.9,
        stages: Mapping[str, Strictness] | None = None,
        default: Strictness = "prefer",
        among: Sequence[str] = (),
        budget_usd: float | None = None,
        seed: int | None = None,
    ) -> None:
        if not 0 <= checked.number("the target quality", target) <= 1:
            raise ConfigError(f"the target quality must lie in [0, 1], got {target}")
        if budget_usd is not None:
            checked.number("budget_usd", budget_usd, least=0)
        if not isinstance(stages, Mapping | None):
            raise ConfigError(f"stages must be 'strict' or 'prefer' by stage, got {shown(stages)}")
        for given in (default, *(stages or {}).values()):
            if given not in get_args(Strictness):
                raise ConfigError(f"strictness {shown(given)} is unknown{did_you_mean(given, get_args(Strictness))}")
        self.target, self.default, self.stages = target, default, StageRules[Strictness](stages or {})
        self.among, self.budget_usd = tuple(among), budget_usd
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._scores = BoundedDict[tuple[str, str], tuple[float, float]](KEEP)
        """Good and bad ones, by stage and backend; what a backend states of itself is not in them."""
        self._answers = BoundedDict[str, float](KEEP)
        self._spent = BoundedDict[str, float](KEEP)

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        if not call.identity.stage:  # outside any graph the code decides
            return None
        able = self._able(call, backends)
        strictness = self.strictness(call.identity.stage)
        with self._lock:
            options = [self._option(call, view, strictness) for view in able]
            left = self._left(call.identity.run or call.identity.workflow)
        chosen, why = self._choose(options, left)
        others = sorted((each for each in options if each is not chosen), key=lambda each: -each.judged)
        return Assignment(
            chosen.view.name,
            mapper="cost_quality",
            reason=f"{strictness} {self.target:g}: {why}",
            alternatives=tuple(each.view.name for each in others),
            considered=tuple(self._considered(each, chosen, strictness) for each in options),
        )

    def strictness(self, stage: str) -> Strictness:
        """Return how the target counts for a stage."""
        found = self.stages.find(stage)
        return self.default if found is None else found.entry

    def feedback(self, record: Record, score: float) -> None:
        """Learn how good the answer of a call was, 0 to 1."""
        if record.backend is None:
            return
        with self._lock:
            key = (record.stage, record.backend)
            good, bad = self._scores.get(key) or (0.0, 0.0)
            self._scores.set(key, (good + score, bad + 1 - score))

    def note(self, record: Record) -> None:
        """Learn what a finished call cost its run, and how long a stage's answers are."""
        with self._lock:
            run = record.run or record.key
            self._spent.set(run, (self._spent.get(run) or 0.0) + (record.cost_usd or 0.0))
            if record.completion_tokens is not None:
                known = self._answers.get(record.stage)
                self._answers.set(record.stage, averaged(known, record.completion_tokens, ANSWER_WEIGHT))

    def check_backends(self, known: Iterable[str]) -> list[str]:
        """Return a fault for every name that is no backend."""
        return unknown_backends("CostQualityMapper", self.among, known)

    def check_stages(self, known: Iterable[str]) -> list[str]:
        """Return a fault for every stage that is called strict or not and is in no graph."""
        return check_stages(self.stages, known)

    def quality(self, stage: str, backend: BackendView) -> float:
        """Return what is believed of a backend on a stage: the share of good answers."""
        with self._lock:
            return self._belief(stage, backend).mean

    def _able(self, call: Call, backends: Sequence[BackendView]) -> list[BackendView]:
        """Return the backends that can take the call; those left alone now only if there are no others."""
        mine = [view for view in backends if not self.among or view.name in self.among]
        faults = {view.name: unfit(call.ask, view, None) for view in mine}
        able = [view for view in mine if not faults[view.name]]
        if not able:
            lacks = "; ".join(f"{name!r}: {', '.join(each)}" for name, each in faults.items()) or "there is none"
            raise MappingError(f"stage {call.identity.stage!r}: no backend can do what is asked: {lacks}")
        return [view for view in able if not view.shut] or able

    def _option(self, call: Call, view: BackendView, strictness: Strictness) -> Option:
        belief = self._belief(call.identity.stage, view)
        judged = belief.mean if strictness == "strict" else belief.sample(self._chance)
        return Option(view, self._cost_usd(call, view), belief.mean, judged)

    def _belief(self, stage: str, view: BackendView) -> Belief:
        return Belief.of(view.quality, *(self._scores.get((stage, view.name)) or (0.0, 0.0)))

    def _cost_usd(self, call: Call, view: BackendView) -> float:
        """Return what the call is expected to cost there; what its workflow has cached there is cheaper."""
        prompt = call.ask.prompt_chars // CHARS_PER_TOKEN + 1
        answer = self._answers.get(call.identity.stage) or ANSWER_TOKENS
        if call.ask.max_tokens is not None:
            answer = min(answer, call.ask.max_tokens)
        return price(Usage(prompt, min(view.resident_tokens, prompt), round(answer)), view.cost) or 0.0

    def _left(self, run: str) -> float | None:
        return None if self.budget_usd is None else self.budget_usd - (self._spent.get(run) or 0.0)

    def _choose(self, options: Sequence[Option], left_usd: float | None) -> tuple[Option, str]:
        affordable = options
        if left_usd is not None:
            affordable = [each for each in options if each.cost_usd <= left_usd and left_usd > 0]
            if not affordable:
                return min(options, key=_by_cost), "the run's budget is spent, the cheapest"
        good = [each for each in affordable if each.judged >= self.target - _ROUNDING]
        dear = len(options) - len(affordable)
        limit = f" within the run's budget, which {dear} would exceed" if dear else ""
        if good:
            return min(good, key=_by_cost), f"the cheapest of {len(good)} that reach it{limit}"
        return max(affordable, key=lambda each: (each.judged, -each.cost_usd)), f"none reaches it{limit}, the best"

    def _considered(self, option: Option, chosen: Option, strictness: Strictness) -> Considered:
        numbers = {"cost_usd": option.cost_usd, "quality": round(option.quality, 6)}
        if strictness == "prefer":
            numbers["sampled"] = round(option.judged, 6)
        reaches = option.judged >= self.target - _ROUNDING
        verdict = "chosen" if option is chosen else "reaches the target" if reaches else "below the target"
        return Considered(option.view.name, numbers, verdict)


def _by_cost(option: Option) -> tuple[float, float]:
    return option.cost_usd, -option.judged
