"""What a lease on its thread adds: microseconds for a run (taken, given back) and for a checkpoint (compared).

Each figure is the median of what the same saver takes with leases, less what it takes without; the window is what
lies between the look and the write's end where the write does not compare by itself: a process would have to be
frozen in it, for longer than its lease. PostgreSQL is measured where ``ORLA_TEST_POSTGRES_URL`` names one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver

from orla_lg import Orla, OrlaSaver
from orla_lg.graph.threads import owners

VALUES = {"messages": [f"word {number} " * 20 for number in range(10)]}
WRITES = [("messages", VALUES)]


class Told:
    """Takes signals."""

    def thread_deleted(self, thread_id: str) -> None: ...

    def stages_next(self, thread_id: str | None, checkpoint_ns: str, stages: Any) -> None: ...


class Loop:
    """What LangGraph's loop is to a saver."""

    def __init__(self) -> None:
        self.stack, self.manager = ExitStack(), SimpleNamespace(run_id="run")


def timed(act: Callable[[], Any]) -> float:
    began_s = time.perf_counter()
    act()
    return 1e6 * (time.perf_counter() - began_s)


def begin(saver: Any, thread: str) -> tuple[Loop, dict[str, Any]]:
    """Begin a run as LangGraph does, as far as a saver sees it."""
    loop, runtime = Loop(), SimpleNamespace(control=object())
    config = {"configurable": {"thread_id": thread, "checkpoint_ns": "", "__pregel_runtime": runtime}}
    owners.beginning_loop = lambda: loop  # type: ignore[assignment, return-value]
    copy_context().run(saver.get_tuple, config)
    return loop, config


def one_run(saver: Any, thread: str) -> None:
    begin(saver, thread)[0].stack.close()


def measure(saver: Any, bare: Any, runs: int, checkpoints: int) -> tuple[float, ...]:
    """Return what a run, a checkpoint and a task's writes take more with leases than without, in microseconds."""
    of_runs, of_puts, of_writes = ([[], []] for _ in range(3))  # type: ignore[var-annotated]
    for number in range(runs):
        for kind, each in enumerate((bare, saver)):
            of_runs[kind].append(timed(lambda each=each, number=number: one_run(each, f"r{number % 50}")))  # type: ignore[misc]
    loop, config = begin(saver, "puts")
    checkpoint = {**empty_checkpoint(), "channel_values": VALUES, "channel_versions": {"messages": "1"}}
    at = {"configurable": {**config["configurable"], "checkpoint_id": "0"}}
    for number in range(checkpoints):
        for kind, each in enumerate((bare, saver)):
            made = {**checkpoint, "id": f"{number:08}{kind}"}
            of_puts[kind].append(timed(lambda each=each, made=made: each.put(config, made, {"step": 1}, {})))  # type: ignore[misc]
            task = f"task{number}-{kind}"
            of_writes[kind].append(timed(lambda each=each, task=task: each.put_writes(at, WRITES, task)))  # type: ignore[misc]
    loop.stack.close()
    more = [_more(*both) for both in (of_runs, of_puts, of_writes)]
    return *more, statistics.median(of_puts[0])


def _more(bare: list[float], leased: list[float]) -> float:
    """Return the median of the differences, each of two that were measured one after the other."""
    return statistics.median(with_it - without for without, with_it in zip(bare, leased, strict=True))


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    from orla_lg.serve.store.sqlite import SqliteStore
    from tests.serve.in_thread import server as serving

    with serving(store=SqliteStore(folder / "state" / "server.db")) as running:
        yield running.url


def savers(folder: Path, stack: ExitStack) -> Iterator[tuple[str, Any, Any]]:
    memory, told = InMemorySaver(), Told()
    yield (
        "in memory, leases in a SQLite file",
        OrlaSaver(told, memory, thread_lease_s=30, store=folder / "state" / "leases.db"),
        memory,
    )
    connection = stack.enter_context(
        contextlib.closing(sqlite3.connect(folder / "threads.db", check_same_thread=False))
    )
    lite = SqliteSaver(connection)
    yield "SqliteSaver, compared in the write", OrlaSaver(told, lite, thread_lease_s=30), lite
    if url := os.environ.get("ORLA_TEST_POSTGRES_URL"):
        from langgraph.checkpoint.postgres import PostgresSaver

        post = stack.enter_context(PostgresSaver.from_conn_string(url))
        post.setup()
        yield "PostgresSaver, compared in the write", OrlaSaver(told, post, thread_lease_s=30), post
    orla = stack.enter_context(Orla.remote(stack.enter_context(server(folder))))
    linked = InMemorySaver()
    yield "in memory, leases over the link", OrlaSaver(orla, linked, thread_lease_s=30), linked


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--checkpoints", type=int, default=1000)
    chosen = parser.parse_args()
    print(f"{'saver':<40}{'a run':>10}{'a checkpoint':>15}{'writes of a task':>19}{'window':>10}   (µs)")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        for name, saver, bare in savers(Path(folder), stack):
            run, put, writes, took = measure(saver, bare, chosen.runs, chosen.checkpoints)
            window = "none" if saver._leases.registry.compares else f"{took:.0f}"
            print(f"{name:<40}{run:>10.0f}{put:>15.1f}{writes:>19.1f}{window:>10}", flush=True)


if __name__ == "__main__":
    main()
