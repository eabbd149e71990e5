"""The load, and the law: when the final answer's first token comes if nothing but engine and tools takes time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean
from typing import NamedTuple

CALLS, WEIGHTS = (1, 2, 3, 5), (50, 20, 20, 10)
"""In a round, and how often each in a hundred rounds."""
MEDIAN_S, SIGMA = 1.0, 1.0
"""Of a tool's time, a lognormal where no other is given."""

Draw = Callable[[Random], float]
"""Of one tool's time, in seconds."""


class Pace(NamedTuple):
    """An engine's speed for each request; it has room for all of them."""

    tokens_s: float
    prefill_s: float
    """Tokens a second of a prompt that are not in its cache."""

    def times(self, scale: float) -> Pace:
        return Pace(self.tokens_s * scale, self.prefill_s * scale)


class Sizes(NamedTuple):
    """Tokens, of four characters."""

    prompt: int = 800
    """The first one."""
    call: int = 60
    """A call's arguments."""
    result: int = 1500
    """What a tool returns."""
    final: int = 60
    """The final answer."""


SIZES = Sizes()


class Way(NamedTuple):
    """How a graph runs its tools, and what an arm does about that."""

    serial: bool
    early: bool = False
    split: bool = False


class Times(NamedTuple):
    """Seconds after a request's begin."""

    ftr_s: float
    """To the first token of its final answer."""
    end_s: float


class Request(NamedTuple):
    """One run of the graph: its tools' seconds, by round and in the order of the calls."""

    number: int
    rounds: tuple[tuple[float, ...], ...]
    sizes: Sizes = SIZES

    @property
    def text(self) -> str:
        """What the user says: the plan by which the engine answers, and words."""
        calls = ",".join(str(len(tools_s)) for tools_s in self.rounds)
        return filled(f"[plan {self.number}: {calls}; {self.sizes.call}, {self.sizes.final}] ", self.sizes.prompt)

    @property
    def tools_s(self) -> dict[str, float]:
        """The seconds of each tool, by the first word of its argument."""
        each = ((turn, call, s) for turn, tools_s in enumerate(self.rounds) for call, s in enumerate(tools_s))
        return {f"{self.number}.{turn}.{call}": tool_s for turn, call, tool_s in each}


def filled(text: str, tokens: int) -> str:
    """Return *text* with as much after it as makes it so many tokens of four characters."""
    return (text + "word " * tokens)[: 4 * tokens]


def drawn(count: int, seed: int, draw: Draw, most_rounds: int = 4, sizes: Sizes = SIZES) -> list[Request]:
    """Draw requests, as many of one round as of two, three and so on."""
    dice, made = Random(seed), []
    for number in range(count):
        calls = dice.choices(CALLS, WEIGHTS, k=1 + number % most_rounds)
        made.append(Request(number, tuple(tuple(draw(dice) for _ in range(many)) for many in calls), sizes))
    return made


def lognormal(mu: float = math.log(MEDIAN_S), sigma: float = SIGMA) -> Draw:
    return lambda dice: dice.lognormvariate(mu, sigma)


def fitted(quantiles: Mapping[str, float]) -> tuple[float, float]:
    """Return ``mu`` and ``sigma`` of the lognormal nearest to quantiles, such as ``{"0.5": 0.8, "0.95": 6}``."""
    at = [NormalDist().inv_cdf(float(share)) for share in quantiles]
    logs = [math.log(seconds) for seconds in quantiles.values()]
    middle, height = fmean(at), fmean(logs)
    wide = sum((z - middle) ** 2 for z in at)
    if not wide:
        raise ValueError("two quantiles or more are needed")
    sigma = sum((z - middle) * (log - height) for z, log in zip(at, logs, strict=True)) / wide
    return height - sigma * middle, sigma


def latencies(path: Path | None) -> tuple[Draw, str]:
    """Return how tools' times are drawn, and that in words: a lognormal, or what a file holds."""
    if path is None:
        return lognormal(), f"lognormal, median {MEDIAN_S:g} s, sigma {SIGMA:g}"
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("{"):
            mu, sigma = fitted(json.loads(text))
            said = f"lognormal fitted to {path.name}, median {math.exp(mu):.2g} s, sigma {sigma:.2g}"
            return lognormal(mu, sigma), said
        figures = [float(line) for line in text.split()]
        if not figures or not all(0 <= each < math.inf for each in figures):
            raise ValueError("figures are seconds, 0 or more")
        return lambda dice: dice.choice(figures), f"of the {len(figures)} in {path.name}"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        what = "one figure in seconds a line, or a JSON object of quantiles ('0.5': seconds)"
        raise SystemExit(f"--latencies {path}: {error}; expected {what}") from error


def finished(ends_s: Sequence[float], tools_s: Sequence[float], way: Way) -> list[float]:
    """Return when each tool of a round has finished, from when each call's arguments were whole."""
    answered_s = ends_s[-1]
    if way.early:
        return [end_s + tool_s for end_s, tool_s in zip(ends_s, tools_s, strict=True)]
    if way.serial:
        return [answered_s + tool_s for tool_s in accumulate(tools_s)]
    return [answered_s + tool_s for tool_s in tools_s]


def prefilled(ready_s: Sequence[float], tokens: int, tokens_s: float) -> float:
    """Return how much of results, of so many *tokens* each, an idle engine prefills until the last is ready."""
    clock_s, done = ready_s[0], 0.0
    for at_s in ready_s:
        clock_s = max(clock_s, at_s)
        part_s = min(tokens / tokens_s, max(0.0, ready_s[-1] - clock_s))
        clock_s, done = clock_s + part_s, done + part_s * tokens_s
    return done


def law(request: Request, pace: Pace, way: Way) -> Times:
    """Return a request's times on an idle engine whose cache keeps everything, with a graph that takes no time.

    A round of parallel tools ends at ``decode + max(tool)``, one of serial tools at ``decode + sum(tool)``, with
    early starts both at ``max(end of call k + tool k)``. Split prompts are prefilled from a round's first result on,
    in the order of the calls, and never before the answer is whole: what no policy can better.
    """
    sizes, now_s, missing = request.sizes, 0.0, float(request.sizes.prompt)
    for tools_s in request.rounds:
        first_s = now_s + missing / pace.prefill_s
        ends_s = [first_s + (n * sizes.call - 1) / pace.tokens_s for n in range(1, len(tools_s) + 1)]
        ready_s = [max(ends_s[-1], at_s) for at_s in accumulate(finished(ends_s, tools_s, way), max)]
        now_s, missing = ready_s[-1], float(len(tools_s) * sizes.result)
        if way.split:
            missing -= prefilled(ready_s, sizes.result, pace.prefill_s)
    ftr_s = now_s + missing / pace.prefill_s
    return Times(ftr_s, ftr_s + (sizes.final - 1) / pace.tokens_s)
