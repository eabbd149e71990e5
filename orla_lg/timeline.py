"""Calls as lines of time: how long each was queued, in prefill, in decode; one call, or the calls of a run.

Lines are pieces of text with a style each, so that the same picture is plain text in a pipe, coloured in a terminal
and an SVG on a page.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, TextIO

from orla_lg.core.boundary.plain import shown

Piece = tuple[str, str]
"""Text and the name of its style; ``""`` for none."""
Line = Sequence[Piece]

WIDTH = 80
"""Columns where no terminal says how many it has."""
LEAST, MOST = 40, 160
"""A picture is no narrower and no wider than that."""
LEAST_CHART = 16
NAME_COLUMNS = 24
"""A longer stage key keeps its end: the node's own name."""
TICK_COLUMNS = 7
"""Between two marks of the time axis, at least."""

_ANSI = {
    "queued": "33", "prefill": "36", "decode": "32", "served": "35", "early tool": "34", "tool": "94", "dim": "2",
    "dropped tool": "2;34", "error": "1;31", "bold": "1",
}  # fmt: skip
_RICH = {"queued": "yellow", "prefill": "cyan", "decode": "green", "served": "magenta", "early tool": "blue",
         "tool": "bright_blue", "dropped tool": "dim blue", "dim": "bright_black", "error": "bold red",
         "bold": "bold"}  # fmt: skip
_ASCII = str.maketrans("·▒█▓○●└─┴✗×", ".:#%o@+-+xx")


class Phase(Enum):
    """What a call's time goes to."""

    QUEUED = "queued"
    PREFILL = "prefill"
    DECODE = "decode"
    SERVED = "served"
    """At the engine, where the answer was not streamed: prefill and decode cannot be told apart."""
    EARLY = "early tool"
    """A tool ran before its turn, while a model still decoded or another tool ran."""
    TOOL = "tool"
    """Its turn had come, and it still ran."""
    DROPPED = "dropped tool"
    """A tool ran before its turn, and no call got its result."""

    @property
    def mark(self) -> str:
        """The character that a line is drawn with."""
        return _MARKS[self]


_MARKS = {
    Phase.QUEUED: "·",
    Phase.PREFILL: "▒",
    Phase.DECODE: "█",
    Phase.SERVED: "▓",
    Phase.EARLY: "○",
    Phase.TOOL: "●",
    Phase.DROPPED: "×",
}


@dataclass(frozen=True, slots=True)
class Span:
    """One call on the axis of time."""

    stage: str
    began_s: float
    """On a clock that all spans of a picture share."""
    phases: tuple[tuple[Phase, float], ...]
    """In order, each with its seconds."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    attempts: int = 1
    error: str = ""

    @property
    def duration_s(self) -> float:
        """Seconds from the call's arrival to its end."""
        return sum(seconds for _, seconds in self.phases)

    @property
    def ended_s(self) -> float:
        """When the call ended."""
        return self.began_s + self.duration_s

    @classmethod
    def of(cls, row: Mapping[str, Any], ended_s: float | None = None) -> Span:
        """Return the span of a record's fields; without *ended_s*, ``at`` says when the call ended."""
        ended_s = _instant(row.get("at")) if ended_s is None else ended_s
        phases = _phases(row)
        return cls(
            stage=shown(row.get("stage") or "", 200) or "(no graph)",
            began_s=ended_s - sum(seconds for _, seconds in phases),
            phases=phases,
            prompt_tokens=_count(row.get("prompt_tokens")),
            cached_tokens=_count(row.get("cached_tokens")),
            completion_tokens=_count(row.get("completion_tokens")),
            attempts=_count(row.get("attempts")) or 1,
            error=shown(row.get("error") or "", 200),
        )


def tool_span(row: Mapping[str, Any]) -> Span:
    """Return the span of a tool that began before its turn, from its line in a records file."""
    hidden_s, waited_s = _seconds(row.get("hidden_s")), _seconds(row.get("waited_s"))
    dropped = "dropped" in row
    return Span(
        stage=f"{shown(row.get('stage') or '', 200)}: {shown(row.get('early_tool'), 200)}",
        began_s=_instant(row.get("at")) - _seconds(row.get("began_before_s")),
        phases=((Phase.DROPPED, _seconds(row.get("ran_s"))),)
        if dropped
        else ((Phase.EARLY, hidden_s), (Phase.TOOL, waited_s)),
    )


def _phases(row: Mapping[str, Any]) -> tuple[tuple[Phase, float], ...]:
    took_s = _seconds(row.get("duration_s"))
    if row.get("backend") is None and not row.get("external"):
        return ((Phase.QUEUED, took_s),)
    queued_s = min(_seconds(row.get("queue_wait_s")), took_s)
    if row.get("ttft_s") is None:
        return ((Phase.QUEUED, queued_s), (Phase.SERVED, took_s - queued_s))
    prefill_s = min(_seconds(row["ttft_s"]), took_s - queued_s)
    return (
        (Phase.QUEUED, queued_s),
        (Phase.PREFILL, prefill_s),
        (Phase.DECODE, max(0.0, took_s - queued_s - prefill_s)),
    )


def _seconds(value: Any) -> float:
    usable = isinstance(value, int | float) and math.isfinite(value)
    return max(0.0, float(value)) if usable else 0.0


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _instant(at: Any) -> float:
    try:
        return datetime.fromisoformat(str(at)).timestamp()
    except (ValueError, OverflowError, OSError):  # a line of another's making
        return 0.0


# One call


def call(span: Span, width: int) -> list[Line]:
    """Return one call as a line of time over its axis, and what each of its phases took."""
    width = max(LEAST, min(MOST, width))
    scale = _Scale(span.began_s, span.ended_s, width)
    lines: list[Line] = [scale.bar(span), *scale.axis(), ()]
    for phase, seconds in span.phases:
        said = _of_phase(phase, seconds, span)
        lines.append(
            ((phase.mark, phase.value), (f" {phase.value:<8}{seconds:8.3f} s", ""), (said and f"  {said}", ""))
        )
    if span.attempts > 1:
        lines.append(((f"{span.attempts} attempts; the time of those that failed lies in the last phase", "dim"),))
    if span.error:
        lines.append(((f"✗ {span.error}", "error"),))
    return lines


def _of_phase(phase: Phase, seconds: float, span: Span) -> str:
    prompt, cached, answered = span.prompt_tokens, span.cached_tokens, span.completion_tokens
    said = []
    if phase in (Phase.PREFILL, Phase.SERVED) and prompt is not None:
        said.append(_computed(prompt, cached))
    if phase in (Phase.DECODE, Phase.SERVED) and answered is not None:
        pace = f", {answered / seconds:.1f} a second" if phase is Phase.DECODE and seconds > 0.001 else ""
        said.append(f"{answered} tokens answered{pace}")
    return "; ".join(said)


def _computed(prompt: int, cached: int | None) -> str:
    if cached is None:
        return f"{prompt} prompt tokens"
    return f"{prompt - cached} of {prompt} prompt tokens computed, {cached} cached"


# Many calls


def chart(spans: Iterable[Span], width: int) -> list[Line]:
    """Return calls under one another in the order in which they came: stages left, one axis of time below."""
    ordered = sorted(spans, key=lambda span: (span.began_s, span.ended_s))
    if not ordered:
        return []
    width = max(LEAST, min(MOST, width))
    names = [_name(span.stage) for span in ordered]
    figures = _figures(ordered)
    left = max(map(len, names)) + 2
    right = max(map(len, figures)) + 2
    if width - left - right < LEAST_CHART:
        figures, right = [""] * len(figures), 0
    scale = _Scale(ordered[0].began_s, max(span.ended_s for span in ordered), max(LEAST_CHART, width - left - right))
    lines: list[Line] = []
    for span, name, said in zip(ordered, names, figures, strict=True):
        lines.append(((f"{name:<{left}}", "bold"), *scale.bar(span), (f"  {said}" if said else "", "dim")))
    lines += [((" " * left, ""), *line) for line in scale.axis()]
    used = {phase for span in ordered for phase, seconds in span.phases if seconds}
    return [*lines, (), legend(used or {Phase.QUEUED, Phase.PREFILL, Phase.DECODE})]


def _name(stage: str) -> str:
    return stage if len(stage) <= NAME_COLUMNS else f"…{stage[1 - NAME_COLUMNS :]}"


def _figures(spans: Sequence[Span]) -> list[str]:
    """Return what stands right of each line: how long the call took, and what of its prompt was cached."""
    took = _aligned([f"{span.duration_s:.2f} s" for span in spans])
    cached = _aligned(["" if span.cached_tokens is None else str(span.cached_tokens) for span in spans])
    prompt = _aligned(["" if span.prompt_tokens is None else str(span.prompt_tokens) for span in spans])
    said = [
        f"{seconds}  {found} of {whole} cached" if found.strip() and whole.strip() else seconds
        for seconds, found, whole in zip(took, cached, prompt, strict=True)
    ]
    widest = max(map(len, said))
    return [f"{text:<{widest}} ✗" if span.error else text for text, span in zip(said, spans, strict=True)]


def _aligned(texts: Sequence[str]) -> list[str]:
    widest = max(map(len, texts))
    return [f"{text:>{widest}}" for text in texts]


def legend(used: Iterable[Phase]) -> Line:
    """Return the line that says what the marks mean."""
    kept = set(used)
    pieces: list[Piece] = []
    for phase in Phase:
        if phase in kept:
            pieces += [(phase.mark, phase.value), (f" {phase.value}  ", "")]
    return pieces


@dataclass(frozen=True, slots=True)
class _Scale:
    """Seconds as columns."""

    start_s: float
    end_s: float
    columns: int

    def column(self, at_s: float) -> int:
        """Return the column of a moment."""
        whole = self.end_s - self.start_s
        return min(self.columns, max(0, round((at_s - self.start_s) / whole * self.columns))) if whole > 0 else 0

    def bar(self, span: Span) -> list[Piece]:
        """Return a call's line, padded to the whole width; a call has one column at least."""
        first = min(self.column(span.began_s), self.columns - 1)
        pieces: list[Piece] = [(" " * first, "")]
        drawn, at_s = first, span.began_s
        for phase, seconds in span.phases:
            at_s += seconds
            until = self.column(at_s)
            if until > drawn:
                pieces.append((phase.mark * (until - drawn), phase.value))
                drawn = until
        if drawn == first:
            longest = max(span.phases, key=lambda each: each[1])[0]
            pieces.append((longest.mark, longest.value))
            drawn += 1
        return [*pieces, (" " * (self.columns - drawn), "")]

    def axis(self) -> list[Line]:
        """Return the axis of time: a rule with marks, and their seconds under it."""
        whole = self.end_s - self.start_s
        step, digits = _step(whole, max(1, self.columns // TICK_COLUMNS))
        rule, labels = ["─"] * self.columns, [" "] * (self.columns + 8)
        ticks = range(int(whole / step + 1e-9) + 1)
        for nth in ticks:
            at = min(self.columns - 1, self.column(self.start_s + nth * step))
            rule[at] = "└" if nth == 0 else "┴"
            label = f"{nth * step:.{digits}f}" + (" s" if nth == ticks[-1] else "")
            at = min(at, self.columns - len(label))  # the last one stays inside
            labels[at : at + len(label)] = label
        return [(("".join(rule), "dim"),), (("".join(labels).rstrip(), "dim"),)]


def _step(whole_s: float, marks: int) -> tuple[float, int]:
    """Return a round step of seconds that gives at most so many marks, and how many decimals it needs."""
    if whole_s <= 0:
        return 1.0, 0
    least = whole_s / marks
    power = math.floor(math.log10(least))
    factor = next(factor for factor in (1, 2, 5, 10) if factor * 10.0**power >= least * (1 - 1e-9))
    power, factor = (power + 1, 1) if factor == 10 else (power, factor)
    return factor * 10.0**power, max(0, -power)


# Where it is shown


def columns() -> int:
    """Return how wide the terminal is; 80 where there is none."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def plain(lines: Iterable[Line], encoding: str | None = None) -> str:
    """Return lines as text without colours; in ASCII where *encoding* has no blocks."""
    return _drawn(lines, lambda text, _: text, encoding)


def coloured(lines: Iterable[Line], encoding: str | None = None) -> str:
    """Return lines as text with a terminal's colours."""
    return _drawn(lines, lambda text, style: f"\x1b[{_ANSI[style]}m{text}\x1b[0m" if style else text, encoding)


def for_stream(lines: Iterable[Line], stream: TextIO) -> str:
    """Return lines as *stream* can take them: coloured for a terminal, else plain."""
    encoding = getattr(stream, "encoding", None)
    bright = stream.isatty() and not os.environ.get("NO_COLOR")
    return coloured(lines, encoding) if bright else plain(lines, encoding)


def _drawn(lines: Iterable[Line], draw: Callable[[str, str], str], encoding: str | None) -> str:
    texts = []
    for line in lines:
        trimmed = list(line)
        while trimmed and not trimmed[-1][0].strip():
            trimmed.pop()
        if trimmed:
            trimmed[-1] = (trimmed[-1][0].rstrip(), trimmed[-1][1])
        texts.append("".join(draw(text, style) for text, style in trimmed if text))
    drawn = "\n".join(texts)
    try:
        drawn.encode(encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        drawn = drawn.translate(_ASCII).encode("ascii", "replace").decode()
    return drawn


def rich_text(lines: Iterable[Line]) -> Any:
    """Return lines as rich draws them; needs rich."""
    from rich.text import Text

    texts = (Text.assemble(*((text, _RICH.get(style, "")) for text, style in line)) for line in lines)
    return Text("\n", no_wrap=True, overflow="crop").join(texts)


def svg(lines: Iterable[Line], title: str) -> str:
    """Return lines as an SVG of a terminal, which asks for no font from elsewhere; needs rich."""
    import io
    import re

    from rich.console import Console

    drawn = list(lines)
    width = max((sum(len(text) for text, _ in line) for line in drawn), default=LEAST)
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(rich_text(drawn))
    picture = console.export_svg(title=title)
    return re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)
