"""Where a page keeps what a benchmark measured: between a line that names it, and ``END``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
END = "<!-- end of figures -->"


def begin(name: str) -> str:
    """Return the line that stands before the figures of a benchmark, such as ``cache: vllm``."""
    return f"<!-- figures of bench/{name} -->"


def put(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put *lines* where *page* keeps the figures of *name*; all else of it stays."""
    made = "\n".join([begin(name), "", *lines, "", END])
    text = page.read_text(encoding="utf-8")
    changed, found = re.subn(f"{re.escape(begin(name))}.*?{END}", lambda _: made, text, flags=re.S)
    if not found:
        raise SystemExit(f"{page} has no place for the figures of {name}: no line {begin(name)}")
    page.write_text(changed, encoding="utf-8")
