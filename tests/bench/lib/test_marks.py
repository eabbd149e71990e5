"""Pages keep the figures of benchmarks between marks, and every benchmark that writes has its place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.lib import command as marks

PLACE = re.compile(r"<!-- figures of bench/(\w+)(?:: ([^>]*))? -->")


def test_figures_replace_those_that_were_there_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("\n".join(["# A", marks.begin("a"), marks.END, "# B", marks.begin("b: x"), marks.END, "z\n"]))
    for figure in ("one", r"two \1"):
        marks.put(page, "b: x", [figure])
    marks.put(page, "a", ["alpha"])
    said = page.read_text(encoding="utf-8").split()
    assert [word for word in said if word in ("alpha", "one", "two", "z", "A", "B")] == [
        "A",
        "alpha",
        "B",
        "two",
        "z",
    ]
    with pytest.raises(SystemExit, match=r"no place for the figures of c"):
        marks.put(page, "c", [])


def test_every_place_in_the_pages_is_of_a_benchmark_that_writes_and_ends() -> None:
    found = {}
    for page in sorted(marks.DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert len(PLACE.findall(text)) == text.count(marks.END), page
        found |= {name: page for name, _ in PLACE.findall(text)}
    writing = {
        path.stem if path.parent.name == "bench" else path.parent.name
        for folder in ("bench", "tests/scale_faults")
        for path in (marks.ROOT / folder).rglob("*.py")
        if re.search(r"(?<![.\w])(put|finish)\(", path.read_text(encoding="utf-8"))
    }
    assert set(found) == writing - {"lib"}
