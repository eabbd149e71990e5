"""Microseconds of small things, many times over."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any, NamedTuple

from bench.lib.figures import at_rank


class Taken(NamedTuple):
    """Of one thing, over all its times, in microseconds."""

    median: float
    p99: float
    most: float
    count: int


def taken(seconds: Iterable[float]) -> Taken:
    us = [each * 1e6 for each in seconds]
    return Taken(median(us), at_rank(us, 0.99), max(us), len(us))


def timed(work: Callable[[Any], object], on: Iterable[Any]) -> Taken:
    """Return what *work* takes on each of these things, the garbage collector left out."""
    took = []
    gc.collect()
    gc.disable()
    try:
        for each in on:
            begin = time.perf_counter()
            work(each)
            took.append(time.perf_counter() - begin)
    finally:
        gc.enable()
    return taken(took)
