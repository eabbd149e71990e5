"""When estimates are written, and what becomes of a disk that refuses."""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
from pathlib import Path

import pytest

from orla_lg.core.lookahead import estimates_file
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.lookahead.estimates_saver import MANY_BROKEN, SAVE_EVERY_S, EstimatesFile
from orla_lg.core.lookahead.trace import RunTrace
from orla_lg.errors import ConfigError
from tests.core.fakes import HandBackground, HandClock


def a_file(path: Path) -> tuple[Estimates, EstimatesFile, HandBackground]:
    estimates, background = Estimates(), HandBackground(HandClock())
    return estimates, EstimatesFile(path, estimates, background), background  # type: ignore[arg-type]


def test_it_is_written_once_a_while_and_only_if_there_is_something(tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    estimates, keeper, background = a_file(file)
    keeper.save()
    assert not file.exists(), "nothing was learned"
    estimates.served(RunTrace(graph="g"), "a", 2.0, 7, backend="main")
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


def test_no_file_set_aside_takes_the_place_of_another(tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    for held in ("one", "two", "three"):
        file.write_text(held)
        a_file(file)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "e.json.broken": "one", "e.json.broken2": "two", "e.json.broken3": "three"
    }  # fmt: skip


def test_what_cannot_be_set_aside_is_told_and_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "e.json"
    file.write_text("broken")
    for number in ("", *range(2, MANY_BROKEN)):
        (tmp_path / f"e.json.broken{number}").touch()
    _, keeper, background = a_file(file)
    assert "and so do 99 set aside before it; remove them" in caplog.text
    keeper.learned()
    keeper.save()
    assert file.read_text() == "broken" and not background.timers
    (tmp_path / "e.json.broken").unlink()

    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    a_file(file)
    assert re.search(r"e.json does not hold .* and cannot be renamed \(Permission denied\)", caplog.text)
    assert file.read_text() == "broken"


def test_what_cannot_be_a_file_of_estimates_is_told_at_the_start(tmp_path: Path) -> None:
    file = tmp_path / "e.json"
    with pytest.raises(ConfigError, match=r"estimates_file: .* there is a NUL or a lone surrogate in it"):
        a_file(Path("a\0b"))
    with pytest.raises(ConfigError, match="there is a NUL or a lone surrogate in it"):
        a_file(tmp_path / "\ud800")
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        a_file(tmp_path / ("x" * 300) / "e")
    with pytest.raises(ConfigError, match="there is no folder"):
        a_file(tmp_path / "none" / "e")
    os.mkfifo(file)
    with pytest.raises(ConfigError, match="neither a file nor missing"):
        a_file(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match=r"estimates_file '.*e.json' cannot be read: Is a directory"):
        a_file(file)


def test_of_two_processes_that_find_it_broken_one_sets_it_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "e.json"
    file.write_text("broken")

    def gone(self: Path, target: Path) -> Path:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "rename", gone)
    estimates, _, _ = a_file(file)
    assert estimates.lessons("g") == 0 and not caplog.records


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_it_is_its_users_alone_whatever_lies_in_the_way(tmp_path: Path, umask: int) -> None:
    file, precious = tmp_path / "e.json", tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / f".e.json.{os.getpid()}").symlink_to(precious)  # the name that could be foreseen
    estimates, keeper, _ = a_file(file)
    estimates.served(RunTrace(graph="g"), "a", 2.0, 7)
    keeper.learned()
    before = os.umask(umask)
    try:
        keeper.save()
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) & ~0o600 == 0 and not file.is_symlink()
    assert precious.read_text() == "precious"


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "e.json"
    estimates, keeper, _ = a_file(file)
    estimates.served(RunTrace(graph="g"), "a", 2.0, 7)
    keeper.learned()
    keeper.save()
    held = file.read_text()

    def full(descriptor: int, *args: object, **kwargs: object) -> object:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(estimates_file.os, "fdopen", full)
    keeper.learned()
    keeper.save()
    assert file.read_text() == held and [each.name for each in tmp_path.iterdir()] == ["e.json"]
