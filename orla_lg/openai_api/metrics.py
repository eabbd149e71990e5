"""Engines' load in Prometheus' text form, as far as adapters read it."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator

_SAMPLE = re.compile(r"^(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def samples(text: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    """Yield labels and value of each sample called *name* that is a number; counters may carry ``_total``."""
    for found in _SAMPLE.finditer(text):
        if found["name"] in (name, f"{name}_total"):
            with contextlib.suppress(ValueError):
                if math.isfinite(value := float(found["value"])):
                    yield dict(_LABEL.findall(found["labels"] or "")), value


def sample(text: str, name: str) -> float | None:
    """Return the sum of the samples called *name* (one for each engine behind the URL); ``None`` if none is."""
    values = [value for _, value in samples(text, name)]
    return sum(values) if values else None
