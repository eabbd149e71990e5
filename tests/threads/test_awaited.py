"""One owner for a thread, on a loop: savers that are awaited, runs that are cancelled, and the official suite."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from orla_lg import OrlaSaver, ThreadBusy, ThreadLost
from tests.test_saver_conformance import astory, async_postgres, async_sqlite, memory
from tests.threads.savers import AT, HAS_POSTGRES, KINDS, State, atwo, build, leased

kinds = pytest.mark.parametrize("kind", KINDS)


class Work:
    """A node that takes as long as the test says."""

    def __init__(self, *, goes_on: bool = False) -> None:
        self.began: list[int] = []
        self.inside, self.go_on = asyncio.Semaphore(0), asyncio.Event()
        if goes_on:
            self.go_on.set()

    async def __call__(self, state: State) -> dict[str, Any]:
        self.began.append(len(self.began) + 1)
        number = self.began[-1]
        self.inside.release()
        await self.go_on.wait()
        return {"said": [f"run {number}"]}


async def fails(state: State) -> dict[str, Any]:
    raise ValueError("the process dies here")


async def unfinished(saver: Any) -> None:
    with pytest.raises(ValueError):
        await build(saver, fails).ainvoke({"said": []}, AT)


async def test_without_leases_two_resumes_run_the_task_twice_and_both_succeed(tmp_path: Path) -> None:
    async with atwo("sqlite", tmp_path) as make:
        first, second, work = (await make()).inner, (await make()).inner, Work()
        await unfinished(first)
        async with asyncio.TaskGroup() as tasks:
            both = [tasks.create_task(build(saver, work).ainvoke(None, AT)) for saver in (first, second)]
            await work.inside.acquire()
            await work.inside.acquire()
            work.go_on.set()
        assert sorted(each.result()["said"] for each in both) == [["run 1"], ["run 2"]]


@kinds
async def test_a_second_resume_fails_or_waits(tmp_path: Path, kind: str) -> None:
    async with atwo(kind, tmp_path) as make:
        first, second, patient, work = await make(), await make(), await make(busy="wait"), Work()
        await unfinished(first)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(build(first, work).ainvoke(None, AT))
            await work.inside.acquire()
            with pytest.raises(ThreadBusy):
                await build(second, work).ainvoke(None, AT)
            waiting = tasks.create_task(build(patient, work).ainvoke(None, AT))
            await asyncio.sleep(0.1)
            assert not waiting.done() and (await build(second, work).aget_state(AT)).next == ("work",)
            with pytest.raises(ThreadBusy):
                await build(second, work).aupdate_state(AT, {"said": ["edited"]})
            work.go_on.set()
        assert running.result()["said"] == waiting.result()["said"] == ["run 1"] and work.began == [1]
        await build(second, work).aupdate_state(AT, {"said": ["edited"]})


@kinds
@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
async def test_a_late_write_of_the_loser_is_refused(
    tmp_path: Path, kind: str, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with atwo(kind, tmp_path) as make:
        first, second, work = await make(thread_lease_s=0.3), await make(thread_lease_s=0.3), Work()
        await unfinished(first)
        monkeypatch.setattr(first._leases, "_renew_aside", lambda held: None)  # as if it were frozen
        async with asyncio.TaskGroup() as tasks:
            loser = tasks.create_task(outcome(build(first, work).ainvoke(None, AT, durability=durability)))
            await work.inside.acquire()
            await asyncio.sleep(0.35)
            assert (await build(second, Work(goes_on=True)).ainvoke(None, AT))["said"] == ["run 1"]
            before = [each.config async for each in second.alist(AT)]
            work.go_on.set()
        assert isinstance(loser.result(), ThreadLost)
        assert [each.config async for each in second.alist(AT)] == before


async def outcome(awaited: Any) -> Any:
    try:
        return await awaited
    except Exception as error:
        return error


@kinds
@pytest.mark.parametrize("how", ["cancelled", "closed", "done"])
async def test_a_thread_is_given_back_however_its_run_ends(tmp_path: Path, kind: str, how: str) -> None:
    async with atwo(kind, tmp_path) as make:
        first, second, work = await make(), await make(), Work()
        graph = build(first, work)
        if how == "cancelled":
            running = asyncio.get_running_loop().create_task(graph.ainvoke({"said": []}, AT))
            await work.inside.acquire()
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
        elif how == "closed":
            streamed = graph.astream({"said": []}, AT, stream_mode="values")
            await anext(streamed)
            await streamed.aclose()
        else:
            work.go_on.set()
            await graph.ainvoke({"said": []}, AT)
        await build(second, Work(goes_on=True)).ainvoke({"said": []}, AT)
        assert not first._leases._held


async def test_a_connection_may_be_closed_as_soon_as_the_run_is_over(tmp_path: Path) -> None:
    for _ in range(3):
        async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "threads.db")) as saver:
            await build(leased(saver), Work(goes_on=True)).ainvoke({"said": []}, AT)


async def test_a_loop_is_never_held_up(tmp_path: Path) -> None:
    blockbuster = pytest.importorskip("blockbuster")
    async with atwo("store", tmp_path) as make:
        saver = await make()
        with blockbuster.blockbuster_ctx("orla_lg"):
            await build(saver, Work(goes_on=True)).ainvoke({"said": []}, AT)


@pytest.mark.parametrize("opens", [memory, async_sqlite, pytest.param(async_postgres, marks=HAS_POSTGRES)])
async def test_the_official_suite_gives_full_marks(opens: Any, tmp_path: Path) -> None:
    number = 0

    @checkpointer_test(name="saver")
    async def factory() -> AsyncIterator[OrlaSaver]:
        nonlocal number
        number += 1
        async with opens() as saver:
            store = tmp_path / "state" / f"{number}.db"
            yield leased(saver, **({"store": store} if isinstance(saver, InMemorySaver) else {}))

    report = await validate(factory)
    assert report.passed_all() and report.passed_all_base(), report.to_dict()


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
async def test_a_graph_tells_the_same_story(tmp_path: Path, durability: str) -> None:
    async with async_sqlite() as saver:
        told = await astory(leased(saver), durability=durability)
    assert told == await astory(InMemorySaver(), durability=durability)
