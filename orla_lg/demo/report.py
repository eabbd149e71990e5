"""One arm of the demo in numbers, for --details: a row for each stage, what the caches did, what was replaced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from orla_lg.core.boundary.plain import counted
from orla_lg.core.record import Record
from orla_lg.demo.board import STAGES, Board

HEADINGS = ("stage", "backend", "calls", "wait s", "TTFT s", "prompt", "cached", "answer", "cost $")
"""Mean wait in the queue, median time to first token, sums of tokens and cost."""


_EFFECTS = {
    "flush:freed": "caches erased",
    "flush:deferred": "given up, to be overwritten by the next call",
    "flush:unsupported": "given up, which this engine cannot do",
    "flush:failed": "could not be erased",
    "release:demoted": "left to calls that need the place",
    "save:saved": "saved before another workflow took the slot",
    "restore:restored": "restored on return",
}


@dataclass(frozen=True, slots=True)
class ReportRow:
    """One line of the table, as text."""

    cells: tuple[str, ...]
    total: bool = False


def rows(board: Board) -> list[ReportRow]:
    """Return a row for each stage that made calls, and one for all."""
    with board.lock:
        per_stage = {name: list(stage.records) for name, stage in board.stages.items() if stage.records}
    listed = [
        ReportRow(_cells(name, per_stage[name]))
        for name in (*STAGES, *(per_stage.keys() - set(STAGES)))
        if name in per_stage
    ]
    everything = [record for records in per_stage.values() for record in records]
    return [*listed, ReportRow(_cells("all", everything), total=True)] if listed else []


def _cells(name: str, records: Sequence[Record]) -> tuple[str, ...]:
    backends = sorted({record.backend or "-" for record in records})
    prompt, cached = _sum(r.prompt_tokens for r in records), _sum(r.cached_tokens for r in records)
    first = [record.ttft_s for record in records if record.ttft_s is not None]
    return (
        name,
        backends[0] if len(backends) == 1 else f"all {len(backends)}",
        str(len(records)),
        f"{fmean(record.queue_wait_s for record in records):.2f}",
        f"{median(first):.2f}" if first else "-",
        f"{prompt:,}",
        f"{cached:,} {_share(cached, prompt)}",
        f"{_sum(r.completion_tokens for r in records):,}",
        f"{sum(record.cost_usd or 0.0 for record in records):.4f}",
    )


def _sum(counts: Iterable[int | None]) -> int:
    return sum(count or 0 for count in counts)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}%" if whole else ""


def notes(board: Board) -> list[tuple[str, str]]:
    """Return what the table does not say, as pairs of a heading and a sentence."""
    told = [("tickets", _tickets(board))]
    if tools := ", ".join(f"{name} {count}" for name, count in sorted(board.tools.items())):
        told.append(("tools", tools))
    told += [("cache", line) for line in _cache(board)]
    told.append(("fallbacks", _fallbacks(board)))
    return told


def _tickets(board: Board) -> str:
    failed = f", {board.failed} not" if board.failed else ""
    return f"{board.done} of {board.tickets} answered{failed}, in {board.now_s - board.started_s:.1f} s"


def _cache(board: Board) -> list[str]:
    if board.statistics is None:
        return []
    lines = []
    for name, backend in board.statistics.backends.items():
        told = [_counted(n, _EFFECTS.get(effect, effect)) for effect, n in sorted(backend.memory.effects.items())]
        held = counted(backend.memory.slots_held, "slot")
        lines.append(f"{name}: {', '.join(told) or 'no cache flushed'}; {held} held")
    return lines


def _counted(count: int, came: str) -> str:
    """Return what came of so many orders: ``1 cache erased``, ``2 caches erased``."""
    rest = came.removeprefix("caches ")
    return f"{counted(count, 'cache')} {rest}"


def _fallbacks(board: Board) -> str:
    if not board.fallbacks:
        return "none: every answer of the model could be used"
    counted = (
        f"{name} {board.fallbacks[name]}/{len(stage.records)}"
        for name, stage in board.stages.items()
        if stage.records
    )
    return f"{', '.join(counted)} answers were replaced by rules or a template"


def as_text(board: Board) -> str:
    """Return the report as plain text, for pipes and files."""
    table = [HEADINGS, *(row.cells for row in rows(board))]
    widths = [max(len(line[column]) for line in table) for column in range(len(HEADINGS))]
    lines = [_aligned(line, widths) for line in table]
    lines += ["", *(f"{name:<10} {text}" for name, text in notes(board))]
    return "\n".join(lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths, strict=False)]
    right = [f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right])
