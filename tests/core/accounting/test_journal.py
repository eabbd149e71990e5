"""The records file: no line, no id and no disk ends its thread, and what is not on the disk is counted."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orla_lg.core.accounting import journal
from orla_lg.core.accounting.journal import Appended, Journal
from orla_lg.core.record import CacheFollowUp, Record
from orla_lg.errors import ConfigError
from tests.core.boundary.test_plain import NASTY, Unfriendly
from tests.core.test_record import a_record


def record(call: str, **other: Any) -> Record:
    return replace(a_record(call), **other)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_whatever_an_id_holds_every_record_is_written(tmp_path: Path) -> None:
    written = Journal(tmp_path / "r")
    for text in NASTY:
        written.record(record("w", workflow=text, stage=text, run=text, tenant=text, error=text, reason=text))
        written.amended(text, CacheFollowUp(text, (text,), None))
        written.feedback(text, 1.0)
    written.close()
    found = rows(tmp_path / "r")
    assert len(found) == 3 * len(NASTY) and written.dropped == 0
    for text, row in zip(NASTY, found[::3], strict=True):
        assert row["workflow"] == row["tenant"] == json.loads(json.dumps(text))


def test_a_line_that_cannot_be_made_costs_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written = Journal(tmp_path / "r")
    written.record(record("a"))
    written.record(record("b", workflow=Unfriendly()))
    written._put(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    written._put(lambda: {"keys": {(1,): 1}})
    written.record(record("c"))
    written.close()
    assert [row.get("id") for row in rows(tmp_path / "r")] == ["a", "b", None, "c"]
    assert written.dropped == 1 and caplog.text.count("records cannot be written") == 1


def test_a_thread_that_ended_is_replaced_and_that_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: ended.set())

    def end() -> Any:
        raise KeyboardInterrupt

    written = Journal(tmp_path / "r")
    written._put(end)
    assert ended.wait(10)
    assert written._thread is not None
    written._thread.join(10)
    written.record(record("after"))
    written.close()
    assert [row["id"] for row in rows(tmp_path / "r")] == ["after"] and written.dropped == 1
    assert "the thread that writes records to" in caplog.text


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_it_is_its_users_alone(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        written = Journal(tmp_path / "r")
        written.record(record("a"))
        written.close()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o600


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_counted_and_closing_says_nothing_more(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    written = Journal("/dev/full")
    for _ in range(5):
        written.record(record("a"))
    written.close()
    assert written.dropped == 5 and caplog.text.count("No space left on device") == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_disk_that_takes_a_part_is_continued_on_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three lines of ten bytes it takes 15 bytes; then it takes all."""
    left, really = [15], os.write

    def write(descriptor: int, data: Any) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = really(descriptor, data[: left[0]])
        left[0] -= taken
        return taken

    file = Appended(tmp_path / "r")
    line = b"123456789\n"
    monkeypatch.setattr(journal.os, "write", write)
    assert file.append([line] * 3)[0] == 1
    assert file.append([line])[0] == 0, "not even the end of the broken one"
    monkeypatch.undo()
    assert file.append([line] * 2) == (2, None)
    file.close()
    assert (tmp_path / "r").read_bytes().splitlines() == [line[:-1], b"12345", line[:-1], line[:-1]]


def test_a_disk_that_takes_little_at_a_time_takes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.write
    monkeypatch.setattr(journal.os, "write", lambda descriptor, data: really(descriptor, data[:7]))
    monkeypatch.setattr(journal, "BATCH_BYTES", 100)
    written = Journal(tmp_path / "r")
    for number in range(20):
        written.record(record(str(number)))
    written.close()
    assert [row["id"] for row in rows(tmp_path / "r")] == [str(number) for number in range(20)]
    assert written.dropped == 0


def test_a_process_without_room_for_a_thread_loses_records_and_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    written = Journal(tmp_path / "r")
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        written.record(record("a"))
    written.record(record("b"))
    written.close()
    assert [row["id"] for row in rows(tmp_path / "r")] == ["a", "b"]
    never = Journal(tmp_path / "r")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    never.record(record("c"))
    never.close()
    assert never.dropped == 1


def test_one_that_was_never_used_has_lost_nothing(tmp_path: Path) -> None:
    written = Journal(tmp_path / "r")
    written.close()
    assert written.dropped == 0 and not (tmp_path / "r").exists()
    written.record(record("late"))
    assert written.dropped == 1


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_what_is_no_path_is_said_at_once(path: str) -> None:
    with pytest.raises(ConfigError, match=r"records_file: .* is no file's path"):
        Journal(path)
