"""What is under way, and for how long: a line rewritten on a terminal, else a new line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["Progress"]

EVERY_S = 10.0
WIDTH = 110


class Progress:
    """Tells of one phase after another on *out* (standard output).

    Where *out* is no terminal, a phase has a line at its start and, while it lasts, one every ten seconds.
    """

    def __init__(self, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out or sys.stdout
        self._clock = clock
        self._began = self._told = clock()
        self._title = ""
        self._open = False

    def phase(self, title: str) -> None:
        """Begin another phase; the same one again changes nothing."""
        if title != self._title:
            self._title = title
            self.end()
            self._show("", due=True)

    def detail(self, text: str) -> None:
        """Tell how far the phase is; to be called often."""
        self._show(f": {text}" if text else "", due=self._clock() - self._told >= EVERY_S)

    def end(self) -> None:
        """Leave the cursor at the start of a line, so that others can print."""
        if self._open:
            self._out.write("\n")
            self._open = False

    def _show(self, detail: str, *, due: bool) -> None:
        line = f"[{self._clock() - self._began:4.0f} s] {self._title}{detail}"
        if self._out.isatty():
            self._out.write(f"\r{line[:WIDTH]:{WIDTH}}")
            self._open = True
        elif due:
            self._out.write(f"{line}\n")
            self._told = self._clock()
        self._out.flush()
