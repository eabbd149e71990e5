"""The calls of a file as a workload: which follows which after what time, so that they answer to another speed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from orla_lg.replay.prompts import measure
from orla_lg.replay.traffic import Piece, RecordedCall, RecordedTraffic


@dataclass(eq=False, slots=True)
class PlannedCall:
    """A call with what it waits for."""

    number: int
    seen: RecordedCall
    after: tuple[PlannedCall, ...] = ()
    """Calls of its workflow that must have ended; none: it comes when it came."""
    wait_s: float = 0.0
    """After the last of them has ended (a tool, a node's own work, a person), or after the begin of the replay."""
    answer: Piece | None = field(default=None, repr=False)
    """Where a later prompt repeats its answer."""
    followers: list[PlannedCall] = field(default_factory=list, repr=False)

    @property
    def run(self) -> str:
        """What it is a part of: its run, or itself."""
        return self.seen.run or f"call {self.number}"


@dataclass(slots=True)
class Workload:
    """All calls of a file, in order of their arrival."""

    seen: RecordedTraffic
    calls: list[PlannedCall]
    by_run: dict[str, list[PlannedCall]]

    @property
    def counted(self) -> list[PlannedCall]:
        """Those that can be simulated; the others take as long as they took."""
        return [each for each in self.calls if each.seen.is_counted]

    @property
    def knows_prompts(self) -> bool:
        """Whether it is known which prompts begin alike, so that caches can be simulated."""
        counted = self.counted
        known = sum(each.seen.prompt is not None for each in counted)
        return bool(counted) and (known >= 0.9 * len(counted) or not self.seen.happened)


def workload_of(seen: RecordedTraffic) -> Workload:
    """Return the workload in a file."""
    begin_s = min((call.arrived_s for call in seen.calls), default=0.0)
    calls = [PlannedCall(number, call) for number, call in enumerate(seen.calls)]
    by_workflow: dict[str, list[PlannedCall]] = defaultdict(list)
    by_run: dict[str, list[PlannedCall]] = defaultdict(list)
    answers: dict[str, _Answers] = defaultdict(_Answers)
    for each in calls:
        by_workflow[each.seen.workflow].append(each)
        by_run[each.run].append(each)
        each.wait_s = each.seen.arrived_s - begin_s
        answers[each.seen.workflow].look(each)
        if each.seen.prompt is not None and each.seen.prompt_tokens:
            measure(each.seen.prompt, each.seen.prompt_tokens)
    for mine in by_workflow.values():
        _join(mine)
    return Workload(seen, calls, dict(by_run))


def _join(calls: Sequence[PlannedCall]) -> None:
    """Have each call of a workflow follow on those that had ended when it came.

    Of these only the last ones count: what they in turn waited for has ended too.
    """
    open_: list[tuple[float, int, PlannedCall]] = []
    ended: list[PlannedCall] = []
    for call in calls:
        while open_ and open_[0][0] <= call.seen.arrived_s:
            ended.append(heappop(open_)[2])
        if ended:
            newest = max(ended, key=lambda each: each.number)
            ended = [each for each in ended if each is newest or each.seen.ended_s > newest.seen.arrived_s]
            call.after = tuple(ended)
            call.wait_s = max(0.0, call.seen.arrived_s - max(each.seen.ended_s for each in ended))
            for each in ended:
                each.followers.append(call)
        heappush(open_, (call.seen.ended_s, call.number, call))


class _Answers:
    """Finds in later prompts of a workflow the answers of its earlier calls."""

    def __init__(self) -> None:
        self._ends: dict[Piece, PlannedCall] = {}
        self._walked: set[Piece] = set()

    def look(self, call: PlannedCall) -> None:
        """Look at a workflow's next call. An answer that it repeats has as many tokens as were generated."""
        piece = call.seen.prompt
        while piece is not None and piece not in self._walked:
            self._walked.add(piece)
            if piece.is_answer and piece.before is not None and (said := self._ends.pop(piece.before, None)):
                said.answer = piece
                if not piece.until_tokens and said.seen.prompt_tokens and said.seen.completion_tokens:
                    piece.until_tokens = said.seen.prompt_tokens + said.seen.completion_tokens
            piece = piece.before
        if call.seen.prompt is not None:
            self._ends[call.seen.prompt] = call
