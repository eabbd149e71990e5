"""Whether anything may be concluded from a replay, and where not, the likely reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from orla_lg.core.boundary.plain import counted
from orla_lg.replay.figures import CACHED, DECISIVE, Match
from orla_lg.replay.simulation import NO_ROOM, Arrangement, Played
from orla_lg.replay.workload import PlannedCall, Workload

MOST_UNCOUNTED = 0.05
"""Of all calls, without a figure's being doubtful for it."""

MOST_DRIFT = 1.25
"""By so much an engine's pace may differ between the halves of a file."""


@dataclass(frozen=True, slots=True)
class Conclusions:
    """What may be concluded."""

    matches: Sequence[Match]
    reasons: Sequence[str]
    """Why a figure is off, as far as that shows in the file."""

    @property
    def concludes(self) -> bool:
        """Whether other settings may be compared at all."""
        return all(match.holds for match in self.matches if match.figure in DECISIVE)

    @property
    def withheld(self) -> list[str]:
        """The figures of which nothing may be concluded, by name."""
        return [match.figure.name for match in self.matches if not match.holds]


def verdict_of(
    workload: Workload, arrangement: Arrangement, found: Sequence[Match], played: Sequence[Played]
) -> Conclusions:
    """Judge the unchanged setting as simulated against what happened."""
    off = [match for match in found if not match.holds]
    return Conclusions(found, list(_reasons(workload, arrangement, off, played)) if off else [])


def _reasons(
    workload: Workload, arrangement: Arrangement, off: Sequence[Match], played: Sequence[Played]
) -> Iterator[str]:
    calls, seen = workload.calls, workload.seen
    uncounted = [each for each in calls if not each.seen.is_counted]
    if len(uncounted) > MOST_UNCOUNTED * len(calls):
        yield (
            f"{len(uncounted)} of {len(calls)} calls cannot be simulated (they failed, went elsewhere, or their "
            "engine counted no tokens): what they did to the others is missing"
        )
    if refused := sum(each.error == NO_ROOM for each in played):
        yield f"{counted(refused, 'call')} have more tokens than the engine as described has room for: --kv-tokens"
    if seen.settings > 1:
        yield f"the setting changed while the file was written: it names {seen.settings}, replayed is the last"
    for match in off:
        if match.figure is CACHED:
            yield from _of_cache(workload, arrangement, match)
    yield from _of_pace([each for each in calls if each.seen.is_counted])


def _of_cache(workload: Workload, arrangement: Arrangement, match: Match) -> Iterator[str]:
    backends = arrangement.backends.values()
    if (match.off or 0.0) > 0:
        if unknown := sorted(each.setting.name for each in backends if each.setting.kv_tokens is None):
            yield (
                f"how many tokens the KV cache of {', '.join(map(repr, unknown))} holds stands nowhere, so it was "
                "taken as endless, and more is found in it than there was: give --kv-tokens N"
            )
        elif any(each.setting.slots for each in backends):
            yield (
                "a slot that is given away when its run ends is erased first or not, as it comes; in virtual time "
                "what the next call can use of it stays"
            )
        else:
            yield (
                "the engine kept less than its size allows: something else uses its cache, or answers that come back "
                "in a prompt are cut into other tokens there"
            )
        return
    first = next((each.seen for each in workload.calls if each.seen.is_counted), None)
    if first is not None and first.cached_tokens:
        yield f"the file's first call found {first.cached_tokens:,} tokens cached: the file begins after its traffic"
    elif workload.seen.lost_beginnings:
        yield "prompts begin with pieces that stand in no line: the file is the rest of a longer one"
    elif any("pin" in each.setting.can and not each.setting.slots for each in backends):
        yield "the engine is told by workflow what to keep, and keeps more so than is simulated"
    else:
        yield "prompts were in the cache that no recorded call put there: warm-ups, or calls that are not in the file"


def _of_pace(calls: Sequence[PlannedCall]) -> Iterator[str]:
    """Yield whether the engine was slower in one half of the file, beside as many calls."""
    half = len(calls) // 2
    paces = [median(found) for part in (calls[:half], calls[half:]) if (found := list(_paces(part)))]
    if len(paces) == 2 and min(paces) > 0 and max(paces) / min(paces) > MOST_DRIFT:
        yield (
            f"a token took {paces[0] * 1e3:.1f} ms in the first half of the file and {paces[1] * 1e3:.1f} ms in the "
            "second: something else took the engine's time, or the load differs much; a part of the file may match"
        )


def _paces(calls: Sequence[PlannedCall]) -> Iterator[float]:
    for each in calls:
        seen, answer = each.seen, each.seen.completion_tokens or 0
        if seen.first_s is not None and answer > 1:
            yield (seen.ended_s - seen.first_s) / (answer - 1)
