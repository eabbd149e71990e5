"""A learned mapper: the probability that a prompt is complex, from one file that ``orla-lg mapper fit`` wrote.

The file is JSON: weights, calibration, threshold, and how they came about. Deciding needs the standard library
only. ``LearnedMapper`` looks at the text alone; ``EmbeddingMapper`` asks an engine for the text's embedding first.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, isfinite
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx

from orla_lg.arguments import answering
from orla_lg.core.boundary.bounded import parse_json, read_body
from orla_lg.core.call import Assignment, Call, Considered
from orla_lg.core.mapping import Planned, at_each_call
from orla_lg.core.placement.view import BackendView
from orla_lg.errors import ConfigError, did_you_mean
from orla_lg.mappers.features import DENSE, VERSION, UserPrompt, features, prompt_of, sendable
from orla_lg.mappers.table import unknown_backends

log = logging.getLogger("orla_lg")

FORMAT = "orla-lg learned mapper"
FORMAT_VERSION = 1
MAX_BUCKETS = 1 << 20
MAX_BYTES = 4 * 1024 * 1024
"""Of an engine's answer with one vector."""


def sigmoid(logit: float) -> float:
    """Return the logistic function without overflow."""
    if logit >= 0:
        return 1 / (1 + exp(-logit))
    return exp(logit) / (1 + exp(logit))


class Calibration(Protocol):
    """Turns the model's score into a probability that can be taken at its word; never falls as the score rises."""

    def probability(self, logit: float) -> float:
        """Return the probability that a prompt with this score is complex."""

    def asdict(self) -> dict[str, Any]:
        """Return it as it is stored."""


@dataclass(frozen=True, slots=True)
class Platt:
    """A logistic curve over the score."""

    slope: float = 1.0
    offset: float = 0.0

    def probability(self, logit: float) -> float:  # noqa: D102
        return sigmoid(self.slope * logit + self.offset)

    def asdict(self) -> dict[str, Any]:  # noqa: D102
        return {"kind": "platt", "slope": self.slope, "offset": self.offset}


@dataclass(frozen=True, slots=True)
class Isotonic:
    """A rising table, read with straight lines between its points."""

    logits: tuple[float, ...]
    probabilities: tuple[float, ...]

    def probability(self, logit: float) -> float:  # noqa: D102
        above = bisect_right(self.logits, logit)
        if above == 0:
            return self.probabilities[0]
        if above == len(self.logits):
            return self.probabilities[-1]
        (low, high), (least, most) = self.logits[above - 1 : above + 1], self.probabilities[above - 1 : above + 1]
        return least + (most - least) * (logit - low) / (high - low)

    def asdict(self) -> dict[str, Any]:  # noqa: D102
        return {"kind": "isotonic", "logits": list(self.logits), "probabilities": list(self.probabilities)}


@dataclass(frozen=True)
class Endpoint:
    """Where embeddings come from."""

    url: str
    """The OpenAI-compatible base; ``/embeddings`` is added."""
    model: str


@dataclass(frozen=True)
class Model:
    """A fitted model, as its file holds it."""

    intercept: float
    dense: tuple[float, ...]
    """A weight for each name in ``features.DENSE``."""
    threshold: float
    """A prompt at least so probably complex goes to the complex backend."""
    calibration: Calibration = field(default_factory=Platt)
    buckets: int = 0
    """Of the hashed words; 0: there are none."""
    hashed: Mapping[int, float] = field(default_factory=dict)
    embedding: tuple[float, ...] = ()
    endpoint: Endpoint | None = None
    spread: tuple[float, ...] = ()
    """The standard deviation of each dense feature in the data: weight times spread is what it matters."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """What the threshold was chosen for, and what it gave out of fold."""
    trained: Mapping[str, Any] = field(default_factory=dict)
    cross_validated: Mapping[str, Any] = field(default_factory=dict)

    def logit(self, prompt: UserPrompt, embedding: Sequence[float] = ()) -> float:
        """Return the score of *prompt* before calibration."""
        values, words = features(prompt, self.buckets)
        score = self.intercept + sum(map(float.__mul__, self.dense, values))
        weights = self.hashed
        score += sum(weights.get(bucket, 0.0) * weight for bucket, weight in words.items())
        return score + sum(weight * value for weight, value in zip(self.embedding, embedding, strict=True))

    def probability(self, prompt: UserPrompt, embedding: Sequence[float] = ()) -> float:
        """Return the calibrated probability that *prompt* is complex."""
        return self.calibration.probability(self.logit(prompt, embedding))

    def save(self, file: str | Path) -> None:
        """Write the file whole or not at all."""
        target = Path(file)
        staging = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            staging.write_text(json.dumps(self.asdict(), indent=1) + "\n", encoding="utf-8")
            staging.replace(target)
        except OSError as error:
            staging.unlink(missing_ok=True)
            raise ConfigError(f"{target} cannot be written: {error.strerror}") from error

    def asdict(self) -> dict[str, Any]:
        """Return the model as it is stored."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "features": {"version": VERSION, "buckets": self.buckets},
            "endpoint": None if self.endpoint is None else vars(self.endpoint),
            "intercept": self.intercept,
            "dense": dict(zip(DENSE, self.dense, strict=True)),
            "spread": dict(zip(DENSE, self.spread, strict=True)) if self.spread else {},
            "hashed": {str(bucket): weight for bucket, weight in self.hashed.items()},
            "embedding": list(self.embedding),
            "calibration": self.calibration.asdict(),
            "threshold": self.threshold,
            "expected": dict(self.expected),
            "trained": dict(self.trained),
            "cross_validated": dict(self.cross_validated),
        }


def load(file: str | Path) -> Model:
    """Read a file that ``Model.save`` wrote.

    Raises:
        ConfigError: It cannot be read, is no such file, is damaged, or was written for other features.
    """
    try:
        stored = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is no JSON: {error}; `orla-lg mapper fit` writes such a file") from error
    try:
        return _model(stored)
    except (ConfigError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{file} is no learned mapper: {fault}") from error


def _model(stored: Mapping[str, Any]) -> Model:
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise ConfigError(f"'format' is not {FORMAT!r}; `orla-lg mapper fit` writes such a file")
    if stored["version"] != FORMAT_VERSION:
        raise ConfigError(f"'version' is {stored['version']!r}, this release reads {FORMAT_VERSION}: fit it anew")
    if (made := stored["features"]["version"]) != VERSION:
        raise ConfigError(f"it was fitted on features of version {made!r}, this release has {VERSION}: fit it anew")
    buckets = stored["features"]["buckets"]
    if type(buckets) is not int or not 0 <= buckets <= MAX_BUCKETS:
        raise ConfigError(f"'features.buckets' is {buckets!r}, not a whole number from 0 to {MAX_BUCKETS}")
    endpoint = stored["endpoint"]
    embedding = _numbers("embedding", stored["embedding"])
    if bool(embedding) != (endpoint is not None):
        raise ConfigError("'embedding' and 'endpoint' belong together: one of them is missing")
    return Model(
        intercept=_number("intercept", stored["intercept"]),
        dense=_named("dense", stored["dense"]),
        threshold=_number("threshold", stored["threshold"]),
        calibration=_calibration(stored["calibration"]),
        buckets=buckets,
        hashed=_hashed(stored["hashed"], buckets),
        embedding=embedding,
        endpoint=None if endpoint is None else Endpoint(_text("url", endpoint), _text("model", endpoint)),
        spread=_named("spread", stored["spread"]) if stored["spread"] else (),
        expected=dict(stored["expected"]),
        trained=dict(stored["trained"]),
        cross_validated=dict(stored["cross_validated"]),
    )


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise ConfigError(f"{where!r} is {value!r}, not a finite number")
    return float(value)


def _numbers(where: str, values: Any) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise ConfigError(f"{where!r} is no list")
    return tuple(_number(f"{where}[{n}]", value) for n, value in enumerate(values))


def _text(key: str, table: Mapping[str, Any]) -> str:
    if not isinstance(value := table[key], str):
        raise ConfigError(f"'endpoint.{key}' is {value!r}, not a text")
    return value


def _named(where: str, table: Mapping[str, Any]) -> tuple[float, ...]:
    if wrong := set(table) ^ set(DENSE):
        name = min(wrong)
        raise ConfigError(f"{where!r} has the wrong names, as {name!r}{did_you_mean(name, DENSE)}")
    return tuple(_number(f"{where}.{name}", table[name]) for name in DENSE)


def _hashed(table: Mapping[str, Any], buckets: int) -> dict[int, float]:
    weights = {int(bucket): _number(f"hashed.{bucket}", weight) for bucket, weight in table.items()}
    if weights and not 0 <= min(weights) <= max(weights) < buckets:
        raise ConfigError(f"'hashed' has bucket {max(weights)}, of {buckets}")
    return weights


def _calibration(stored: Mapping[str, Any]) -> Calibration:
    if (kind := stored["kind"]) == "platt":
        platt = Platt(_number("calibration.slope", stored["slope"]), _number("calibration.offset", stored["offset"]))
        if platt.slope < 0:
            raise ConfigError(f"'calibration.slope' is {platt.slope}: a higher score would be less probable")
        return platt
    if kind != "isotonic":
        raise ConfigError(f"'calibration.kind' is {kind!r}, neither 'platt' nor 'isotonic'")
    at = _numbers("calibration.logits", stored["logits"])
    risen = _numbers("calibration.probabilities", stored["probabilities"])
    strictly = all(one < next_ for one, next_ in pairwise(at))
    if not at or len(at) != len(risen) or not strictly or list(risen) != sorted(risen):
        raise ConfigError("'calibration' is no rising table")
    if risen[0] < 0 or risen[-1] > 1:
        raise ConfigError("'calibration.probabilities' leave 0 to 1")
    return Isotonic(at, risen)


class _TwoWays:
    """What both mappers share: a model, a threshold, two backends."""

    _kind: Literal["LearnedMapper", "EmbeddingMapper"]

    def __init__(
        self,
        model_file: str | Path | Model,
        simple: str = "light",
        complex_: str = "heavy",
        threshold: float | None = None,
    ) -> None:
        self.model = model_file if isinstance(model_file, Model) else load(model_file)
        if (self.model.endpoint is not None) != (self._kind == "EmbeddingMapper"):
            right = "EmbeddingMapper" if self.model.endpoint else "LearnedMapper"
            raise ConfigError(f"{self._kind}: this model is one for {right}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ConfigError(f"{self._kind}: threshold must be from 0 to 1, got {threshold}")
        self.simple, self.complex_ = simple, complex_
        self.threshold = self.model.threshold if threshold is None else threshold

    def foretell(self, stage: str) -> Planned:
        """Return between which backends it decides."""
        return at_each_call(self, stage, self.simple, self.complex_)

    def check_backends(self, known: Iterable[str]) -> list[str]:
        """Return a fault for every name that is no backend."""
        return unknown_backends(self._kind, (self.simple, self.complex_), known)

    def __repr__(self) -> str:
        return f"{self._kind}({self.simple!r}, {self.complex_!r}, threshold={self.threshold:.3f})"

    def _assignment(self, probability: float) -> Assignment:
        is_complex = probability >= self.threshold
        to, other = (self.complex_, self.simple) if is_complex else (self.simple, self.complex_)
        sign = "≥" if is_complex else "<"
        reason = f"complex with probability {probability:.2f} {sign} {self.threshold:.2f}"
        numbers = {"probability_complex": probability, "threshold": self.threshold}
        considered = (Considered(to, numbers, "chosen"), Considered(other, numbers, "alternative"))
        return Assignment(to, None, "learned", reason, (other,), considered=considered)


@answering
class LearnedMapper(_TwoWays):
    """Sends prompts that are probably complex to one backend and the others to another.

    Args:
        model_file: What ``orla-lg mapper fit`` wrote.
        simple: The backend for simple prompts.
        complex_: The backend for complex prompts; each is the other's alternative.
        threshold: Overrides the file's; lower sends more prompts to *complex_*.

    Raises:
        ConfigError: The file or the threshold is wrong, or the file is for ``EmbeddingMapper``.
    """

    _kind = "LearnedMapper"

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        prompt = prompt_of(call) if call.identity.stage else None  # outside any graph, the code decides
        return None if prompt is None else self._assignment(self.model.probability(prompt))


@answering
class EmbeddingMapper(_TwoWays):
    """``LearnedMapper`` that also knows the text's embedding; declines where the engine gives none in time.

    It declines, too, where access policies keep a call's labels from the backend ``external``.

    Args:
        model_file: What ``orla-lg mapper fit --features embedding`` wrote; it names the engine.
        simple: The backend for simple prompts.
        complex_: The backend for complex prompts.
        threshold: Overrides the file's.
        url: Overrides the file's engine; the model there must be the same.
        api_key: Of that engine.
        timeout_s: Seconds that a call waits for its embedding at most.
    """

    _kind = "EmbeddingMapper"

    def __init__(
        self,
        model_file: str | Path | Model,
        simple: str = "light",
        complex_: str = "heavy",
        threshold: float | None = None,
        *,
        url: str | None = None,
        api_key: str = "none",
        timeout_s: float = 0.5,
    ) -> None:
        super().__init__(model_file, simple, complex_, threshold)
        assert self.model.endpoint is not None
        if timeout_s <= 0:
            raise ConfigError(f"EmbeddingMapper: timeout_s must be positive, got {timeout_s}")
        self.timeout_s = timeout_s
        self._url = f"{(url or self.model.endpoint.url).rstrip('/')}/embeddings"
        self._headers = {"authorization": f"Bearer {api_key}", "accept-encoding": "identity"}
        # A client belongs to its loop, and calls come from many: each call has its own. What is dear in one is TLS.
        self._tls = ssl.create_default_context()
        self.failures = 0

    async def amap(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        prompt = prompt_of(call) if call.identity.stage else None
        if prompt is None or (call.access is not None and not call.access.may_leave):
            return None
        try:
            async with asyncio.timeout(self.timeout_s):
                embedding = await self._embedding(prompt.text)
        except Exception as error:  # noqa: BLE001 - an engine that gives no vector must not fail the call it is for
            self.failures += 1
            if self.failures == 1:
                log.warning("EmbeddingMapper declines: %s: %s; later failures are only counted",
                            type(error).__name__, error)  # fmt: skip
            return None
        return self._assignment(self.model.probability(prompt, embedding))

    async def _embedding(self, text: str) -> list[float]:
        assert self.model.endpoint is not None
        asked = {"model": self.model.endpoint.model, "input": sendable(text)}
        async with (
            httpx.AsyncClient(headers=self._headers, timeout=self.timeout_s, verify=self._tls) as http,
            http.stream("POST", self._url, json=asked) as response,
        ):
            data = await read_body(response, MAX_BYTES) if response.is_success else b""
        read = httpx.Response(response.status_code, content=data, request=response.request)
        return embedding_of(read, len(self.model.embedding))


def embedding_of(response: httpx.Response, dimensions: int = 0) -> list[float]:
    """Return the vector in a response of ``/v1/embeddings``.

    Raises:
        ConfigError: There is none, or it has other than *dimensions* numbers.
    """
    if not response.is_success:
        raise ConfigError(f"{response.url.host} answers /embeddings with status {response.status_code}")
    try:
        vector = list(_numbers("embedding", parse_json(response.content)["data"][0]["embedding"]))
    except (ArithmeticError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{response.url.host} answers /embeddings with no vector") from error
    if not vector or (dimensions and len(vector) != dimensions):
        raise ConfigError(f"the embedding has {len(vector)} numbers instead of {dimensions or 'some'}")
    return vector
