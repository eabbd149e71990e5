"""One process that resumes a thread in a SQLite file: it says line by line what happens, and its node waits for one.

The arguments: the file, and the seconds of a lease; 0: without leases.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from typing import Any

from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.checkpoint.sqlite import SqliteSaver

from orla_lg import ThreadBusy
from tests.threads.savers import AT, State, build, leased


def say(word: str) -> None:
    print(word, flush=True)


def main(where: str, lease_s: float) -> None:
    def work(state: State) -> dict[str, Any]:
        if not state["said"]:
            return {"said": ["begun"]}
        say("inside")
        sys.stdin.readline()
        return {"said": [str(os.getpid())]}

    def resume(saver: Any) -> None:
        say("ready")
        sys.stdin.readline()
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
        resume(SqliteSaver(sqlite3.connect(where, check_same_thread=False)))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
