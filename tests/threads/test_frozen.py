"""Two real processes on one thread: the owner is frozen while it works, loses the thread, and goes on too late."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from tests.serve.processes import ROOT
from tests.test_saver_conformance import database
from tests.threads.savers import AT, HAS_POSTGRES, build

PATIENCE_S = 60.0
LEASE_S = 0.6


class App:
    """A process of ``tests.threads.app``."""

    def __init__(self, where: str, lease_s: float) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.threads.app", where, str(lease_s)], cwd=ROOT, text=True,
            env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def hears(self) -> str:
        assert self.process.stdout is not None
        late = threading.Timer(PATIENCE_S, self.process.kill)
        late.start()
        try:
            return self.process.stdout.readline().strip()
        finally:
            late.cancel()

    def goes_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@contextmanager
def apps(where: str, lease_s: float) -> Iterator[list[App]]:
    with ExitStack() as stack:
        made = []
        for _ in range(2):
            app = App(where, lease_s)
            stack.callback(app.process.wait)
            stack.callback(app.process.kill)
            made.append(app)
        for app in made:
            assert app.hears() == "ready"
        yield made


def interrupted(state: Any) -> Any:
    raise ValueError("the process dies here")


def leave_unfinished(saver: Any) -> None:
    graph = build(saver, interrupted)
    with pytest.raises(ValueError):
        graph.invoke({"said": ["begun"]}, AT)


def said(saver: Any) -> tuple[list[str], int]:
    """Return what the thread says at last, and how many checkpoints it has."""
    latest = saver.get_tuple(AT)
    return latest.checkpoint["channel_values"]["said"], len(list(saver.list(AT)))


def frozen_and_thawed(where: str, lease_s: float) -> tuple[list[str], list[str]]:
    """Freeze the owner inside its task, resume elsewhere, thaw; return how both ended, and their process ids."""
    with apps(where, lease_s) as (first, second):
        first.goes_on()
        assert first.hears() == "inside"
        first.process.send_signal(signal.SIGSTOP)
        time.sleep(1.2 * lease_s)
        second.goes_on()
        assert second.hears() == "inside"
        second.goes_on()
        ended = [second.hears()]
        first.process.send_signal(signal.SIGCONT)
        first.goes_on()
        return [first.hears(), *ended], [str(first.process.pid), str(second.process.pid)]


@contextmanager
def sqlite(folder: Path) -> Iterator[tuple[str, Any]]:
    file = str(folder / "threads.db")
    connection = sqlite3.connect(file, check_same_thread=False)
    try:
        yield file, SqliteSaver(connection)
    finally:
        connection.close()


@contextmanager
def postgres(folder: Path) -> Iterator[tuple[str, Any]]:
    with database() as url, PostgresSaver.from_conn_string(url) as saver:
        saver.setup()
        yield url, saver


@pytest.mark.parametrize("opens", [sqlite, pytest.param(postgres, marks=HAS_POSTGRES)])
def test_what_a_thawed_process_writes_late_is_refused(tmp_path: Path, opens: Any) -> None:
    with opens(tmp_path) as (where, saver):
        leave_unfinished(saver)
        how, (first, second) = frozen_and_thawed(where, LEASE_S)
        assert how == ["ThreadLost", "done"] and first != second
        assert said(saver)[0] == ["begun", second]


def test_without_leases_both_write(tmp_path: Path) -> None:
    with sqlite(tmp_path) as (where, saver):
        leave_unfinished(saver)
        how, (first, second) = frozen_and_thawed(where, 0)
        assert how == ["done", "done"]
        assert said(saver)[0] in (["begun", first], ["begun", second])


def test_a_killed_owner_is_followed_at_once(tmp_path: Path) -> None:
    with sqlite(tmp_path) as (where, saver):
        leave_unfinished(saver)
        with apps(where, 600) as (first, second):
            first.goes_on()
            assert first.hears() == "inside"
            first.process.kill()
            first.process.wait()
            second.goes_on()
            assert second.hears() == "inside"
            second.goes_on()
            assert second.hears() == "done"


@HAS_POSTGRES
def test_no_thread_is_taken_between_a_write_and_its_commit() -> None:
    """A lease is taken only once a write that looked at it is committed: else its taker would not read that write."""
    from orla_lg.graph.threads.tables import PostgresTable
    from orla_lg.link.thread_leases import Busy, Taken, ThreadOwner

    def carried(statements: Any, connection: Any) -> Any:
        try:
            statement = next(statements)
            while True:
                found = connection.execute(*statement)
                statement = statements.send(found.fetchall() if found.description else [])
        except StopIteration as end:
            return end.value

    table = PostgresTable()
    with database() as url, psycopg.connect(url) as writer, psycopg.connect(url, autocommit=True) as other:
        carried(table.make(), other)
        assert carried(table.take("t", ThreadOwner("a"), 0.0, ""), other) == Taken(1)
        carried(table.check("t", "a"), writer)
        other.execute("SET lock_timeout = '200ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            carried(table.take("t", ThreadOwner("b"), 30.0, ""), other)
        writer.commit()
        assert carried(table.take("t", ThreadOwner("b"), 30.0, ""), other) == Taken(2)
        assert isinstance(carried(table.renew("t", ThreadOwner("a"), 30.0), other), Busy)
