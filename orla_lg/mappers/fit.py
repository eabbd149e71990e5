"""Fitting a learned mapper: penalised logistic regression, calibrated, with a threshold for what is wanted.

Everything that is chosen (features, penalty, calibration, threshold) is chosen inside ``train`` from the rows it is
given; ``cross_validate`` calls the same ``train`` on each fold's training rows, so no figure has seen its own answer.
Needs scikit-learn (``pip install 'orla-lg[mapper]'``); what comes out needs nothing.
"""

from __future__ import annotations

import importlib
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any, Literal

from orla_lg.errors import ConfigError
from orla_lg.mappers.alike import near_duplicates
from orla_lg.mappers.features import DENSE, UserPrompt, features
from orla_lg.mappers.learned import Calibration, Endpoint, Isotonic, Model, Platt

BUCKETS = 1024
HASHED_SCALE, EMBEDDING_SCALE = 3.0, 0.3
"""How large the other blocks are beside standardised dense features: less is penalised more."""

INNER_FOLDS = 5
ISOTONIC_FROM_ROWS = 1_000
"""Fewer rows make isotonic steps of single prompts."""

Progress = Callable[[int, int], None]
"""Called with ``(fits_done, fits_total)``."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to fit; the one with the least out-of-fold log loss is taken."""

    penalty: Literal["l1", "l2"]
    strength: float
    """scikit-learn's C: smaller penalises more."""
    hashed: bool = False


CHEAP = (
    Candidate("l1", 0.1),
    Candidate("l1", 0.3),
    Candidate("l2", 0.01),
    Candidate("l2", 0.1),
    Candidate("l2", 0.01, hashed=True),
    Candidate("l2", 0.1, hashed=True),
)
EMBEDDING = (Candidate("l2", 0.0003), Candidate("l2", 0.001), Candidate("l2", 0.003), Candidate("l2", 0.01))


@dataclass(frozen=True, slots=True)
class Goal:
    """What the threshold is chosen for: one of the three, or accuracy."""

    quality: float | None = None
    """At least this share of the complex prompts goes to the complex backend, at the least cost."""
    light_share: float | None = None
    """This share of all prompts goes to the simple backend."""
    cost: float | None = None
    """At most this share of the cost of sending everything to the complex backend."""
    light_price: float = 0.1
    """A call on the simple backend, as a share of one on the complex backend."""

    def __post_init__(self) -> None:
        wanted = [value for value in (self.quality, self.light_share, self.cost) if value is not None]
        if len(wanted) > 1:
            raise ConfigError("choose the threshold for a quality, a light share or a cost, not for two of them")
        if not all(0 <= value <= 1 for value in (*wanted, self.light_price)):
            raise ConfigError("quality, light share, cost and the light price are shares, from 0 to 1")

    def __str__(self) -> str:
        names = {"quality": self.quality, "light share": self.light_share, "cost": self.cost}
        return next((f"{name} {value:g}" for name, value in names.items() if value is not None), "accuracy")


@dataclass(frozen=True, slots=True)
class Scores:
    """How a way of sending did; costs are shares of sending everything to the complex backend."""

    accuracy: float
    light_share: float
    cost: float
    quality: float
    """Share of prompts answered well: those that are simple, and those sent to the complex backend."""
    complex_caught: float
    auc: float
    brier: float
    ece: float


# Data -----------------------------------------------------------------------------------------------------


class Table:
    """Features and labels of the data, as arrays."""

    def __init__(
        self, prompts: Sequence[UserPrompt], labels: Sequence[bool], embeddings: Sequence[Sequence[float]] = ()
    ) -> None:
        np = _numpy()
        rows = [features(prompt, 0 if embeddings else BUCKETS) for prompt in prompts]
        self.y = np.array(labels, dtype=int)
        self.groups = np.array(near_duplicates([prompt.text for prompt in prompts]))
        """For each row a number that near-duplicates share."""
        self.dense = np.array([dense for dense, _ in rows], dtype=float)
        self.embedding = np.array(embeddings, dtype=float) if embeddings else np.zeros((len(rows), 0))
        self.hashed = np.zeros((len(rows), 0 if embeddings else BUCKETS))
        for row, (_, words) in enumerate(rows):
            for bucket, weight in words.items():
                self.hashed[row, bucket] = weight

    def __len__(self) -> int:
        return len(self.y)

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The ways to fit that are tried on this data."""
        return EMBEDDING if self.embedding.shape[1] else CHEAP

    def block(self, candidate: Candidate) -> Any:
        """Return the columns that *candidate* uses, side by side."""
        others = self.hashed if candidate.hashed else self.embedding
        return _numpy().hstack([self.dense, others])


@dataclass(frozen=True, slots=True)
class Linear:
    """Weights on the features as they come: standardisation is folded in."""

    intercept: float
    weights: Any

    def logits(self, block: Any) -> Any:
        """Return the score of each row."""
        return block @ self.weights + self.intercept


def fit_linear(table: Table, rows: Any, candidate: Candidate) -> Linear:
    """Fit *candidate* on *rows*."""
    np, block = _numpy(), table.block(candidate)[rows]
    mean, scale = block.mean(axis=0), block.std(axis=0)
    dead = scale < 1e-12
    dense = table.dense.shape[1]
    if candidate.hashed:  # buckets are comparable as they are, and standardising would blow up the rare ones
        mean[dense:], scale[dense:] = 0.0, 1 / HASHED_SCALE
    else:
        scale[dense:] /= EMBEDDING_SCALE
    scale[dead] = 1.0
    kind: dict[str, dict[str, Any]] = {
        "l1": {"l1_ratio": 1.0, "solver": "liblinear", "intercept_scaling": 10.0},
        "l2": {"l1_ratio": 0.0},
    }
    regression = _sklearn("linear_model").LogisticRegression(
        C=candidate.strength, max_iter=3_000, random_state=0, **kind[candidate.penalty]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _sklearn("exceptions").ConvergenceWarning)
        regression.fit((block - mean) / scale, table.y[rows])
    weights = np.where(dead, 0.0, regression.coef_[0] / scale)
    return Linear(float(regression.intercept_[0] - weights @ mean), weights)


# Training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """What ``train`` chose."""

    candidate: Candidate
    linear: Linear
    calibration: Calibration
    threshold: float
    out_of_fold: list[float]
    """Calibrated probabilities of the training rows, each from a fit that had not seen it."""


def train(table: Table, rows: Any, goal: Goal, *, calibration: str = "auto", seed: int = 0) -> Trained:
    """Choose the candidate, fit it, calibrate it and choose the threshold, all from *rows*."""
    labels = table.y[rows]
    best = min(
        ((_loss(labels, scores), n, scores) for n, scores in enumerate(_out_of_fold(table, rows, seed))),
        key=lambda found: found[:2],
    )
    _, chosen, scores = best
    calibrated = calibrate(scores, labels, calibration)
    probable = [calibrated.probability(float(score)) for score in scores]
    candidate = table.candidates[chosen]
    threshold = choose_threshold(probable, [bool(label) for label in labels], goal)
    return Trained(candidate, fit_linear(table, rows, candidate), calibrated, threshold, probable)


def _out_of_fold(table: Table, rows: Any, seed: int) -> Iterator[Any]:
    """Yield, for each candidate, the scores of *rows* by fits that had not seen them."""
    np = _numpy()
    folds = list(_folds(table, rows, INNER_FOLDS, seed))
    for candidate in table.candidates:
        scores = np.zeros(len(rows))
        for known, unknown in folds:
            linear = fit_linear(table, rows[known], candidate)
            scores[unknown] = linear.logits(table.block(candidate)[rows[unknown]])
        yield scores


def _folds(table: Table, rows: Any, folds: int, seed: int) -> Iterator[tuple[Any, Any]]:
    """Yield what to learn from and what to try, of *rows*; near-duplicates are never parted."""
    labels, groups = table.y[rows], table.groups[rows]
    selection, blank = _sklearn("model_selection"), _numpy().zeros(len(rows))
    if len(set(groups.tolist())) == len(rows):
        yield from selection.StratifiedKFold(folds, shuffle=True, random_state=seed).split(blank, labels)
    else:
        grouped = selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        yield from grouped.split(blank, labels, groups)


def _loss(labels: Any, scores: Any) -> float:
    np = _numpy()
    return float(np.mean(np.logaddexp(0, np.where(labels, -scores, scores))))


def calibrate(scores: Any, labels: Any, kind: str = "auto") -> Calibration:
    """Fit a curve from out-of-fold scores to probabilities."""
    if kind == "isotonic" or (kind == "auto" and len(labels) >= ISOTONIC_FROM_ROWS):
        curve = _sklearn("isotonic").IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        curve.fit(scores, labels)
        at, risen = curve.X_thresholds_.tolist(), curve.y_thresholds_.tolist()
        return Isotonic(tuple(at), tuple(risen))
    # Platt's own targets: they keep the curve from trusting a few rows too much.
    complex_, simple = int(labels.sum()), int(len(labels) - labels.sum())
    np = _numpy()
    targets = np.where(labels, (complex_ + 1) / (complex_ + 2), 1 / (simple + 2))
    regression = _sklearn("linear_model").LogisticRegression(C=1e6, max_iter=1_000)
    regression.fit(
        np.tile(scores.reshape(-1, 1), (2, 1)),
        np.repeat([1, 0], len(scores)),
        sample_weight=np.concatenate([targets, 1 - targets]),
    )
    slope = float(regression.coef_[0][0])
    if slope > 0:
        return Platt(slope, float(regression.intercept_[0]))
    base = complex_ / len(labels)  # the scores say nothing, or the contrary: then the share is all that is known
    return Platt(0.0, log(base / (1 - base)))


def choose_threshold(probable: Sequence[float], labels: Sequence[bool], goal: Goal) -> float:
    """Return the threshold on out-of-fold probabilities that meets *goal*."""
    if goal.quality is not None:
        caught = sorted((p for p, label in zip(probable, labels, strict=True) if label), reverse=True)
        needed = ceil(round(goal.quality * len(caught), 9))
        return _below(caught[needed - 1], probable) if needed else 1.0
    if goal.light_share is not None:
        return _share(probable, round(goal.light_share * len(probable)))
    if goal.cost is not None:
        heavy = (goal.cost - goal.light_price) / (1 - goal.light_price) if goal.light_price < 1 else 1.0
        if heavy < 0:
            raise ConfigError(f"cost {goal.cost:g} is less than all-light costs ({goal.light_price:g})")
        return _share(probable, ceil(round((1 - heavy) * len(probable), 9)))
    return 0.5


def _below(value: float, probable: Sequence[float]) -> float:
    """Return a threshold just between *value*, which stays above it, and the next lower probability."""
    lower = max((p for p in probable if p < value), default=0.0)
    return (value + lower) / 2


def _share(probable: Sequence[float], light: int) -> float:
    ordered = sorted(probable)
    if light <= 0:
        return 0.0
    return 1.0 if light >= len(ordered) else (ordered[light - 1] + ordered[light]) / 2


# Judging --------------------------------------------------------------------------------------------------


def score(probable: Sequence[float], sent: Sequence[bool], labels: Sequence[bool], light_price: float) -> Scores:
    """Return how sending the prompts in *sent* to the complex backend did."""
    count, complex_ = len(labels), sum(labels)
    heavy = sum(sent)
    pairs = list(zip(sent, labels, strict=True))
    caught = sum(went and label for went, label in pairs)
    return Scores(
        accuracy=sum(went == label for went, label in pairs) / count,
        light_share=1 - heavy / count,
        cost=(heavy + (count - heavy) * light_price) / count,
        quality=(count - complex_ + caught) / count,
        complex_caught=caught / max(complex_, 1),
        auc=auc(probable, labels),
        brier=sum((p - label) ** 2 for p, label in zip(probable, labels, strict=True)) / count,
        ece=calibration_error(probable, labels),
    )


def auc(probable: Sequence[float], labels: Sequence[bool]) -> float:
    """Return how often a complex prompt is found more probable than a simple one; ties count half."""
    pairs = list(zip(probable, labels, strict=True))
    high, low = [p for p, label in pairs if label], [p for p, label in pairs if not label]
    if not high or not low:
        return 0.5
    return sum((one > other) + (one == other) / 2 for one in high for other in low) / (len(high) * len(low))


def calibration_error(probable: Sequence[float], labels: Sequence[bool], bins: int = 10) -> float:
    """Return the mean gap between predicted probability and share found, over equally wide bins."""
    binned: dict[int, list[tuple[float, bool]]] = {}
    for p, label in zip(probable, labels, strict=True):
        binned.setdefault(min(int(p * bins), bins - 1), []).append((p, label))
    gaps = (abs(sum(p - label for p, label in inside)) for inside in binned.values())
    return sum(gaps) / len(labels)


@dataclass(frozen=True, slots=True)
class Repeat:
    """One pass of cross-validation: for each row the prediction of models fitted without it."""

    probable: list[float]
    sent: list[bool]


def cross_validate(
    table: Table, goal: Goal, *, folds: int, repeats: int, calibration: str = "auto", progress: Progress | None = None
) -> list[Repeat]:
    """Train and try, *folds* times per repeat, on rows that training has not seen."""
    passes = []
    for repeat in range(repeats):
        splits = list(_folds(table, _numpy().arange(len(table)), folds, 1_000 + repeat))

        def tell(done: int, before: int = repeat * folds) -> None:
            if progress is not None:
                progress(before + done, repeats * folds)

        passes.append(_try(table, goal, splits, calibration, tell))
    return passes


def leave_one_out(table: Table, goal: Goal, groups: Sequence[str], *, calibration: str = "auto") -> Repeat:
    """Train on all groups but one and try that one, for each: what a mapper does with a kind it has not seen."""
    found = _numpy().array(groups)
    splits = [((found != group).nonzero()[0], (found == group).nonzero()[0]) for group in sorted(set(groups))]
    return _try(table, goal, splits, calibration, lambda done: None)


def _try(
    table: Table, goal: Goal, splits: Sequence[tuple[Any, Any]], calibration: str, tell: Callable[[int], None]
) -> Repeat:
    probable, sent = [0.0] * len(table), [False] * len(table)
    for done, (known, unknown) in enumerate(splits, 1):
        trained = train(table, known, goal, calibration=calibration, seed=done)
        logits = trained.linear.logits(table.block(trained.candidate)[unknown])
        for row, logit in zip(unknown, logits, strict=True):
            probable[row] = trained.calibration.probability(float(logit))
            sent[row] = probable[row] >= trained.threshold
        tell(done)
    return Repeat(probable, sent)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def model_of(table: Table, chosen: Trained, goal: Goal, endpoint: Endpoint | None, **fields: Any) -> Model:
    """Return what ``train`` chose in the form that decides calls."""
    dense, weights = len(DENSE), [float(weight) for weight in chosen.linear.weights]
    rest = weights[dense:]
    labels = [bool(label) for label in table.y]
    sent = [p >= chosen.threshold for p in chosen.out_of_fold]
    found = score(chosen.out_of_fold, sent, labels, goal.light_price)
    expected = {
        name: getattr(found, name) for name in ("accuracy", "light_share", "cost", "quality", "complex_caught")
    }
    return Model(
        intercept=chosen.linear.intercept,
        dense=tuple(weights[:dense]),
        threshold=chosen.threshold,
        calibration=chosen.calibration,
        buckets=BUCKETS if chosen.candidate.hashed else 0,
        hashed={n: weight for n, weight in enumerate(rest) if weight} if chosen.candidate.hashed else {},
        embedding=() if chosen.candidate.hashed else tuple(rest),
        endpoint=endpoint,
        spread=tuple(float(one) for one in table.dense.std(axis=0)),
        expected={"wanted": str(goal), "light_price": goal.light_price, **expected},
        **fields,
    )


def _numpy() -> Any:
    _sklearn("linear_model")
    return importlib.import_module("numpy")


def _sklearn(part: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{part}")
    except ImportError as error:
        raise ConfigError(
            f"fitting needs scikit-learn, which cannot be imported ({error}); "
            "it comes with `pip install 'orla-lg[mapper]'`"
        ) from error
