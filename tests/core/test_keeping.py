"""When estimates are written, and what becomes of a disk that refuses."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from orla_lg.core.estimates import Course, Estimates
from orla_lg.core.keeping import SAVE_EVERY_S, EstimatesFile
from tests.core.fakes import HandBackground, HandClock


def a_file(path: Path) -> tuple[Estimates, EstimatesFile, HandBackground]:
    estimates, background = Estimates(), HandBackground(HandClock())
    return estimates, EstimatesFile(path, estimates, background), background  # type: ignore[arg-type]


def test_it_is_written_once_a_while_and_only_if_there_is_something(tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    estimates, keeper, background = a_file(file)
    keeper.save()
    assert not file.exists(), "nothing was learned"
    estimates.served(Course("g"), "a", 2.0, 7, backend="main")
    keeper.learned()
    keeper.learned()
    assert len(background.timers) == 1, "one timer for all that is learned meanwhile"
    background.advance(SAVE_EVERY_S)
    background.do_all()
    fresh, _, _ = a_file(file)
    assert fresh.learned("g", "a") == estimates.learned("g", "a") and fresh.lessons("g") > 0
    written = file.stat().st_mtime_ns
    keeper.save()
    assert file.stat().st_mtime_ns == written
    keeper.learned()
    assert len(background.timers) == 1, "and a new one after it"


def test_a_disk_that_refuses_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "e.json"
    _, keeper, background = a_file(file)
    file.mkdir()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            keeper.learned()
            background.advance(SAVE_EVERY_S)
            background.do_all()
    assert caplog.text.count("estimates cannot be kept in") == 1
    file.rmdir()
    keeper.save()
    assert file.is_file(), "what could not be written then is written now"


def test_after_the_end_nothing_is_begun(tmp_path: Path) -> None:
    _, keeper, background = a_file(tmp_path / "e.json")
    keeper.learned()
    background.closed = True
    background.advance(SAVE_EVERY_S)
    assert not background.work
