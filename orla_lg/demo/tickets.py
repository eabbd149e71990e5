"""The demo's tickets: made-up letters to a made-up company."""

from __future__ import annotations

import itertools
import random
from importlib.resources import files


def tickets() -> list[str]:
    """Return the tickets that ship with the demo, in the order of the file."""
    text = (files("orla_lg.demo") / "data" / "tickets.txt").read_text(encoding="utf-8")
    paragraphs = (paragraph.strip() for paragraph in text.split("\n\n"))
    return [paragraph for paragraph in paragraphs if paragraph and not paragraph.startswith("#")]


def pick(count: int, seed: int | None = None) -> list[str]:
    """Return *count* tickets: in order, or shuffled by *seed*; they come again when there are not enough."""
    letters = tickets()
    if seed is not None:
        random.Random(seed).shuffle(letters)
    return list(itertools.islice(itertools.cycle(letters), count))
