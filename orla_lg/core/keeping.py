"""Estimates on disk: read at the start, written at the end and now and then. No call waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from pathlib import Path

from orla_lg.core.background import Background
from orla_lg.core.estimates import Estimates
from orla_lg.errors import ConfigError, OrlaClosed

log = logging.getLogger("orla_lg")

SAVE_EVERY_S = 60.0
"""What was learned in the last so many seconds is lost when the process is killed."""


class EstimatesFile:
    """The file that estimates outlive their process in.

    Several processes may share one; each writes it whole, so the last one's knowledge stays.

    Raises:
        ConfigError: It is there but not ours, or could not be written where it is to lie.
    """

    def __init__(self, path: str | Path, estimates: Estimates, background: Background) -> None:
        self.path = Path(path)
        self._estimates = estimates
        self._background = background
        self._lock = threading.Lock()
        self._waiting = False
        self._unsaved = False
        self._complained = False
        if not self.path.parent.is_dir():
            raise ConfigError(f"estimates_file {str(path)!r}: there is no folder {str(self.path.parent)!r}")
        estimates.load(self.path)

    def learned(self) -> None:
        """Note that there is something new to keep; it is written within ``SAVE_EVERY_S``."""
        with self._lock:
            self._unsaved = True
            if self._waiting:
                return
            self._waiting = True
        self._background.call_later(SAVE_EVERY_S, self._due)

    def _due(self) -> None:
        with self._lock:
            self._waiting = False
        with contextlib.suppress(OrlaClosed):  # closing saves
            self._background.submit(asyncio.to_thread(self.save))  # the loop has other work than to wait for a disk

    def save(self) -> None:
        """Write what is new; a disk that refuses is told of once, and disturbs nothing."""
        with self._lock:
            if not self._unsaved:
                return
            self._unsaved = False
            try:
                self._estimates.save(self.path)
            except ConfigError as error:
                self._unsaved = True
                if not self._complained:
                    self._complained = True
                    log.warning("%s; what is learned is lost when the process ends", error)
