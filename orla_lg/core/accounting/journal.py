"""Records on disk: one JSON line each, appended by a thread of its own, so that no call waits for a disk."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from orla_lg.core.accounting.shapes import Shapes
from orla_lg.core.boundary.plain import is_path, json_line
from orla_lg.core.call import Call
from orla_lg.core.record import CacheFollowUp, Record
from orla_lg.errors import ConfigError

log = logging.getLogger("orla_lg")

CAPACITY = 10_000
"""Lines that may wait for the disk; what comes then is dropped and counted."""

CLOSE_PATIENCE_S = 5.0

BATCH_BYTES = 256 * 1024
"""Lines are given to the disk together, about so much at a time."""

MOST_PROMPTS = 500
"""Lines that may wait with their call's prompt at hand; behind a slow disk, lines are written without its shape."""

SETTING_EVERY_S = 1.0
"""The setting is looked at no more often, and written, with a call's shape, where it changed."""

MODE = 0o600
"""Of a file that is made: ids, stages and errors concern its user alone. One that is there keeps its mode."""

Line = tuple[str, Callable[[], Mapping[str, Any]]]
"""When it came, and what makes its fields; made by the writing thread."""


class Journal:
    """Appends records, and scores given to them later, to a file that ``orla-lg explain`` reads.

    Each line is a JSON object with ``at``, the wall time in UTC. A record's has its fields; a score's has
    ``feedback`` (the record's id) and ``score``; what became known later of a call's cache has ``amends`` (the
    record's id), ``cache_orders`` and ``cache_borne_out``; a tool that began before its turn has
    ``early_tool``, its name, and ``dropped`` where no call got its result; one that did not begin has ``late_tool``.

    Raises:
        ConfigError: No file can have this path.
    """

    def __init__(self, path: str | Path, capacity: int = CAPACITY) -> None:
        self.path = Path(path)
        if not is_path(self.path):
            raise ConfigError(
                f"records_file: {str(path)!r} is no file's path: there is a NUL or a lone surrogate in it"
            )
        self._capacity = capacity
        self._lock = threading.Lock()
        self._lines = queue.SimpleQueue[Line | None]()
        """Unbounded by itself: what is put into it while it is full is dropped before. Its ``put`` takes no lock that
        a thread could hold at this moment, so ``end`` may be called while garbage is collected."""
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._lost = 0
        self._in_hand = 0
        """Lines that the thread took and did not write yet."""
        self._complained = False
        self._closed = False
        self._shapes = Shapes(self.path)
        self.setting: Callable[[], Mapping[str, Any]] | None = None
        """Returns the setting as it is now; called by the writing thread."""
        self._setting_is: Mapping[str, Any] = {}
        self._setting_at_s = -SETTING_EVERY_S

    @property
    def dropped(self) -> int:
        """Lines that no longer fit in the queue, that the disk refused, or that were not written before the end."""
        if not self._closed or self._pid != os.getpid():
            return self._lost
        waiting = self._lines.qsize() - self._is_writing()  # less the mark of the end, which an ended thread took
        return self._lost + self._in_hand + max(0, waiting)

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def record(self, record: Record, call: Call | None = None) -> None:
        """Append a record, soon, with what a replay needs of its *call*; never waits."""
        if call is None or self._lines.qsize() >= MOST_PROMPTS:
            self._put(record.asdict)
        else:
            self._put(partial(self._with_shape, record, call))

    def amended(self, record_id: str, late: CacheFollowUp) -> None:
        """Append what became known of a call's cache after its record was made, soon."""
        orders, borne_out = late.orders, late.borne_out
        self._put(lambda: {"amends": record_id, "cache_orders": orders, "cache_borne_out": borne_out})

    def feedback(self, record_id: str, score: float) -> None:
        """Append a score, soon."""
        self._put(lambda: {"feedback": record_id, "score": score})

    def early_tool(
        self, run: str, call: str, stage: str, name: str, *, began_before_s: float, hidden_s: float, waited_s: float
    ) -> None:
        """Append when a tool began that was started before its turn, soon; times in seconds.

        Args:
            run: The root run.
            call: The record's id of the call in whose answer it was asked for.
            stage: Of the tool's own node.
            name: The tool's.
            began_before_s: So long before the line's ``at`` it began.
            hidden_s: So much of its time passed before its turn.
            waited_s: So long its turn waited for it.
        """
        line = {"early_tool": name, "run": run, "call": call, "stage": stage, "began_before_s": began_before_s,
                "hidden_s": hidden_s, "waited_s": waited_s}  # fmt: skip
        self._put(lambda: line)

    def dropped_tool(
        self, run: str, call: str, stage: str, name: str, why: str, *, began_before_s: float, ran_s: float
    ) -> None:
        """Append that a tool began before its turn and no call got its result, soon; as ``early_tool``.

        Args:
            run: The root run.
            call: The record's id of the call in whose answer it was asked for.
            stage: Of the tool's own node.
            name: The tool's.
            why: No call got it.
            began_before_s: So long before the line's ``at`` it began; 0 where it did not.
            ran_s: So long it ran by then.
        """
        line = {"early_tool": name, "run": run, "call": call, "stage": stage, "dropped": why,
                "began_before_s": began_before_s, "ran_s": ran_s}  # fmt: skip
        self._put(lambda: line)

    def late_tool(self, run: str, call: str, stage: str, name: str, why: str) -> None:
        """Append that a tool did not begin before its turn, and why, soon; *stage* is that of the call."""
        line = {"late_tool": name, "run": run, "call": call, "stage": stage, "why": why}
        self._put(lambda: line)

    def _put(self, line: Callable[[], Mapping[str, Any]]) -> None:
        if not self._closed and (self._pid != os.getpid() or not self._is_writing()):
            self._start()
        if self._closed or self._lines.qsize() >= self._capacity:
            with self._lock:
                self._lost += 1
        else:
            self._lines.put((datetime.now(UTC).isoformat(timespec="milliseconds"), line))

    def _start(self) -> None:
        with self._lock:
            forked = self._pid != os.getpid()
            if self._is_writing() and not forked:
                return
            if self._thread is not None and forked:  # what waited is the parent's to write
                self._lines, self._in_hand, self._setting_is = queue.SimpleQueue(), 0, {}
                self._shapes.forked()
            elif self._thread is not None:
                log.error("the thread that writes records to %s had ended; another one goes on", self.path)
                self._lost, self._in_hand = self._lost + self._in_hand, 0
            self._pid = os.getpid()
            thread = threading.Thread(target=self._write, args=(self._lines,), name="orla-journal", daemon=True)
            with contextlib.suppress(RuntimeError):  # too many threads: the next line tries again, these ones wait
                thread.start()
                self._thread = thread

    # In the thread

    def _write(self, lines: queue.SimpleQueue[Line | None]) -> None:
        file: Appended | None = None
        for batch in _batches(lines):
            self._in_hand = len(batch)
            try:
                file = file or Appended(self.path)
                self._append(file, batch)
            except Exception as error:  # noqa: BLE001 - a thread that ends loses all that comes; this is counted
                self._refused(self._in_hand, error)
            self._in_hand = 0
            batch.clear()  # no prompt is kept until the next line comes
        if file is not None:
            file.close()

    def _with_shape(self, record: Record, call: Call) -> dict[str, Any]:
        """Return the fields of a line for a record; its call's shape has the setting where that changed."""
        try:
            shape = {**self._shapes.of(call), **self._new_setting()}
        except Exception as error:  # noqa: BLE001 - a prompt is the caller's objects; the record is written all the same
            log.debug("a call's shape could not be written: %s", error)
            return record.asdict()
        return {**record.asdict(), "shape": shape}

    def _new_setting(self) -> dict[str, Any]:
        """Return the setting, if it is another one than was written."""
        if self.setting is None or time.monotonic() < self._setting_at_s + SETTING_EVERY_S:
            return {}
        self._setting_at_s, setting = time.monotonic(), self.setting()
        if not setting or setting == self._setting_is:
            return {}
        self._setting_is = setting
        return {"setting": setting}

    def _append(self, file: Appended, batch: Iterable[Line]) -> None:
        """Write lines together, in the order in which they came."""
        texts: list[bytes] = []
        size = 0
        for at, fields in batch:
            try:
                text = f"{json_line({'at': at, **fields()})}\n".encode()
            except Exception as error:  # noqa: BLE001 - this line's fault, and not that of those beside it
                self._in_hand -= 1
                self._refused(1, error)
                continue
            texts.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                self._flush(file, texts)
                texts, size = [], 0
        self._flush(file, texts)

    def _flush(self, file: Appended, texts: list[bytes]) -> None:
        written, error = file.append(texts)
        if error is not None:
            self._refused(len(texts) - written, error)
        self._in_hand -= len(texts)

    def _refused(self, lines: int, error: Exception) -> None:
        self._shapes.forget()
        self._setting_is, self._setting_at_s = {}, -SETTING_EVERY_S
        with self._lock:
            self._lost += lines
        if not self._complained:
            self._complained = True
            log.error("records cannot be written to %s: %s; this is said once, what is lost is counted",
                      self.path, error)  # fmt: skip

    # The end

    def end(self) -> None:
        """Have what waits written, and the thread end; waits for nothing."""
        self._closed = True
        if self._thread is not None and self._pid == os.getpid():
            self._lines.put(None)

    def close(self) -> None:
        """Write what waits, and end. Idempotent."""
        if not self._closed:
            self.end()
        self.join(CLOSE_PATIENCE_S)  # a disk that hangs takes longer; what is lost by that is counted

    def join(self, timeout_s: float) -> None:
        """Wait until what waited is written, at most *timeout_s* seconds."""
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join(timeout_s)


def _batches(lines: queue.SimpleQueue[Line | None]) -> Iterator[list[Line]]:
    """Yield what waits, again and again, until the mark of the end comes by."""
    ended = False
    while not ended:
        batch = [lines.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                batch.append(lines.get_nowait())
        ended = None in batch
        made = [line for line in batch if line is not None]
        batch.clear()
        yield made


class Appended:
    """A file that lines are appended to, whole or, where the disk refuses, to be continued on a line of its own.

    Nothing is buffered here: what was written is with the system, and what was not is known.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._broken_off = False
        """The file ends in the middle of a line."""

    def append(self, lines: list[bytes]) -> tuple[int, OSError | None]:
        """Write lines; returns how many are there, and what kept the others from it."""
        ends, size = [], 0
        for line in lines:
            size += len(line)
            ends.append(size)
        started = self._broken_off
        written = -1 if started else 0  # the end of the broken line comes first
        data = memoryview(b"".join([b"\n" * started, *lines]))
        try:
            descriptor = self._open()
            while data:
                count = os.write(descriptor, data)
                data, written = data[count:], written + count
        except OSError as error:
            self.close()  # it may have been moved away, or its disk: the next lines try anew
            if written >= 0:
                self._broken_off = written not in (0, *ends)
            return sum(end <= written for end in ends), error
        self._broken_off = False
        return len(lines), None

    def _open(self) -> int:
        if self._descriptor is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | _CLOEXEC, MODE)
        return self._descriptor

    def close(self) -> None:
        """Let go of the file."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            with contextlib.suppress(OSError):  # what a disk says only now, it said of lines already given to it
                os.close(descriptor)


_CLOEXEC: int = getattr(os, "O_CLOEXEC", 0)
