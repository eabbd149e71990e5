"""Drawings are the same bytes for the same figures."""

from __future__ import annotations

from pathlib import Path

from bench.lib import plot
from bench.lib.figures import Spread


def test_the_same_figures_make_the_same_file(tmp_path: Path) -> None:
    for name in ("one", "again"):
        figure, (left, right) = plot.pyplot("test", text=True).subplots(1, 2)
        plot.shares(left, [3.0, 1.0, 2.0], "waits")
        plot.bars(right, {"bare": Spread(1.0, 0.5, 2.0)}, ["#aaa"], 0.8, "#c33")
        plot.open_axes(left, right)
        plot.save(figure, tmp_path / f"{name}.svg")
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    assert drawn == (tmp_path / "again.svg").read_text(encoding="utf-8")
    assert ">bare<" in drawn, "letters stay letters"
