"""How a benchmark tells how far it is: on a terminal in one line that is written over, elsewhere line by line."""

from __future__ import annotations

import sys

WIDTH = 100
"""Of the line; a shorter text covers a longer one before it."""


def tell(text: str, *, last: bool = False) -> None:
    """Write on standard error how far it is; after the *last* text another line begins."""
    if sys.stderr.isatty():
        print(f"\r{text:<{WIDTH}}", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)
