"""What calls and runs usually take, learned from those that ended; kept across restarts in a small file.

For a stage: the length of its answers, the service of one call, and how much service a run still needs when it
enters the stage for the first, second, ... time. The last is not derived from the graph's edges but counted: when a
run ends, each of its entries learns what came after it. So loops and branches need no model of their own, and "the
longer it went on, the longer it will" is learned where it is true. A stage of a graph in a tool begins with what was
learned of all such graphs of the node together, where something was.

It is counted in the same way how often the first, second, ... call of a stage was its run's last (``final_odds``).

Beside that, what a look ahead along the edges needs (``core.lookahead.forecast``): how often a stage is visited, what
a visit holds (calls, tools, other work), which stages followed it, and where its calls went lately.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.boundary.stage_keys import graphs_in, plain_key
from orla_lg.core.lookahead.estimates_file import Stored, read_stages, stages_in, text_of, write_stages
from orla_lg.core.lookahead.stage_estimates import (
    MAX_VISITS,
    StageEstimates,
    begun_with,
    halve,
    lean,
    nearest,
    nearest_of,
    odds_of,
    of_visit,
    round_of,
    seen,
    stage_read,
    written,
)
from orla_lg.core.lookahead.trace import Path, RunTrace

KEEP_STAGES = 10_000
MAX_ENDED = 64
"""Runs that ended and may wait to be learned from."""


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned of a stage, as others see it; ``None`` where nothing was seen."""

    calls: float | None = None
    """Model calls in one visit."""
    service_s: float | None = None
    """Of one call, from dispatch to its last token."""
    answer_tokens: float | None = None
    other_s: float | None = None
    """Seconds of one visit that its calls did not take: tools, code."""
    tool_s: float | None = None
    """Seconds of one run of a tool."""
    visits: float | None = None
    """In a run that comes by."""
    turns: float = 0.0
    moves: Mapping[str, float] = field(default_factory=dict)
    """By stage, in how many of these turns it followed."""
    backends: Mapping[str, float] = field(default_factory=dict)
    """By backend, the share of its calls that went there lately."""
    final_odds: Mapping[int, float] = field(default_factory=dict)
    """By number of a call in its stage and run, how likely it is the run's last; 8: up to that, 16: all later."""


NOTHING_LEARNED = Learned()


class Estimates:
    """Means by graph and stage; the stages not touched longest are forgotten.

    What a run shows as a whole is learned after its end, when something asks for what such runs show.
    """

    def __init__(self, keep: int = KEEP_STAGES) -> None:
        self._lock = threading.Lock()
        self._ended: list[RunTrace] = []
        """Runs not learned from yet."""
        self._stages = BoundedDict[tuple[str, str], StageEstimates](keep)
        self._lessons = BoundedDict[str, int](keep)

    def enter(self, run: RunTrace, stage: str) -> int:
        """Note that a run enters *stage*; returns for the how manieth time."""
        with self._lock:
            visit = run.visits.get(stage, 0) + 1
            visit = visit if visit < MAX_VISITS else MAX_VISITS
            run.visits[stage] = visit
            run.entries.append((stage, visit, run.served_s))
            return visit

    def begins(self, run: RunTrace, stage: str) -> tuple[int, float | None]:
        """Note that a call of a run begins; returns its number in its stage, and how long these usually answer."""
        with self._lock:
            run.followed = len(run.answered)
            nth = run.begun[stage] = run.begun.get(stage, 0) + 1
            known = self._look(run.graph, stage)
            return nth, known.answer_tokens.value if known is not None and known.answer_tokens.seen else None

    def served(
        self,
        run: RunTrace,
        stage: str,
        service_s: float,
        answer_tokens: int | None,
        context_tokens: int = 0,
        backend: str | None = None,
        nth: int = 0,
    ) -> None:
        """Note a call of a run that went well.

        Args:
            run: The call's.
            stage: Of the call.
            service_s: From dispatch to its last token.
            answer_tokens: As the engine counted them.
            context_tokens: Prompt and answer together, as the engine counted them; 0 where it did not.
            backend: Where it went.
            nth: Which of its stage's calls in the run it is; 0 where that is not known.
        """
        with self._lock:
            run.served_s += service_s
            if nth:
                run.answered.append((stage, nth))
            if context_tokens:
                run.contexts.append((stage, run.visits.get(stage, 1), context_tokens))
            known = self._of(run.graph, stage)
            known.service_s.learn(service_s)
            if answer_tokens is not None:
                known.answer_tokens.learn(answer_tokens)
            if backend is not None and known.backends.get(backend) != 1.0:
                lean(known.backends, backend)

    def used_tool(self, graph: str, stage: str, seconds: float) -> None:
        """Note that a tool of a stage ran for *seconds*."""
        with self._lock:
            self._of(graph, stage).tool_s.learn(seconds)

    def ended(self, run: RunTrace) -> None:
        """Learn from a run that came to its end: which path it took, and what came after each of its entries."""
        with self._lock:
            self._ended.append(run)
            if len(self._ended) >= MAX_ENDED:
                self._catch_up()

    def _catch_up(self) -> None:
        for run in self._ended:
            self._learn_rest(run)
            self._learn_path(run.graph, run.path())
            self._count(run.graph)
        self._ended.clear()

    def _learn_path(self, graph: str, path: Path) -> None:
        for visit in path.visits:
            known = self._of(graph, visit.stage)
            known.calls.learn(visit.calls)
            if visit.other_s is not None:
                known.other_s.learn(visit.other_s)
        for stage, count in Counter([visit.stage for visit in path.visits]).items():
            self._of(graph, stage).visits.learn(count)
        for stage, turns in path.turns.items():
            self._of(graph, stage).turns += turns
        for (stage, target), times in path.moves.items():
            moves = self._of(graph, stage).moves
            moves[target] = moves.get(target, 0.0) + times
        for stage in path.turns:
            halve(self._of(graph, stage))

    def _learn_rest(self, run: RunTrace) -> None:
        """Learn what service each entry of a run had before it, and by what its context still grew."""
        for stage, visit, served_s in run.entries:
            of_visit(self._of(run.graph, stage).remaining_s, visit).learn(run.served_s - served_s)
        longest = max([tokens for _, _, tokens in run.contexts], default=0)
        for stage, visit, tokens in run.contexts:
            of_visit(self._of(run.graph, stage).growth_tokens, visit).learn(longest - tokens)
        for at, (stage, nth) in enumerate(run.answered):
            of_visit(self._of(run.graph, stage).final, round_of(nth)).learn(at >= run.followed)

    def _count(self, graph: str) -> None:
        self._lessons.set(graph, (self._lessons.get(graph) or 0) + 1)

    def _of(self, graph: str, stage: str) -> StageEstimates:
        key = (graph, stage)
        if (known := self._stages.get(key)) is None:
            self._stages.set(key, known := self._look(graph, stage) or StageEstimates())
        else:
            self._stages.touch(key)
        return known

    def _look(self, graph: str, stage: str) -> StageEstimates | None:
        """Return what is known of a stage; of one of a graph in a tool, what it begins with."""
        known = self._stages.get((graph, stage))
        if known is None and graphs_in(stage):
            common = self._stages.get((graph, plain_key(stage)))
            return None if common is None else begun_with(common)
        return known

    # What to expect

    def remaining_s(self, run: RunTrace, stages: Sequence[str]) -> float | None:
        """Return the service that a run still needs that is now in *stages*; ``None`` while nothing is known.

        Branches that run side by side each know what came after them all, so the longest counts.
        """
        with self._lock:
            self._catch_up()
            known = [left_s for stage in stages if (left_s := self._remaining(run, stage)) is not None]
        return max(known, default=None)

    def _remaining(self, run: RunTrace, stage: str) -> float | None:
        known = self._look(run.graph, stage)
        return None if known is None else nearest(known.remaining_s, run.visits.get(stage, 1))

    def growth_tokens(self, graph: str, stage: str, visit: int) -> float | None:
        """Return by how much a run's longest context still grows after a call; ``None`` while nothing is known."""
        with self._lock:
            self._catch_up()
            known = self._look(graph, stage)
            return None if known is None else nearest(known.growth_tokens, visit)

    def final_odds(self, graph: str, stage: str, nth: int) -> float:
        """Return how likely the *nth* call of a stage in a run is the last of the run; 0 while nothing is known."""
        with self._lock:
            self._catch_up()
            known = self._look(graph, stage)
            if known is None or not known.final:
                return 0.0
            return odds_of(known.final[nearest_of(known.final, round_of(nth))])

    def answer_tokens(self, graph: str, stage: str) -> float | None:
        """Return the usual length of a stage's answer; ``None`` while nothing is known."""
        with self._lock:
            known = self._look(graph, stage)
            return known.answer_tokens.value if known is not None and known.answer_tokens.seen else None

    def service_s(self, graph: str, stage: str) -> float | None:
        """Return the usual service of one call of a stage; ``None`` while nothing is known."""
        with self._lock:
            known = self._look(graph, stage)
            return known.service_s.value if known is not None and known.service_s.seen else None

    def lessons(self, graph: str) -> int:
        """Return of how many runs of a graph something was learned: figures are computed again only after that."""
        with self._lock:
            self._catch_up()
            return self._lessons.get(graph) or 0

    def calls(self, graph: str, stage: str) -> float | None:
        """Return how many calls a visit of a stage usually makes; ``None`` while nothing is known."""
        with self._lock:
            self._catch_up()
            known = self._look(graph, stage)
            return known.calls.value if known is not None and known.calls.seen else None

    def learned(self, graph: str, stage: str) -> Learned:
        """Return what was learned of a stage."""
        with self._lock:
            self._catch_up()
            known = self._look(graph, stage)
            if known is None:
                return NOTHING_LEARNED
            return Learned(
                calls=seen(known.calls),
                service_s=seen(known.service_s),
                answer_tokens=seen(known.answer_tokens),
                other_s=seen(known.other_s),
                tool_s=seen(known.tool_s),
                visits=seen(known.visits),
                turns=known.turns,
                moves=dict(known.moves),
                backends=dict(known.backends),
                final_odds={each: odds_of(known.final[each]) for each in sorted(known.final)},
            )

    # Across restarts

    def save(self, file: str | FilePath) -> None:
        """Write the file whole or not at all.

        Raises:
            ConfigError: It cannot be written.
        """
        write_stages(FilePath(file), self._all_written())

    def dumped(self) -> bytes:
        """Return what a file of them holds."""
        return text_of(self._all_written()).encode()

    def _all_written(self) -> list[dict[str, Any]]:
        with self._lock:
            self._catch_up()
            return [
                {"graph": graph, "stage": stage, **written(known)} for (graph, stage), known in self._stages.items()
            ]

    def load(self, file: str | FilePath) -> bool:
        """Take in what was saved, all of it or nothing; returns whether there was a file.

        Raises:
            ConfigError: It does not hold estimates of ours; with the key that is wrong in it.
            OSError: It cannot be read.
        """
        stages = read_stages(FilePath(file), KEEP_STAGES)
        if stages is not None:
            self._take_in(stages)
        return stages is not None

    def restore(self, dumped: bytes, where: str) -> None:
        """Take in what ``dumped`` returned, all of it or nothing.

        Args:
            dumped: What was kept.
            where: The place, for messages.

        Raises:
            ConfigError: It does not hold estimates of ours.
        """
        self._take_in(stages_in(dumped, FilePath(where), KEEP_STAGES))

    def _take_in(self, stages: Sequence[Stored]) -> None:
        read = {(each.text("graph"), each.text("stage")): stage_read(each) for each in stages}
        with self._lock:
            self._catch_up()
            for key, known in read.items():
                self._stages.set(key, known)
            for graph, _ in read:
                self._count(graph)
