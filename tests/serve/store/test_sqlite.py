"""The store in a file: several processes, deaths of processes, other versions, other users."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orla_lg.errors import ConfigError
from orla_lg.serve.store import sqlite
from orla_lg.serve.store.sqlite import SqliteStore, default_file
from orla_lg.serve.store.store import Conflict, StoreUnavailable
from tests.serve.store.test_store import Watched
from tests.timed import within

FORK = multiprocessing.get_context("fork")


@contextlib.contextmanager
def opened(file: Path, **options: float) -> Iterator[SqliteStore]:
    store = SqliteStore(file, **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "serve.db"


def modes(folder: Path) -> dict[str, str]:
    return {each.name: f"{stat.S_IMODE(each.stat().st_mode):o}" for each in folder.iterdir()}


# Several processes


def _count(file: Path, times: int) -> None:
    with opened(file, busy_s=60) as store:
        for _ in range(times):
            while True:
                found = store.get("count")
                number, version = (0, 0) if found is None else (int(found.value), found.version)
                try:
                    store.put("count", b"%d" % (number + 1), expected=version)
                    break
                except Conflict:
                    continue


def test_processes_that_begin_at_once_and_count_together_lose_no_count(file: Path) -> None:
    processes = [FORK.Process(target=_count, args=(file, 100)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    with opened(file) as store:
        found = store.get("count")
        assert found is not None and found.value == b"400"


def _write_for_ever(file: Path, numbers: str) -> None:
    with opened(file) as store, Path(numbers).open("wb", buffering=0) as out:
        number = 0
        while True:
            number += 1
            store.put("number", b"%d" % number)
            store.put(f"many/{number % 50}", b"x" * 500)
            out.write(b"%d\n" % number)


def test_what_a_write_returned_for_outlives_kill_9(file: Path, tmp_path: Path) -> None:
    with opened(file) as store:
        for round_ in range(6):
            numbers = tmp_path / f"numbers-{round_}"
            process = FORK.Process(target=_write_for_ever, args=(file, str(numbers)))
            process.start()
            deadline = time.monotonic() + 60
            while (not numbers.exists() or numbers.stat().st_size < 20) and time.monotonic() < deadline:
                time.sleep(0.001 * (round_ + 1))
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            found = store.get("number")
            assert found is not None and int(found.value) >= int(numbers.read_bytes().split()[-1])
            store.put("number", b"0")  # no lock is left behind
    connection = sqlite3.connect(file)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


def test_a_change_by_another_process_is_announced(file: Path) -> None:
    watched = Watched()
    with opened(file) as store:
        store.watch("count", watched)
        process = FORK.Process(target=_count, args=(file, 1))
        process.start()
        process.join()
        assert watched.happened()


def test_a_writer_that_was_frozen_holds_no_other_up_for_long(file: Path) -> None:
    with opened(file, busy_s=0.05) as store:
        frozen = sqlite3.connect(file, isolation_level=None)
        frozen.execute("BEGIN IMMEDIATE")

        def refused_s() -> float:
            begun_s = time.monotonic()
            with pytest.raises(StoreUnavailable, match="locked"):
                store.lease("core", "a", 1.0)
            return time.monotonic() - begun_s

        within(1.0, refused_s)
        assert store.get("a") is None  # readers do not wait
        frozen.execute("ROLLBACK")
        frozen.close()
        assert store.lease("core", "a", 1.0) is not None


def test_a_fork_does_not_use_the_file_of_its_parent(file: Path) -> None:
    def child(store: SqliteStore) -> None:
        with pytest.raises(StoreUnavailable, match="forked"):
            store.get("a")
        store.close()

    with opened(file) as store:
        process = FORK.Process(target=child, args=(store,))
        process.start()
        process.join()
        assert process.exitcode == 0
        store.put("a", b"")


def test_a_file_that_was_replaced_grants_no_lease(file: Path) -> None:
    with opened(file) as store:
        assert store.lease("core", "a", 10) is not None
        for each in list(file.parent.iterdir()):
            each.unlink()
        with pytest.raises(StoreUnavailable, match="removed or replaced"):
            store.lease("core", "a", 10)
        with opened(file) as other:
            assert other.lease("core", "b", 10) is not None
            with pytest.raises(StoreUnavailable, match="removed or replaced"):
                store.lease("core", "a", 10)


def test_a_store_that_is_closed_says_so(file: Path) -> None:
    store = SqliteStore(file)
    store.watch("", Watched())
    store.close()
    store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        store.get("a")


# What is in the file


def test_the_state_of_one_process_is_the_next_ones(file: Path) -> None:
    with opened(file) as store:
        version = store.put("a", b"1")
        lease = store.lease("core", "a", 0)
    with opened(file, durable=True) as store:
        assert store.get("a") == (b"1", version)
        again = store.lease("core", "b", 1)
        assert lease is not None and again is not None and again.epoch == lease.epoch + 1


def test_a_file_of_an_older_version_is_migrated(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(file) as store:
        store.put("a", b"1")
    more = (*sqlite.MIGRATIONS, ("CREATE TABLE more (x)", "INSERT INTO more VALUES (1)"))
    monkeypatch.setattr(sqlite, "MIGRATIONS", more)
    for _ in range(2):
        with opened(file) as store:
            found = store.get("a")
            assert found is not None and found.value == b"1"
    connection = sqlite3.connect(file)
    assert connection.execute("SELECT count(*) FROM more").fetchone() == (1,)
    assert connection.execute("PRAGMA user_version").fetchone() == (2,)
    connection.close()


def test_a_migration_that_fails_leaves_the_file_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(file) as store:
        store.put("a", b"1")
    with monkeypatch.context() as patched:
        patched.setattr(sqlite, "MIGRATIONS", (*sqlite.MIGRATIONS, ("CREATE TABLE more (x)", "nonsense")))
        with pytest.raises(ConfigError, match="cannot be used"):
            SqliteStore(file)
    with opened(file) as store:
        assert store.get("a") is not None


def test_a_file_of_a_newer_version_is_refused(file: Path) -> None:
    SqliteStore(file).close()
    connection = sqlite3.connect(file)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(ConfigError, match=r"serve: store: .*newer orla_lg \(schema 7, this one knows 1\)"):
        SqliteStore(file, where="serve: store")


def test_the_database_of_another_program_is_refused(file: Path) -> None:
    file.parent.mkdir(mode=0o700)
    connection = sqlite3.connect(file)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="another program"):
        SqliteStore(file)


@pytest.mark.parametrize("content", [b"not a database, but long enough for a header of one" * 50, b"x"])
def test_what_is_no_database_is_refused(file: Path, content: bytes) -> None:
    file.parent.mkdir(mode=0o700)
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match="cannot be used: file is not a database"):
        SqliteStore(file)
    assert file.read_bytes() == content


# Which file it is


def test_the_default_is_in_the_users_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_file() == tmp_path / ".local" / "state" / "orla-lg" / "serve.db"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # the standard has it ignored
    assert default_file() == tmp_path / ".local" / "state" / "orla-lg" / "serve.db"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "x"))
    assert default_file() == tmp_path / "x" / "orla-lg" / "serve.db"


def test_files_and_folders_are_their_users_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with opened(tmp_path / "a" / "b" / "serve.db") as store:
            store.put("a", b"1")
            assert modes(tmp_path / "a" / "b") == {
                "serve.db": "600", "serve.db-wal": "600", "serve.db-shm": "600",
            }  # fmt: skip
    finally:
        os.umask(before)
    assert modes(tmp_path)["a"] == modes(tmp_path / "a")["b"] == "700"


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match="others may write to the folder"):
        SqliteStore(folder / "serve.db")
    assert not list(folder.iterdir())
    with opened(folder / "own" / "serve.db"):  # what the message advises
        assert modes(folder)["own"] == "700"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's")
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_another_users_is_refused(file: Path, what: str) -> None:
    SqliteStore(file).close()
    os.chown(file if what == "file" else file.parent, 12345, -1)
    with pytest.raises(ConfigError, match="user 12345"):
        SqliteStore(file)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_file_that_others_may_open_is_refused(file: Path, mode: int) -> None:
    SqliteStore(file).close()
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"mode 0{mode:o}"):
        SqliteStore(file)


def test_a_symbolic_link_a_hard_link_and_what_is_no_file_are_refused(file: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.db"
    SqliteStore(real).close()
    file.parent.mkdir(mode=0o700)
    file.symlink_to(real)
    with pytest.raises(ConfigError, match="symbolic link"):
        SqliteStore(file)
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="symbolic link"):
        SqliteStore(file)
    assert not (tmp_path / "nowhere").exists()
    file.unlink()
    os.link(real, file)
    with pytest.raises(ConfigError, match="2 names"):
        SqliteStore(file)
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(ConfigError, match="no file"):
        SqliteStore(file)
    file.unlink()
    file.mkdir()
    with pytest.raises(ConfigError, match="no file"):
        SqliteStore(file)
    file.rmdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(file))
        with pytest.raises(ConfigError, match="no file"):
            SqliteStore(file)
    with pytest.raises(ConfigError, match="no path"):
        SqliteStore(Path("a\0b"))


def test_a_call_takes_well_under_a_millisecond(file: Path) -> None:
    with opened(file) as store:
        times = []
        for number in range(300):
            begun_s = time.perf_counter()
            store.put(f"a/{number % 20}", b"x" * 200)
            store.get(f"a/{number % 20}")
            store.lease("core", "a", 1.5)
            times.append(time.perf_counter() - begun_s)
        assert sorted(times)[30] < 3 * 1e-3  # three calls; of the quick ones, since others load the machine
