"""Records on disk: one JSON line each, appended by a thread of its own, so that no call waits for a disk."""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from orla_lg.core.record import Aftermath, Record

log = logging.getLogger("orla_lg")

CAPACITY = 10_000
"""Lines that may wait for the disk; what comes then is dropped and counted."""

CLOSE_PATIENCE_S = 5.0


class Journal:
    """Appends records, and scores given to them later, to a file that ``orla-lg explain`` reads.

    Each line is a JSON object with ``at``, the wall time in UTC. A record's has its fields; a score's has
    ``feedback`` (the record's id) and ``score``; what became known later of a call's cache has ``amends`` (the
    record's id), ``cache_orders`` and ``cache_borne_out``.
    """

    def __init__(self, path: str | Path, capacity: int = CAPACITY) -> None:
        self.path = Path(path)
        self.dropped = 0
        """Lines that no longer fit in the queue, or that the disk refused."""
        self._capacity = capacity
        self._lock = threading.Lock()
        self._lines: queue.Queue[Mapping[str, Any] | None] = queue.Queue(capacity)
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._complained = False
        self._closed = False

    def record(self, record: Record) -> None:
        """Append a record, soon; never waits."""
        self._put(record.asdict)

    def amended(self, record_id: str, late: Aftermath) -> None:
        """Append what became known of a call's cache after its record was made, soon."""
        orders, borne_out = late.orders, late.borne_out
        self._put(lambda: {"amends": record_id, "cache_orders": orders, "cache_borne_out": borne_out})

    def feedback(self, record_id: str, score: float) -> None:
        """Append a score, soon."""
        self._put(lambda: {"feedback": record_id, "score": score})

    def _put(self, line: Any) -> None:
        if self._closed:
            return
        if self._thread is None or self._pid != os.getpid():
            self._start()
        try:
            self._lines.put_nowait({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "line": line})
        except queue.Full:
            with self._lock:
                self.dropped += 1

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None and self._pid == os.getpid():
                return
            if self._thread is not None:  # forked: what waited is the parent's to write
                self._lines = queue.Queue(self._capacity)
            self._pid = os.getpid()
            self._thread = threading.Thread(target=self._write, args=(self._lines,), name="orla-journal", daemon=True)
            self._thread.start()

    def _write(self, lines: queue.Queue[Mapping[str, Any] | None]) -> None:
        file: TextIO | None = None
        ended = False
        while not ended:
            batch = [lines.get()]
            while not lines.empty():
                batch.append(lines.get())
            ended = None in batch
            rows = [row for row in batch if row is not None]
            try:
                file = file or self._open()
                file.writelines(_text(row) for row in rows)
                file.flush()  # so that ``explain`` sees what just happened
            except OSError as error:
                self._lost(len(rows), error)
        if file is not None:
            file.close()

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self.path.open("a", encoding="utf-8")

    def _lost(self, lines: int, error: OSError) -> None:
        with self._lock:
            self.dropped += lines
        if not self._complained:
            self._complained = True
            log.error("records cannot be written to %s: %s; this is said once, what is lost is counted",
                      self.path, error)  # fmt: skip

    def close(self) -> None:
        """Write what waits, and end. Idempotent."""
        self._closed = True
        thread = self._thread
        if thread is None or self._pid != os.getpid():
            return
        try:
            self._lines.put(None, timeout=CLOSE_PATIENCE_S)
        except queue.Full:  # the disk hangs
            return
        thread.join(CLOSE_PATIENCE_S)
        self._thread = None


def _text(row: Mapping[str, Any]) -> str:
    return json.dumps({"at": row["at"], **row["line"]()}, ensure_ascii=False, default=str) + "\n"
