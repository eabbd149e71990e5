"""Least squares for the few numbers of a step-time model; none may come out negative."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

_ROUNDS = 20_000
_CLOSE = 1e-12


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured time, and how often each term of the model is in it."""

    what: str
    """The kind of measurement, for the table of errors."""
    measured_s: float
    terms: Mapping[str, float]

    def predicted_s(self, costs: Mapping[str, float]) -> float:
        """Return the time that the model gives."""
        return sum(costs.get(name, 0.0) * times for name, times in self.terms.items())

    def error(self, costs: Mapping[str, float]) -> float:
        """Return how far the model is off, as a part of what was measured."""
        return self.predicted_s(costs) / self.measured_s - 1


def fit(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the cost of each term that makes the sum of squared *relative* errors least, none below zero.

    Coordinate descent on the normal equations: there are fewer than ten terms, and it needs no linear algebra.
    """
    names = sorted({name for sample in samples for name in sample.terms})
    rows = [[sample.terms.get(name, 0.0) / sample.measured_s for name in names] for sample in samples]
    # Terms differ by many orders of magnitude; scaled to one they converge together.
    scale = [sum(row[j] ** 2 for row in rows) ** 0.5 or 1.0 for j in range(len(names))]
    gram = [
        [sum(row[i] * row[j] for row in rows) / scale[i] / scale[j] for j in range(len(names))]
        for i in range(len(names))
    ]
    aim = [sum(row[j] for row in rows) / scale[j] for j in range(len(names))]
    found = [0.0] * len(names)
    for _ in range(_ROUNDS):
        moved = 0.0
        for j, row in enumerate(gram):
            rest = aim[j] - sum(value * found[k] for k, value in enumerate(row) if k != j)
            new = max(0.0, rest / row[j]) if row[j] else 0.0
            moved, found[j] = max(moved, abs(new - found[j])), new
        if moved < _CLOSE:
            break
    return {name: value / size for name, value, size in zip(names, found, scale, strict=True)}


def errors(samples: Sequence[Sample], costs: Mapping[str, float]) -> dict[str, float]:
    """Return for each kind of sample the median of its absolute relative errors."""
    kinds = dict.fromkeys(sample.what for sample in samples)
    return {kind: median(abs(sample.error(costs)) for sample in samples if sample.what == kind) for kind in kinds}
