"""Leases of threads in a real Redis."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from orla_lg import ThreadBusy, ThreadLost
from tests.threads.savers import AT, build, leased
from tests.threads.test_one_owner import PATIENCE_S, Work, unfinished

redis_server = pytest.importorskip("tests.redis_server")


def test_two_processes_have_one_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, work = InMemorySaver(), Work()
    with redis_server.RedisServer(tmp_path) as redis:
        first, second = (leased(memory, store=redis.url, thread_lease_s=1.0) for _ in range(2))
        patient = leased(memory, store=redis.url, thread_lease_s=3.0, busy="wait")
        unfinished(first, work)
        with ThreadPoolExecutor(1) as pool:
            loser = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            with pytest.raises(ThreadBusy) as busy:
                build(second, work).invoke(None, AT)
            assert busy.value.pid
            monkeypatch.setattr(first._leases, "_renew_aside", lambda held: None)  # as if it were frozen
            quick = Work()
            quick.fails = False
            quick.go_on.set()
            assert build(patient, quick).invoke(None, AT)["said"] == ["run 1"]
            work.go_on.set()
            with pytest.raises(ThreadLost):
                loser.result(PATIENCE_S)
