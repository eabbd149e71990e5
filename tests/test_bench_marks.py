"""Pages keep the figures of benchmarks between marks, and every benchmark that writes has its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_bench_policies import BENCH, loaded

PLACE = re.compile(r"<!-- figures of bench/(\w+\.py)(?:: ([^>]*))? -->")


@pytest.fixture(scope="module")
def marks() -> Iterator[Any]:
    yield from loaded("marks")


def test_figures_replace_those_that_were_there_and_nothing_else(marks: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "\n".join(["# A", marks.begin("a.py"), marks.END, "# B", marks.begin("b.py: x"), marks.END, "z\n"])
    )
    for figure in ("one", r"two \1"):
        marks.put(page, "b.py: x", [figure])
    marks.put(page, "a.py", ["alpha"])
    said = page.read_text(encoding="utf-8").split()
    assert [word for word in said if word in ("alpha", "one", "two", "z", "A", "B")] == [
        "A",
        "alpha",
        "B",
        "two",
        "z",
    ]
    with pytest.raises(SystemExit, match=r"no place for the figures of c\.py"):
        marks.put(page, "c.py", [])


def test_every_place_in_the_pages_is_of_a_benchmark_that_writes_and_ends(marks: Any) -> None:
    found = {}
    for page in sorted(marks.DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert len(PLACE.findall(text)) == text.count(marks.END), page
        found |= {name: page for name, _ in PLACE.findall(text)}
    writing = {each.name for each in BENCH.glob("*.py") if re.search(r"\bput\(", each.read_text(encoding="utf-8"))}
    assert set(found) == writing - {"marks.py"}
