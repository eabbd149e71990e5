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

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.threads.app"], cwd=ROOT, text=True,
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

    def reads(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def resumes(self, where: str, lease_s: float) -> None:
        self.reads(f"{lease_s} {where}")
        assert self.hears() == "inside"


Pair = tuple[App, App]


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        made = App(), App()
        for app in made:
            stack.callback(app.process.wait)
            stack.callback(app.process.kill)
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


def frozen_and_thawed(pair: Pair, where: str, lease_s: float) -> list[str]:
    """Freeze the owner inside its task, resume elsewhere, thaw; return how both ended."""
    first, second = pair
    first.resumes(where, lease_s)
    first.process.send_signal(signal.SIGSTOP)
    try:
        time.sleep(1.2 * lease_s)
        second.resumes(where, lease_s)
        second.reads()
        ended = second.hears()
    finally:
        first.process.send_signal(signal.SIGCONT)
    first.reads()
    return [first.hears(), ended]


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


def ids(pair: Pair) -> list[str]:
    return [str(app.process.pid) for app in pair]


@pytest.mark.parametrize("opens", [sqlite, pytest.param(postgres, marks=HAS_POSTGRES)])
def test_what_a_thawed_process_writes_late_is_refused(tmp_path: Path, opens: Any, pair: Pair) -> None:
    with opens(tmp_path) as (where, saver):
        leave_unfinished(saver)
        assert frozen_and_thawed(pair, where, LEASE_S) == ["ThreadLost", "done"]
        assert said(saver)[0] == ["begun", ids(pair)[1]]


def test_without_leases_both_write(tmp_path: Path, pair: Pair) -> None:
    with sqlite(tmp_path) as (where, saver):
        leave_unfinished(saver)
        assert frozen_and_thawed(pair, where, 0) == ["done", "done"]
        assert said(saver)[0] in [["begun", each] for each in ids(pair)]


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


def test_a_killed_owner_is_followed_at_once(tmp_path: Path, pair: Pair) -> None:
    with sqlite(tmp_path) as (where, saver):
        leave_unfinished(saver)
        first, second = pair
        first.resumes(where, 600)
        first.process.kill()
        first.process.wait()
        second.resumes(where, 600)
        second.reads()
        assert second.hears() == "done"
