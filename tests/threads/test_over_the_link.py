"""Leases of threads in the server's store, asked for over the link: they hold over processes, and over cores."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver

from orla_lg import ConfigError, Orla, OrlaSaver, ThreadBusy, ThreadLost
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.store.sqlite import SqliteStore
from orla_lg.serve.store.store import MemoryStore
from tests.serve.fixtures import make
from tests.serve.in_thread import server
from tests.threads.savers import AT, build
from tests.threads.test_one_owner import PATIENCE_S, Work, unfinished


def saver(orla: Orla, memory: InMemorySaver, **terms: Any) -> OrlaSaver:
    return OrlaSaver(orla, memory, **{"thread_lease_s": 30, **terms})


def test_two_replicas_have_one_owner_and_what_it_writes_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, work = InMemorySaver(), Work()
    with server() as served, Orla.remote(served.url) as one, Orla.remote(served.url) as other:
        first, second = saver(one, memory, thread_lease_s=0.5), saver(other, memory, thread_lease_s=0.5)
        unfinished(first, work)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            with pytest.raises(ThreadBusy) as refused:
                build(second, work).invoke(None, AT)
            assert refused.value.run and refused.value.pid
            monkeypatch.setattr(first._leases, "_renew_aside", lambda held: None)  # as if it were frozen
            quick = Work()
            quick.fails = False
            quick.go_on.set()
            patient = saver(other, memory, thread_lease_s=2.0, busy="wait")
            assert build(patient, quick).invoke(None, AT)["said"] == ["run 1"]
            work.go_on.set()
            with pytest.raises(ThreadLost):
                running.result(PATIENCE_S)
        assert build(second, quick).get_state(AT).values["said"] == ["run 1"]


def test_a_lease_holds_over_a_change_of_cores(tmp_path: Path) -> None:
    memory, work = InMemorySaver(), Work()
    with server(store=SqliteStore(tmp_path / "state" / "s.db")) as served:
        address = served.url.removeprefix("http://")
        with Orla.remote(served.url) as one, Orla.remote(served.url) as other, ThreadPoolExecutor(1) as pool:
            first, second = saver(one, memory), saver(other, memory)
            unfinished(first, work)
            running = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            served.end()
            served.join()
            with server(store=SqliteStore(tmp_path / "state" / "s.db"), address=address):
                with pytest.raises(ThreadBusy):
                    build(second, work).invoke(None, AT)
                work.go_on.set()
                assert running.result(PATIENCE_S)["said"] == ["run 1"]
                assert build(second, work).invoke(None, AT)["said"] == ["run 1"]


async def test_a_run_on_a_loop_gives_its_thread_back_before_the_next_begins() -> None:
    memory = InMemorySaver()
    with server() as served:
        orla = await asyncio.to_thread(Orla.remote, served.url)
        made = saver(orla, memory)

        async def work(state: Any) -> Any:
            return {"said": ["x"]}

        for number in range(20):
            assert len((await build(made, work).ainvoke({"said": []}, AT))["said"]) == number + 1
        await asyncio.to_thread(orla.close)


def test_a_key_leases_threads_of_its_tenants_only() -> None:
    store = MemoryStore()
    _, secret = make(store, scopes=(KeyScope.LINK,), tenants=("red",))
    with server(store=store) as served, Orla.remote(served.url, key=secret) as orla:
        made = saver(orla, InMemorySaver(), tenant="blue")
        with pytest.raises(Exception, match="blue"):
            build(made, lambda state: {"said": []}).invoke({"said": []}, AT)
        build(saver(orla, InMemorySaver(), tenant="red"), lambda state: {"said": []}).invoke({"said": []}, AT)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"owner": {"holder": ""}},
        {"ttl_s": 0},
        {"ttl_s": "x"},
        {"what": "steal"},
        {"thread": 7},
        {"what": "renew"},
    ],
)
def test_what_a_peer_asks_wrongly_is_said(more: dict[str, Any]) -> None:
    asked = {"what": "take", "thread": "t", "tenant": None, "owner": {"holder": "h"}, "ttl_s": 1.0, **more}
    with server() as served, Orla.remote(served.url) as orla:
        leases: Any = saver(orla, InMemorySaver())._leases
        requests = leases.registry._requests
        if more:
            with pytest.raises(ConfigError):
                requests.ask("thread", asked)
        else:
            assert requests.ask("thread", asked) == {"epoch": 1}
