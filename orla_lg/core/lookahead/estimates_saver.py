"""Estimates on disk: read at the start, written at the end and now and then. No call waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import stat
import threading
from pathlib import Path

from orla_lg.core.background import Background
from orla_lg.core.boundary.plain import is_path
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.errors import ConfigError, OrlaClosed

log = logging.getLogger("orla_lg")

MANY_BROKEN = 100
"""So many files are not set aside: something breaks them."""

SAVE_EVERY_S = 60.0
"""What was learned in the last so many seconds is lost when the process is killed."""


class EstimatesFile:
    """The file that estimates outlive their process in.

    Several processes may share one; each writes it whole, so the last one's knowledge stays. One whose contents are
    not ours, or broken, is set aside under another name and not overwritten: it may be somebody's. One that cannot be
    set aside stays where it is, and what this process learns is not kept.

    Raises:
        ConfigError: It cannot be read, or could not be written where it is to lie.
    """

    def __init__(self, path: str | Path, estimates: Estimates, background: Background) -> None:
        self.path = Path(path)
        self._estimates = estimates
        self._background = background
        self._lock = threading.Lock()
        self._waiting = False
        self._unsaved = False
        self._complained = False
        self._keeps = True
        """Whether what is learned may be written over what is there."""
        if not is_path(self.path):
            raise ConfigError(
                f"estimates_file: {str(path)!r} is no file's path: there is a NUL or a lone surrogate in it"
            )
        try:
            if not stat.S_ISDIR(self.path.parent.stat().st_mode):
                raise NotADirectoryError
        except (FileNotFoundError, NotADirectoryError):
            raise ConfigError(f"estimates_file {str(path)!r}: there is no folder {str(self.path.parent)!r}") from None
        except OSError as error:
            raise ConfigError(f"estimates_file {str(path)!r} cannot be read: {error.strerror}") from error
        try:
            estimates.load(self.path)
        except ConfigError as fault:
            self._set_aside(fault)
        except OSError as error:
            raise ConfigError(f"estimates_file {str(path)!r} cannot be read: {error.strerror}") from error

    def _set_aside(self, fault: ConfigError) -> None:
        """Give the file another name, so that what is learned from now on has its place."""
        names = (self.path.with_name(f"{self.path.name}.broken{number}") for number in ("", *range(2, MANY_BROKEN)))
        aside = next((name for name in names if not os.path.lexists(name)), None)
        if aside is None:
            self._give_up(f"{fault}, and so do {MANY_BROKEN - 1} set aside before it; remove them to begin anew")
            return
        try:
            self.path.rename(aside)
        except FileNotFoundError:  # another process that shares it was sooner
            return
        except OSError as error:
            self._give_up(f"{fault} and cannot be renamed ({error.strerror}); remove it to begin anew")
            return
        log.warning("%s; it is now %s, and this process begins with nothing learned", fault, aside.name)

    def _give_up(self, reason: str) -> None:
        self._keeps = False
        log.warning("%s. This process begins with nothing learned, and keeps nothing", reason)

    def learned(self) -> None:
        """Note that there is something new to keep; it is written within ``SAVE_EVERY_S``."""
        with self._lock:
            self._unsaved = self._keeps
            if self._waiting or not self._keeps:
                return
            self._waiting = True
        self._background.call_later(SAVE_EVERY_S, self._due)

    def _due(self) -> None:
        with self._lock:
            self._waiting = False
        with contextlib.suppress(OrlaClosed):  # closing saves
            self._background.submit(asyncio.to_thread(self.save))  # the loop has other work than to wait for a disk

    def save(self) -> None:
        """Write what is new; a disk that refuses is logged once, and disturbs nothing."""
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
