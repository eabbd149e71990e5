"""A thread has one owner: a second run on it fails or waits, and what the loser writes late is refused."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt

from orla_lg import Backend, ConfigError, Orla, OrlaSaver, ThreadBusy, ThreadLost
from orla_lg.graph.threads import owners
from orla_lg.graph.threads.leases import ThreadLeases
from tests.serve.fixtures import until
from tests.threads.savers import AT, KINDS, State, Told, build, leased, two

PATIENCE_S = 30.0

kinds = pytest.mark.parametrize("kind", KINDS)


class Work:
    """A node that fails at first, which leaves its task unfinished, and then takes as long as the test says."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.inside = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.fails = True
        self._lock = threading.Lock()

    def __call__(self, state: State) -> dict[str, Any]:
        if self.fails:
            raise ValueError("the process dies here")
        with self._lock:
            number = len(self.began) + 1
            self.began.append(number)
        self.inside.release()
        assert self.go_on.wait(PATIENCE_S)
        return {"said": [f"run {number}"]}

    def is_inside(self) -> None:
        assert self.inside.acquire(timeout=PATIENCE_S)


def unfinished(saver: Any, work: Work) -> None:
    """Leave the thread with a task that did not finish."""
    with pytest.raises(ValueError):
        build(saver, work).invoke({"said": []}, AT)
    work.fails = False


def lines(saver: Any) -> list[str]:
    return list(build(saver, Work()).get_state(AT).values.get("said", []))


# The control: what happens without leases


def test_without_leases_two_resumes_run_the_task_twice_and_both_succeed(tmp_path: Path) -> None:
    with two("sqlite", tmp_path) as make:
        first, second, work = make().inner, make().inner, Work()
        unfinished(first, work)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(build(saver, work).invoke, None, AT) for saver in (first, second)]
            work.is_inside()
            work.is_inside()
            work.go_on.set()
            assert sorted(each.result()["said"] for each in both) == [["run 1"], ["run 2"]]


# With them


@kinds
def test_a_second_resume_fails_and_names_the_owner(tmp_path: Path, kind: str) -> None:
    with two(kind, tmp_path) as make:
        first, second, work = make(), make(), Work()
        unfinished(first, work)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            with pytest.raises(ThreadBusy) as refused:
                build(second, work).invoke(None, AT)
            busy = refused.value
            assert (busy.thread, busy.pid, busy.host) == ("t", os.getpid(), socket.gethostname())
            assert busy.run and 0 < busy.left_s <= 30 and "busy='wait'" in str(busy)
            work.go_on.set()
            assert running.result(PATIENCE_S)["said"] == ["run 1"]
        assert work.began == [1]
        assert build(second, work).invoke(None, AT)["said"] == ["run 1"]


@kinds
def test_a_second_resume_waits_and_goes_on_from_what_is_there(tmp_path: Path, kind: str) -> None:
    with two(kind, tmp_path) as make:
        first, second, work = make(busy="wait"), make(busy="wait"), Work()
        unfinished(first, work)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(build(first, work).invoke, None, AT)]
            work.is_inside()
            both.append(pool.submit(build(second, work).invoke, None, AT))
            time.sleep(0.1)
            assert not both[1].done()
            work.go_on.set()
            assert [each.result(PATIENCE_S)["said"] for each in both] == [["run 1"]] * 2
        assert work.began == [1]


@pytest.mark.parametrize("said", [{}, {"orla": {"deadline_s": 0.2}}])
def test_waiting_ends_with_the_lease_or_the_deadline(tmp_path: Path, said: dict[str, Any]) -> None:
    with two("sqlite", tmp_path) as make:
        first, work = make(thread_lease_s=30 if said else 0.3), Work()
        second = make(busy="wait", thread_lease_s=30 if said else 0.3)
        unfinished(first, work)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            began_s = time.monotonic()
            with pytest.raises(ThreadBusy):
                build(second, work).invoke(None, {"configurable": {"thread_id": "t", **said}})
            assert 0.15 < time.monotonic() - began_s < 5
            work.go_on.set()
            running.result(PATIENCE_S)


@kinds
def test_a_lease_is_renewed_while_its_run_lasts(tmp_path: Path, kind: str) -> None:
    with two(kind, tmp_path) as make:
        first, second, work = make(thread_lease_s=0.4), make(thread_lease_s=0.4), Work()
        unfinished(first, work)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            until_s = time.monotonic() + 1.0
            while time.monotonic() < until_s:
                with pytest.raises(ThreadBusy):
                    build(second, work).invoke(None, AT)
                time.sleep(0.1)
            work.go_on.set()
            running.result(PATIENCE_S)


@kinds
@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
def test_a_late_write_of_the_loser_is_refused(
    tmp_path: Path, kind: str, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two(kind, tmp_path) as make:
        first, second, work = make(thread_lease_s=0.3), make(thread_lease_s=0.3), Work()
        unfinished(first, work)
        monkeypatch.setattr(first._leases, "_renew_aside", lambda held: None)  # as if it were frozen
        with ThreadPoolExecutor(1) as pool:
            loser = pool.submit(build(first, work).invoke, None, AT, durability=durability)
            work.is_inside()
            time.sleep(0.35)
            quick = Work()
            quick.fails = False
            quick.go_on.set()
            assert build(second, quick).invoke(None, AT)["said"] == ["run 1"]
            before = [each.config["configurable"]["checkpoint_id"] for each in second.list(AT)]
            work.go_on.set()
            with pytest.raises(ThreadLost, match="not this run's any more"):
                loser.result(PATIENCE_S)
        after = [each.config["configurable"]["checkpoint_id"] for each in second.list(AT)]
        assert after == before and lines(second) == ["run 1"]
        assert build(first, quick).invoke({"said": ["more"]}, AT)["said"][:2] == ["run 1", "more"]


@kinds
def test_an_owner_of_which_the_process_is_gone_is_not_waited_for(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two(kind, tmp_path) as make:
        first, second, work = make(), make(), Work()
        unfinished(first, work)
        with ThreadPoolExecutor(1) as pool:
            loser = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            monkeypatch.setattr("orla_lg.graph.threads.waiting.is_gone", lambda host, pid: True)
            quick = Work()
            quick.fails = False
            quick.go_on.set()
            assert build(second, quick).invoke(None, AT)["said"] == ["run 1"]
            work.go_on.set()
            if kind != "store":  # one that is not compared in the write is believed for half its lease
                with pytest.raises(ThreadLost):
                    loser.result(PATIENCE_S)


# How a run ends


def ends(how: str, saver: OrlaSaver) -> None:
    if how == "done":
        build(saver, lambda state: {"said": ["x"]}).invoke({"said": []}, AT)
    elif how == "failed":
        with pytest.raises(ValueError):
            build(saver, Work()).invoke({"said": []}, AT)
    elif how == "interrupted":
        graph = build(saver, lambda state: {"said": [interrupt("sure?")]})
        graph.invoke({"said": []}, AT)
        assert graph.invoke(Command(resume="yes"), AT)["said"] == ["yes"]
    elif how == "interrupted before":
        build(saver, lambda state: {"said": []}, interrupt_before=["work"]).invoke({"said": []}, AT)
    elif how == "left behind":
        for _ in build(saver, lambda state: {"said": ["x"]}).stream({"said": []}, AT, stream_mode="values"):
            break
    else:
        with pytest.raises(Exception, match=r"(?i)input"):
            build(saver, Work()).invoke(None, AT)


@kinds
@pytest.mark.parametrize(
    "how", ["done", "failed", "interrupted", "interrupted before", "left behind", "failed to begin"]
)
def test_a_thread_is_given_back_however_its_run_ends(tmp_path: Path, kind: str, how: str) -> None:
    with two(kind, tmp_path) as make:
        first, second = make(), make()
        ends(how, first)
        if how == "failed to begin":
            gc.collect()  # no callback of ours hears of it, and its loop is in a circle
            first._leases.look()
        assert not owners.UNFINISHED
        build(second, lambda state: {"said": ["next"]}).invoke({"said": []}, AT)
        assert not first._leases._held


def test_a_wrapped_graph_that_fails_to_begin_gives_its_thread_back_at_once(tmp_path: Path) -> None:
    with Orla([Backend("light", "http://127.0.0.1:9/v1")]) as orla, two("sqlite", tmp_path) as make:
        saver = OrlaSaver(orla, make().inner, thread_lease_s=30)
        graph = orla.wrap(build(saver, lambda state: {"said": ["x"]}))
        assert graph.checkpointer._leases is saver._leases
        with pytest.raises(Exception, match=r"(?i)input") as kept:
            graph.invoke(None, AT)
        assert not owners.UNFINISHED and kept
        graph.invoke({"said": []}, AT)
        assert not saver._leases._held


# What is one run


def test_branches_and_nested_graphs_are_one_owner(tmp_path: Path) -> None:
    with two("sqlite", tmp_path) as make:
        saver, other = make(), make()
        inner = build(None, lambda state: {"said": ["inner"]})
        alone = build(saver, lambda state: {"said": ["alone"]})
        seen: list[str] = []

        def asks(state: State) -> dict[str, Any]:
            """Run a graph on a thread of its own, look at the thread, and be seen by another process."""
            alone.invoke({"said": []}, {"configurable": {"thread_id": "own"}})
            with pytest.raises(ThreadBusy):
                in_another_process(lambda: build(other, Work()).invoke({"said": []}, AT))
            seen.append("busy")
            return {"said": ["asks"]}

        graph = StateGraph(State)
        graph.add_node("inner", inner)
        graph.add_node("asks", asks)
        graph.add_edge(START, "inner")
        graph.add_edge(START, "asks")
        compiled = graph.compile(checkpointer=saver)
        assert sorted(compiled.invoke({"said": []}, AT)["said"]) == ["asks", "inner"]
        assert seen == ["busy"] and not saver._leases._held


def in_another_process(act: Any) -> Any:
    """Act outside the context of any run, as another process does."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(act).result(PATIENCE_S)


@kinds
def test_a_viewer_reads_and_no_other_writer_writes_meanwhile(tmp_path: Path, kind: str) -> None:
    with two(kind, tmp_path) as make:
        first, second, work = make(), make(), Work()
        unfinished(first, work)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            for saver in (first, second):
                graph = build(saver, work)
                assert graph.get_state(AT).next == ("work",) and list(graph.get_state_history(AT))
                with pytest.raises(ThreadBusy):
                    graph.update_state(AT, {"said": ["edited"]})
            work.go_on.set()
            assert running.result(PATIENCE_S)["said"] == ["run 1"]
        build(second, work).update_state(AT, {"said": ["edited"]})
        assert lines(first) == ["run 1", "edited"]


def test_a_node_may_write_to_the_thread_of_its_run(tmp_path: Path) -> None:
    with two("sqlite", tmp_path) as make:
        saver = make()

        def work(state: State) -> dict[str, Any]:
            graph.update_state(AT, {"said": ["from inside"]}, as_node="work")
            return {"said": ["work"]}

        graph = build(saver, work)
        assert graph.invoke({"said": []}, AT)["said"] == ["work"]


def test_other_threads_are_free(tmp_path: Path) -> None:
    with two("sqlite", tmp_path) as make:
        first, second, work = make(), make(), Work()
        unfinished(first, work)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(build(first, work).invoke, None, AT)
            work.is_inside()
            elsewhere: Any = {"configurable": {"thread_id": "u"}}
            assert build(second, lambda state: {"said": ["u"]}).invoke({"said": []}, elsewhere)["said"] == ["u"]
            work.go_on.set()
            running.result(PATIENCE_S)


def test_tenants_with_a_store_are_apart(tmp_path: Path) -> None:
    with two("store", tmp_path) as make:
        red, blue, work = make(tenant="red"), make(tenant="blue"), Work()
        unfinished(red, work)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(build(red, work).invoke, None, AT)
            work.is_inside()
            said: Any = {"configurable": {"thread_id": "t", "orla": {"tenant": "red"}}}
            with pytest.raises(ThreadBusy):
                build(blue, Work()).invoke({"said": []}, said)
            work.go_on.set()
            running.result(PATIENCE_S)
        build(blue, lambda state: {"said": []}).invoke({"said": []}, AT)


# What it is given


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    memory = InMemorySaver()
    with pytest.raises(ConfigError, match=r"store='/PATH/threads\.db'"):
        OrlaSaver(Told(), memory, thread_lease_s=30)
    for wrong in (0, -1, "30", True, float("inf")):
        with pytest.raises(ConfigError, match="thread_lease_s"):
            OrlaSaver(Told(), memory, thread_lease_s=wrong, store=tmp_path / "s" / "x.db")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'fail' or 'wait'"):
        leased(memory, busy="later", store=tmp_path / "s" / "x.db")
    with pytest.raises(ConfigError, match="thread_lease_s=30"):
        OrlaSaver(Told(), memory, store=tmp_path / "s" / "x.db")
    with pytest.raises(ConfigError, match="get, put and lease"):
        leased(memory, store=7)


def test_nothing_is_leased_where_orla_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORLA_DISABLED", "1")
    with Orla([Backend("light", "http://127.0.0.1:9/v1")]) as orla:
        assert OrlaSaver(orla, InMemorySaver(), thread_lease_s=30)._leases is None


def test_clones_and_layers_keep_the_leases(tmp_path: Path) -> None:
    with Orla([Backend("light", "http://127.0.0.1:9/v1")]) as orla, SqliteSaver.from_conn_string(":memory:") as saver:
        made = OrlaSaver(orla, OrlaSaver(orla, saver, tenant="red"), thread_lease_s=30)
        assert made.inner is saver and made._tenant == "red" and made._leases is not None
        assert OrlaSaver(orla, made) is made
        clone = made.with_allowlist([("a", "b")])
        assert clone._leases is made._leases


def test_the_thread_that_renews_ends_with_its_leases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orla_lg.graph.threads.leases.IDLE_S", 0.0)
    with two("sqlite", tmp_path) as make:
        saver = make()
        build(saver, lambda state: {"said": []}).invoke({"said": []}, AT)
        renewing = saver._leases._renewing
        assert isinstance(saver._leases, ThreadLeases)
        until(lambda: renewing is None or not renewing.is_alive())


def test_a_forked_child_owns_nothing(tmp_path: Path) -> None:
    with two("store", tmp_path) as make:
        saver, work = make(), Work()
        unfinished(saver, work)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(build(saver, work).invoke, None, AT)
            work.is_inside()
            held = saver._leases._held
            assert held
            child = os.fork()
            if not child:
                os._exit(0 if not saver._leases._held and not owners.UNFINISHED else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert saver._leases._held is held
            work.go_on.set()
            running.result(PATIENCE_S)
