"""One process that resumes threads: it says line by line what happens, and its node waits for a line.

Each line that it reads between two runs is the seconds of a lease (0: without leases), and the saver's file or URL.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from contextlib import closing
from typing import Any

from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from orla_lg import ThreadBusy
from tests.threads.savers import AT, State, build, leased


def say(word: str) -> None:
    print(word, flush=True)


def run(where: str, lease_s: float) -> None:
    def work(state: State) -> dict[str, Any]:
        if not state["said"]:
            return {"said": ["begun"]}
        say("inside")
        sys.stdin.readline()
        return {"said": [str(os.getpid())]}

    def resume(saver: Any) -> None:
        try:
            build(leased(saver, thread_lease_s=lease_s) if lease_s else saver, work).invoke(None, AT)
        except ThreadBusy as error:
            say(type(error).__name__)
        else:
            say("done")

    if "dbname=" in where:
        with PostgresSaver.from_conn_string(where) as saver:
            resume(saver)
    else:
        with closing(sqlite3.connect(where, check_same_thread=False)) as file:
            resume(SqliteSaver(file))


def main() -> None:
    say("ready")
    while line := sys.stdin.readline():
        lease_s, _, where = line.strip().partition(" ")
        run(where, float(lease_s))


if __name__ == "__main__":
    main()
