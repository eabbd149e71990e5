"""A core's metrics as Prometheus reads them: sums of its records, and what its statistics say when it is scraped."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from orla_lg import __version__
from orla_lg.core.mapping import parts_of
from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.serving import Serving
from orla_lg.errors import ConfigError
from orla_lg.link.serving import LinkedServing
from orla_lg.mappers.http import HttpMapper
from orla_lg.observe.counts import ControlCounts
from orla_lg.observe.figures import OF_ALL, OF_BACKENDS, OF_PROCESS, ScrapedFigure, Value
from orla_lg.observe.sums import CallSums
from orla_lg.orla import Orla

STAGE, BACKEND = ("stage", "backend"), ("backend",)


def counter(name: str, text: str, labels: Iterable[str] = ()) -> CounterMetricFamily:
    """Return a counter without values."""
    return CounterMetricFamily(name, text, labels=list(labels))


def gauge(name: str, text: str, labels: Iterable[str] = ()) -> GaugeMetricFamily:
    """Return a gauge without values."""
    return GaugeMetricFamily(name, text, labels=list(labels))


def _histogram(name: str, text: str, labels: Iterable[str]) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, text, labels=list(labels))


class CoreMetrics(Collector):
    """The metrics of one ``Orla``, in a registry until ``close``.

    Of a replica (``Orla.remote``) these are its own calls and runs; queues and caches are its server's.

    Args:
        orla: Counted from now on.
        registry: ``None``: the global one.

    Raises:
        ConfigError: The registry has another ``Orla``'s metrics.
    """

    def __init__(self, orla: Orla, registry: CollectorRegistry | None = None) -> None:
        self.counts = ControlCounts()
        """What the core does not know of: changes by API, hooks elsewhere."""
        self._orla, self._serving = orla, orla.core.serving
        self._sums = CallSums()
        self._registry = prometheus_client.REGISTRY if registry is None else registry
        try:
            self._registry.register(self)
        except ValueError as error:
            raise ConfigError(
                "the registry has the metrics of another Orla: give each a registry of its own, or close() the first"
            ) from error
        self._serving.records.followers.append(self._sums)

    def close(self) -> None:
        """Count no more, and leave the registry. Idempotent."""
        self._sums.closed = True
        with contextlib.suppress(KeyError):
            self._registry.unregister(self)

    def describe(self) -> Iterator[Metric]:
        """Yield the names, without a look at the core."""
        yield from _of_calls(CallSums(), self._serving, ControlCounts())

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics as they are now."""
        yield from _of_calls(self._sums, self._serving, self.counts)
        if isinstance(self._serving, LinkedServing):
            early = self._orla.core.early.statistics()
            own = replace(Serving.statistics(self._serving), early_tools=early)  # its core's are its server's
            yield from (_of(figure, figure.of(own)) for figure in OF_PROCESS)
            return
        now = self._orla.statistics()
        yield from self._of_backends(now)
        yield from (_of(figure, figure.of(now)) for figure in (*OF_ALL, *OF_PROCESS))

    def _of_backends(self, now: Statistics) -> Iterator[Metric]:
        names = {name: self._sums.backend_names.of(name) for name in now.backends}
        for figure in OF_BACKENDS:
            family = _family(figure, BACKEND)
            for name, each in now.backends.items():
                _add(family, [names[name]], figure.of(each))
            yield family
        waiting = gauge("orla_stage_queue_depth", "Calls that wait at a backend, by stage.", STAGE)
        for name, each in now.backends.items():
            by_stage = dict[str, float]()
            for stage, count in each.queue.waiting_by_stage.items():
                label = self._sums.stage_names.of(stage)
                by_stage[label] = by_stage.get(label, 0) + count
            for label, waits in by_stage.items():
                waiting.add_metric([label, names[name]], waits)
        yield waiting


def _family(figure: ScrapedFigure[Any], labels: Iterable[str] = ()) -> CounterMetricFamily | GaugeMetricFamily:
    return (counter if figure.kind == "counter" else gauge)(figure.name, figure.help, (*labels, *figure.by))


def _of(figure: ScrapedFigure[Any], value: Value) -> Metric:
    family = _family(figure)
    _add(family, [], value)
    return family


def _add(family: CounterMetricFamily | GaugeMetricFamily, labels: list[str], value: Value) -> None:
    if isinstance(value, Mapping):
        for key, each in value.items():
            own = key.split(":") if len(family._labelnames) > len(labels) + 1 else [key]
            family.add_metric([*labels, *own], each)
    elif value is not None:
        family.add_metric(labels, value)


def _of_calls(sums: CallSums, serving: Serving, counts: ControlCounts) -> Iterator[Metric]:
    """Yield what is known of calls that ended, and of what was counted beside them."""
    build = gauge("orla_build_info", "The version of orla_lg.", ["version"])
    build.add_metric([__version__], 1)
    yield build
    yield from _by_stage(sums)
    yield from _by_backend(sums)
    decisions = counter("orla_stage_mapper_decisions", "What placed calls.", ["outcome"])
    for outcome, count in sums.decisions().items():
        decisions.add_metric([outcome], count)
    yield decisions
    hooks = counter(
        "orla_hooks", "What was asked of hooks in other programs, and what came of it.", ["hook", "outcome"]
    )
    for (hook, outcome), count in _hooks(serving, counts).items():
        hooks.add_metric([hook, outcome], count)
    yield hooks
    mutations = counter("orla_control_plane_mutations", "Changes by API.", ["resource", "method", "outcome"])
    for labels, count in counts.mutations().items():
        mutations.add_metric(list(labels), count)
    yield mutations
    feedback = counter("orla_feedback", "Scores that were given for answers.")
    feedback.add_metric([], serving.learners.scores)
    yield feedback


def _hooks(serving: Serving, counts: ControlCounts) -> Mapping[tuple[str, str], int]:
    """Return what programs elsewhere said, those among them that the shared mapping asks."""
    found, mappings = Counter(counts.hooks()), serving.mappings
    asked = {id(part): part for each in (mappings.shared, *mappings.variants.values()) for part in parts_of(each)}
    for part in asked.values():
        if isinstance(part, HttpMapper):
            found.update({("mapper", outcome): count for outcome, count in part.statistics().items()})
    return found


def _by_stage(sums: CallSums) -> Iterator[Metric]:
    requests = counter(
        "orla_requests", "Calls that ended, by how: ok, refused, cancelled, error.", (*STAGE, "status")
    )
    wait = _histogram("orla_queue_wait_seconds", "From a call's arrival to its grant.", STAGE)
    first = _histogram("orla_first_token_seconds", "From a call's dispatch to its first token.", STAGE)
    whole = _histogram("orla_call_duration_seconds", "From a call's arrival to its last token.", STAGE)
    prompt = counter("orla_prompt_tokens", "Tokens of prompts, the cached ones included.", STAGE)
    cached = counter("orla_cached_tokens", "Of the tokens of prompts, those found in KV caches.", STAGE)
    completion = counter("orla_completion_tokens", "Tokens of answers.", STAGE)
    cost = counter("orla_cost_usd", "US dollars spent on calls, by the backends' prices.", STAGE)
    for (stage, backend), each in sums.stages():
        labels = [stage, backend]
        for status, count in dict(each.statuses).items():
            requests.add_metric([*labels, status], count)
        for family, found in ((wait, each.wait), (first, each.first_token), (whole, each.duration)):
            family.add_metric(labels, found.buckets(), found.total)
        prompt.add_metric(labels, each.prompt)
        cached.add_metric(labels, each.cached)
        completion.add_metric(labels, each.completion)
        cost.add_metric(labels, each.usd)
    yield from (requests, wait, first, whole, prompt, cached, completion, cost)


def _by_backend(sums: CallSums) -> Iterator[Metric]:
    latency = _histogram("orla_backend_latency_seconds", "From a call's dispatch to its last token.", BACKEND)
    per_token = _histogram(
        "orla_time_per_output_token_seconds", "Of each token of an answer after its first.", BACKEND
    )
    errors = counter("orla_call_errors", "Calls that ended with an error, by its class.", (*BACKEND, "kind"))
    retries = counter("orla_retries", "Attempts of calls beyond the first.", BACKEND)
    for backend, each in sums.backends():
        for family, found in ((latency, each.latency), (per_token, each.per_token)):
            family.add_metric([backend], found.buckets(), found.total)
        for kind, count in dict(each.errors).items():
            errors.add_metric([backend, kind], count)
        retries.add_metric([backend], each.retries)
    yield from (latency, per_token, errors, retries)
