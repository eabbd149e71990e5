"""A replay as a table, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from orla_lg.errors import ConfigError
from orla_lg.replay.calibration import Calibrated
from orla_lg.replay.figures import CACHED, COST, FIGURES, MEAN_RUN, MEAN_TTFT, P95_RUN, Figure, Match
from orla_lg.replay.verdict import Conclusions

HAPPENED, UNCHANGED = "happened", "unchanged"
WITHHELD, UNKNOWN = "·", "–"


@dataclass(slots=True)
class ReplayReport:
    """What a replay found."""

    source: str
    calls: int
    runs: int
    happened: Mapping[str, float | None]
    unchanged: Mapping[str, float | None]
    engines: Mapping[str, Calibrated]
    verdict: Conclusions | None
    """``None``: the file does not say what happened."""
    others: dict[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Of each other setting, its figures."""
    ended_early: dict[str, int] = field(default_factory=dict)
    """Of each setting, calls that ended without an answer."""
    notes: list[str] = field(default_factory=list)
    anyway: bool = False

    @property
    def shows_others(self) -> bool:
        """Whether other settings are compared."""
        return self.verdict is None or self.verdict.concludes or self.anyway

    def withheld(self, figure: Figure) -> bool:
        """Whether nothing is concluded of a figure: it is off, or it is not known what it was."""
        if self.verdict is None or self.anyway:
            return False
        return figure.name in self.verdict.withheld or self.happened[figure.name] is None

    def asdict(self) -> dict[str, Any]:
        """Return all as plain data."""
        made: dict[str, Any] = {
            "source": self.source,
            "calls": self.calls,
            "runs": self.runs,
            "engines": {
                name: {"fitted_to": each.calls, **asdict(each.parameters)} for name, each in self.engines.items()
            },
            "happened": dict(self.happened),
            "unchanged": dict(self.unchanged),
            "notes": self.notes,
        }
        if self.verdict is not None:
            made["match"] = [
                {"figure": match.figure.name, "off": match.off, "holds": match.holds}
                for match in self.verdict.matches
            ]
            made |= {"concludes": self.verdict.concludes, "reasons": list(self.verdict.reasons)}
        if self.shows_others:
            names = [figure.name for figure in FIGURES if not self.withheld(figure)]
            made["others"] = {
                name: {figure: found[figure] for figure in names} | {"ended_early": self.ended_early.get(name, 0)}
                for name, found in self.others.items()
            }
        return made


def signed(part: float) -> str:
    """Return a difference as a part of what it is a difference from."""
    return f"{part:+.0%}".replace("-0%", "+0%") if abs(part) < 0.01 else f"{part:+.0%}"


def shown(figure: Figure, value: float | None) -> str:
    """Return a figure's value for a reader."""
    if value is None:
        return UNKNOWN
    if figure.unit == "share":
        return f"{value:.1%}"
    if figure.unit == "usd":
        return f"${value:,.4f}"
    return f"{value:,.2f} s" if value < 100 else f"{value:,.0f} s"


def table(report: ReplayReport) -> list[str]:
    """Return the table: what happened, the unchanged setting beside it, and others beside the unchanged."""
    figures = [figure for figure in FIGURES if report.unchanged[figure.name] is not None]
    rows = [["", *(figure.title for figure in figures)]]
    if report.verdict is not None:
        rows.append([HAPPENED, *(shown(figure, report.happened[figure.name]) for figure in figures)])
    rows.append([f"{UNCHANGED}, simulated", *(_unchanged(report, figure) for figure in figures)])
    if report.shows_others:
        for name, found in report.others.items():
            rows.append([name, *(_other(report, figure, found) for figure in figures)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_line(row, widths) for row in rows]


def _line(row: list[str], widths: list[int]) -> str:
    first, *others = (cell.rjust(width) if at else cell.ljust(width) for at, (cell, width) in enumerate(
        zip(row, widths, strict=True)))  # fmt: skip
    return "  ".join([first, *others]).rstrip()


def _unchanged(report: ReplayReport, figure: Figure) -> str:
    said = shown(figure, report.unchanged[figure.name])
    off = None if report.verdict is None else next((m for m in report.verdict.matches if m.figure is figure), None)
    if off is None or off.off is None:
        return said
    return f"{said} ({_part(off)}{'' if off.holds else ' ✗'})"


def _other(report: ReplayReport, figure: Figure, found: Mapping[str, float | None]) -> str:
    """Return a figure of another setting and how it compares to the unchanged one, both simulated."""
    if report.withheld(figure):
        return WITHHELD
    value, base = found[figure.name], report.unchanged[figure.name]
    if value is None or base is None:
        return UNKNOWN
    if figure is CACHED:
        return f"{shown(figure, value)} ({round((value - base) * 100):+})"
    return f"{shown(figure, value)} ({signed(value / base - 1)})" if base else shown(figure, value)


def text(report: ReplayReport) -> list[str]:
    """Return the whole report for a reader."""
    lines = [f"{report.source}: {report.calls:,} calls in {report.runs:,} runs"]
    for name, each in report.engines.items():
        how = f"fitted to {each.calls:,} calls" if each.calls else "as given"
        numbers, decode_s = each.parameters, each.parameters.step_s + each.parameters.decode_sequence_s
        lines.append(
            f"engine {name!r} ({how}): {numbers.prefill_token_s * 1e3:.3g} ms for a token of prefill, "
            f"{decode_s * 1e3:.3g} ms for a step that decodes one, {numbers.decode_sequence_s * 1e3:.3g} ms more for "
            f"each beside it; a pool of {numbers.kv_tokens:,} tokens in blocks of {numbers.block_tokens}"
        )
    lines += ["", *table(report), ""]
    lines += _conclusion(report)
    if report.notes:
        lines += ["", *(f"note: {note}" for note in report.notes)]
    return lines


def _conclusion(report: ReplayReport) -> list[str]:
    verdict = report.verdict
    if verdict is None:
        return [
            "the file says what came and not what happened: nothing shows how near the simulation is to an engine"
        ]
    off = [match for match in verdict.matches if not match.holds]
    if not off:
        return [f"the unchanged setting matches what happened within {verdict.matches[0].tolerance:.0%}"] if (
            verdict.matches) else ["nothing is known of what happened"]  # fmt: skip
    named = ", ".join(f"{match.figure.title} {_part(match)}" for match in off if match.off is not None)
    if verdict.concludes:
        lines = [f"nothing is concluded of what does not match ({named}); the other figures match"]
    elif report.anyway:
        lines = [f"THE SIMULATION DOES NOT MATCH WHAT HAPPENED ({named}): what follows from it is doubtful"]
    else:
        lines = [
            f"the simulation of the unchanged setting does not match what happened ({named}), so other settings are "
            "not compared; --anyway compares them all the same"
        ]
    return [*lines, *(f"  likely: {reason}" for reason in verdict.reasons)]


def _part(match: Match) -> str:
    assert match.off is not None
    return signed(match.off) if isfinite(match.off) else "from none"


def draw(report: ReplayReport, path: Path) -> None:
    """Draw the settings beside one another; ``.svg``, ``.png`` or ``.pdf``, as the file's name says.

    Raises:
        ConfigError: matplotlib is not installed, or does not know such a file.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("--plot draws with matplotlib, which is not installed: pip install matplotlib")
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    settings = {HAPPENED: report.happened} if report.verdict is not None else {}
    settings |= {UNCHANGED: report.unchanged, **(report.others if report.shows_others else {})}
    panes = [
        figure
        for figure in (MEAN_RUN, P95_RUN, MEAN_TTFT, CACHED, COST)
        if not report.withheld(figure) and report.unchanged[figure.name] is not None
    ]
    if not panes:
        raise ConfigError("--plot: no figure matches what happened, so there is nothing to draw; --anyway draws all")
    with plt.rc_context({"svg.hashsalt": "orla-lg replay", "svg.fonttype": "path", "font.size": 8}):
        size = (2.6 * len(panes) + 1.2, 0.32 * len(settings) + 1.0)
        drawing, axes = plt.subplots(1, len(panes), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, figure in zip(axes[0], panes, strict=True):
            values = [found[figure.name] or 0.0 for found in settings.values()]
            colours = [
                "#444" if name == HAPPENED else "#aaa" if name == UNCHANGED else "#3b7dd8" for name in settings
            ]
            axis.barh([*settings], values, color=colours, height=0.6)
            axis.axvline(report.unchanged[figure.name] or 0.0, color="#aaa", ls="--", lw=0.8)
            axis.set(
                title=figure.title, xlabel={"s": "seconds", "share": "of prompt tokens", "usd": "US$"}[figure.unit]
            )
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][0].invert_yaxis()
        try:
            drawing.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--plot {path}: {error}") from error
        finally:
            plt.close(drawing)
