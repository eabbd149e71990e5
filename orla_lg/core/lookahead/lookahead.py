"""What to expect of runs: each is followed through its graph, the estimates learn from those that end.

It joins ``Estimates`` (what was learned), a ``RunTrace`` for each run (what it did so far) and a ``Forecast``
for each graph (what lies ahead).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from orla_lg.core.background import Background, Clock
from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.call import Call
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.lookahead.estimates_saver import EstimatesFile
from orla_lg.core.lookahead.forecast import Ahead, Forecast
from orla_lg.core.lookahead.structure import START, GraphStructure
from orla_lg.core.record import Record
from orla_lg.core.workflow import RunState

KEEP_GRAPHS = 1000


class Lookahead:
    """What is known of all graphs, and of each run beyond the call in hand."""

    def __init__(self, background: Background, clock: Clock, file: str | Path | None) -> None:
        self.estimates = Estimates()
        self._clock = clock
        self._file = None if file is None else EstimatesFile(file, self.estimates, background)
        self._lock = threading.Lock()
        self._forecasts = BoundedDict[str, Forecast](KEEP_GRAPHS)

    def forecast(self, graph: str, structure: GraphStructure, homes: Mapping[str, str]) -> Forecast:
        """Return the forecast for a graph of that name; the same as long as it is written and mapped the same."""
        with self._lock:
            known = self._forecasts.get(graph)
            if known is None or (known.structure, known.homes) != (structure, homes):
                known = Forecast(graph, structure, homes, self.estimates)
            self._forecasts.set(graph, known)
            return known

    def graphs(self) -> list[Forecast]:
        """Return what is known of each graph, the newest last."""
        with self._lock:
            return self._forecasts.values()

    # What happens

    def began(self, run: RunState, graph: str, forecast: Forecast | None) -> None:
        """Follow a run that starts; without a *forecast* its graph's structure is not known."""
        run.trace.graph = run.standing.graph = graph if forecast is None else forecast.graph
        run.standing.ends = partial(self.estimates.final_odds, run.trace.graph)
        if forecast is not None:
            run.forecast, run.trace.structure = forecast, forecast.structure

    def entered(self, run: RunState, stage: str, namespace: str, step: int | None) -> None:
        """Note that a node of a run starts; what the run needs from here on is computed when a policy asks."""
        run.trace.entered(namespace, step, self._clock())
        run.standing.visit = self.estimates.enter(run.trace, stage)
        run.standing.expects = partial(self.estimates.remaining_s, run.trace, run.stages())

    def left(self, run: RunState, namespace: str) -> None:
        """Note that a node of a run ended, well or not."""
        run.trace.left(namespace, self._clock())

    def served(self, run: RunState, call: Call, record: Record, service_s: float) -> None:
        """Note a call of a run that went well, *service_s* seconds after its dispatch."""
        run.trace.called(call.identity.namespace, record.duration_s)
        answer, context = record.completion_tokens, (record.prompt_tokens or 0) + (record.completion_tokens or 0)
        self.estimates.served(run.trace, record.stage, service_s, answer, context, record.backend, call.nth)

    def used_tool(self, run: RunState, stage: str, seconds: float) -> None:
        """Note that a tool of a stage ran."""
        self.estimates.used_tool(run.trace.graph, stage, seconds)

    def done(self, run: RunState) -> None:
        """Learn from a run that came to its end."""
        self.estimates.ended(run.trace)
        if self._file is not None:
            self._file.learned()

    @property
    def saver(self) -> Callable[[], None]:
        """What keeps what was learned, without a reference to this."""
        return _nothing if self._file is None else self._file.save

    def close(self) -> None:
        """Keep what was learned."""
        self.saver()

    # What to expect

    def expect(self, call: Call, run: RunState) -> None:
        """Give a new call of a run what its stage usually answers, and its number among that stage's calls."""
        graph, stage = run.trace.graph, call.identity.stage
        if call.ask.embeds:
            usual = self.estimates.answer_tokens(graph, stage)
        else:
            call.nth, usual = self.estimates.begins(run.trace, stage)
        if usual is not None:
            call.answer_tokens = usual

    def remaining_s(self, run: RunState) -> float | None:
        """Return the service that a run still needs, as others did from here; ``None`` while nothing is known."""
        return self.estimates.remaining_s(run.trace, run.stages())

    def next_calls(self, run: RunState) -> dict[tuple[str, str], float]:
        """Return the next calls of a run after those of its present stages, by stage and backend, with chances."""
        return {} if run.forecast is None else run.forecast.next_calls(_stages_of(run))

    def ahead(self, run: RunState) -> Ahead:
        """Return what is expected of a run from where it is."""
        stages = _stages_of(run)
        if run.forecast is None:
            return Ahead({}, {}, self.remaining_s(run))
        following, backends = run.forecast.next_stages(stages), run.forecast.next_backends(stages)
        return Ahead(following, backends, self.remaining_s(run))


def _stages_of(run: RunState) -> Sequence[str]:
    """Return the stages that a run is in, else those of its latest step, else its beginning."""
    return run.stages() or run.trace.path().latest or (START,)


def _nothing() -> None:
    """There is no file."""
