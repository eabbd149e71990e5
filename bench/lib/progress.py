"""How a benchmark shows how far it is: on a terminal in one line that is written over, elsewhere line by line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

WIDTH = 100
"""Of the line; a shorter text covers a longer one before it."""
BAR = 20


def tell(text: str, *, last: bool = False) -> None:
    """Write on standard error how far it is; after the *last* text another line begins."""
    if sys.stderr.isatty():
        print(f"\r{text:<{WIDTH}}", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def bar(text: str, total: int) -> Callable[[], None]:
    """Show a bar; each call of what it returns moves it by one of *total*. Elsewhere than on a terminal it stands."""
    begin_s, done = time.monotonic(), 0

    def show() -> None:
        full = BAR * min(done, total) // total
        tell(f"{text:<58} {'█' * full}{'·' * (BAR - full)} {time.monotonic() - begin_s:4.0f} s")

    def tick() -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            show()

    show()
    return tick
