"""A replica of two pools: where its calls enter, how they move, and what each core knows of them."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orla_lg import BackendUnavailable, ConfigError, Orla
from tests.link.test_processes import forked
from tests.link.test_reconnect import Run
from tests.serve.pools.served import BY_LOAD, FREE, HERE, TABLE, Pools, graph, hi, records, replicas, until
from tests.stub_engine import Gate, Reply

STAGES = ("draft", "think", "check")


def invoked(wrapped: Any) -> str:
    return str(wrapped.invoke(hi(), HERE)["messages"][-1].content)


def ainvoked(wrapped: Any) -> str:
    return str(asyncio.run(wrapped.ainvoke(hi(), HERE))["messages"][-1].content)


def streamed(wrapped: Any) -> str:
    async def run() -> str:
        parts = [part async for part, _ in wrapped.astream(hi(), HERE, stream_mode="messages")]
        return "".join(str(part.content) for part in parts)

    return asyncio.run(run())


@pytest.mark.parametrize("how", [invoked, ainvoked, streamed])
def test_the_stages_of_one_run_are_served_by_two_cores(pools: Pools, how: Any) -> None:
    pools.start()
    with replicas(pools) as (orla,):
        assert how(orla.wrap(graph(*STAGES)))
        assert [(each.stage, each.backend) for each in orla.records()] == [
            ("draft", "small-a"), ("think", "big"), ("check", "small-b"),
        ]  # fmt: skip
        statistics = orla.statistics()
        assert (statistics.calls, statistics.external, set(statistics.backends)) == (
            3, 0, {"small-a", "small-b", "big"},
        )  # fmt: skip
        assert statistics.costs.total.calls == 3 and statistics.costs.backends["big"].calls == 1
        assert [each.stage for each in records(pools, "fast")] == ["draft", "check"]
        assert [each.stage for each in records(pools, "large")] == ["think"]
        for pool in pools.running:  # both heard of the run, and of its end
            until(lambda pool=pool: pools.core(pool).book.statistics().outcomes == {"done": 1})  # type: ignore[misc]
        pools.check()


def test_a_limit_over_two_pools_is_one_sum(pools: Pools) -> None:
    pools.say(TABLE + "\n[limits.tenants.acme]\ncalls = 7\n")
    pools.start()
    with replicas(pools) as (orla,):
        orla.wrap(graph(*STAGES)).invoke(hi(), {"configurable": {"orla": {"tenant": "acme"}}})
        (acme,) = orla.statistics().limits
        assert (acme.scope, acme.name, acme.limit.calls) == ("tenant", "acme", 7)
        assert (acme.spent.calls, acme.promised.calls, acme.refused) == (3, 0, 0)


def test_a_pool_that_a_run_does_not_use_does_not_hear_of_it(pools: Pools) -> None:
    pools.start()
    with replicas(pools) as (orla,):
        orla.wrap(graph("draft")).invoke(hi())
        until(lambda: pools.core("fast").book.statistics().outcomes == {"done": 1})
        orla.statistics()
        assert not pools.core("large").book.statistics().outcomes


def test_a_pool_that_joins_later_learns_the_run_with_its_age(pools: Pools) -> None:
    pools.start()
    gate = Gate()
    pools.engines["big"].rule = lambda seen: Reply(gate=gate)
    with replicas(pools) as (orla,):
        run = Run(orla.wrap(graph("draft", "think")))
        pools.engines["big"].wait(lambda engine: engine.in_flight == 1)
        (mine,), (theirs,) = orla.core.serving.book.runs(), pools.core("large").book.runs()
        assert theirs.id == mine.id and abs(theirs.standing.arrived_s - mine.standing.arrived_s) < 0.5
        assert dict(theirs.now_in) == {"think": 1}
        gate.open()
        run.result()


def test_a_thread_that_comes_back_is_told_to_the_pools_that_it_used(pools: Pools) -> None:
    pools.start()
    gate = Gate()
    with replicas(pools) as (orla,):
        orla.wrap(graph(*STAGES)).invoke(hi(), HERE)
        until(lambda: pools.core("large").book.statistics().outcomes == {"done": 1})
        pools.engines["small-a"].rule = lambda seen: Reply(gate=gate)
        run = Run(orla.wrap(graph("draft")), HERE)
        until(lambda: len(pools.core("large").book.runs()) == 1)
        gate.open()
        run.result()
        until(lambda: pools.core("large").book.statistics().outcomes == {"done": 2})


def test_a_mapper_that_chooses_by_views_moves_a_call_to_another_pool(pools: Pools) -> None:
    pools.say(FREE, BY_LOAD)
    pools.start()
    gate = Gate()
    pools.engines["small-a"].rule = lambda seen: Reply(gate=gate)
    with replicas(pools) as (orla,):
        pools.seen()
        wrapped = orla.wrap(graph("draft"))
        held = [Run(wrapped) for _ in range(2)]
        pools.engines["small-a"].wait(lambda engine: engine.in_flight == 2)
        wrapped.invoke(hi("to the other pool"))
        (record,) = orla.records()
        assert (record.backend, record.mapper, record.error) == ("big", "load+explicit", None)
        until(lambda: len(records(pools, "large")) == 1)
        assert not records(pools, "fast")
        assert pools.core("fast").statistics().calls == 0, "a call that moved was never there"
        gate.open()
        for run in held:
            run.result()
        until(lambda: orla.statistics().calls == 3)
        pools.check()


def test_an_alternative_in_another_pool_takes_what_the_first_cannot(pools: Pools) -> None:
    pools.say('[mapping]\ndraft = ["small-a", "big"]\n')
    pools.start()
    pools.engines["small-a"].refuse()
    with replicas(pools) as (orla,):
        orla.wrap(graph("draft")).invoke(hi())
        (record,) = orla.records()
        assert record.backend == "big" and record.error is None and record.attempts >= 2
        assert orla.statistics().calls == 1
        pools.check()


def test_the_bounds_hold_over_two_replicas_of_two_pools(pools: Pools) -> None:
    pools.say(FREE, BY_LOAD)
    pools.start()
    for engine in pools.engines.values():
        engine.rule = lambda seen: Reply(before_s=0.01)
    with replicas(pools, 2) as made:
        pools.seen()
        graphs = [orla.wrap(graph("draft", "think")) for orla in made]
        with ThreadPoolExecutor(12) as threads:
            list(threads.map(lambda number: graphs[number % 2].invoke(hi(f"{number}")), range(24)))
        assert max(engine.peak for engine in pools.engines.values()) <= 2
        assert sum(len(engine.chats) for engine in pools.engines.values()) == 48
        until(lambda: made[0].statistics().calls == 48)
        pools.check()


# A pool without its core


def test_a_pool_without_its_core_holds_up_its_own_calls_only(pools: Pools) -> None:
    pools.start()
    with replicas(pools) as (orla,):
        draft, think = orla.wrap(graph("draft")), orla.wrap(graph("think"))
        think.invoke(hi())
        pools.end("large")
        waits = Run(think)
        draft.invoke(hi())
        until(lambda: len(records(pools, "fast")) == 1)
        assert waits.is_alive()
        assert {view.name: view.shut for view in orla.core.serving.views()}["big"]
        pools.start("large")
        waits.result()
        until(lambda: len(records(pools, "large")) == 1)
        pools.met(orla)


def test_wrap_and_plan_know_a_pool_whose_core_is_not_there_yet(pools: Pools) -> None:
    pools.start("fast")
    with replicas(pools) as (orla,):
        wrapped = orla.wrap(graph(*STAGES))
        assert [planned.backends for planned in orla.plan(wrapped)] == [("small-a",), ("big",), ("small-b",)]
        assert [view.name for view in orla.core.serving.views()] == ["small-a", "small-b", "big"]
        run = Run(wrapped)
        until(lambda: len(records(pools, "fast")) == 1)
        pools.start("large")
        run.result()
        assert [each.backend for each in orla.records()] == ["small-a", "big", "small-b"]
        pools.met(orla)


def test_calls_that_are_not_to_wait_end_where_their_pool_has_no_core(pools: Pools) -> None:
    pools.start()
    with replicas(pools, on_core_lost="fail") as (orla,):
        think = orla.wrap(graph("think"))
        think.invoke(hi())
        pools.end("large")
        until(lambda: not orla.core.serving.cores.by_pool["large"].link.up)  # type: ignore[attr-defined]
        with pytest.raises(BackendUnavailable, match="core is lost"):
            think.invoke(hi())
        orla.wrap(graph("draft")).invoke(hi())


def test_calls_that_go_on_alone_stay_in_their_pool(pools: Pools) -> None:
    pools.start()
    with replicas(pools, on_core_lost="direct") as (orla,):
        think = orla.wrap(graph("think"))
        think.invoke(hi())
        pools.end("large")
        until(lambda: not orla.core.serving.cores.by_pool["large"].link.up)  # type: ignore[attr-defined]
        think.invoke(hi())
        assert orla.statistics().direct == 1 and len(pools.engines["big"].chats) == 2
        orla.wrap(graph("draft")).invoke(hi())
        assert orla.statistics().direct == 1


def test_any_core_is_a_way_in(pools: Pools) -> None:
    pools.start()
    with replicas(pools, pool="large") as (orla,):
        orla.wrap(graph(*STAGES)).invoke(hi())
        assert [view.name for view in orla.core.serving.views()] == ["small-a", "small-b", "big"]
    urls = ",".join(running.url for running in pools.running.values())
    pools.end("fast")
    with Orla.remote(urls) as orla:
        orla.wrap(graph("think")).invoke(hi())
        pools.start("fast")
        pools.met(orla)
        orla.wrap(graph("draft")).invoke(hi())


# Another division


def test_a_replica_follows_another_division_of_the_backends(pools: Pools) -> None:
    pools.start()
    with replicas(pools) as (orla,):
        check = orla.wrap(graph("check"))
        check.invoke(hi())
        address = pools.running["fast"].url.removeprefix("http://")
        pools.end()
        text = pools.file.read_text()
        pools.file.write_text(
            text.replace('["small-a", "small-b"]', '["small-a"]').replace('["big"]', '["small-b", "big"]')
        )
        run = Run(check)
        pools.start("fast", address=address)
        pools.start("large")
        run.result()
        until(lambda: [each.backend for each in records(pools, "large")] == ["small-b"])
        owners = orla.core.serving.cores.owners  # type: ignore[attr-defined]
        assert {name: core.pool for name, core in owners.items()} == {
            "small-a": "fast", "small-b": "large", "big": "large",
        }  # fmt: skip
        assert [view.name for view in orla.core.serving.views()] == ["small-a", "small-b", "big"]
        pools.met(orla)


def test_a_pool_that_is_none_any_more_is_given_up(pools: Pools) -> None:
    pools.say('[mapping]\ndraft = "small-a"\n')
    pools.start()
    pools.seen()
    with replicas(pools) as (orla,):
        pools.end("large")
        text = pools.file.read_text()
        begin, end = text.index("[backends.big]"), text.index("[pools]")
        pools.file.write_text((text[:begin] + text[end:]).replace('large = ["big"]\n', ""))
        running = pools.running["fast"]
        running.call(lambda: running.server.reload(dry_run=False))
        cores = orla.core.serving.cores  # type: ignore[attr-defined]
        until(lambda: set(cores.by_pool) == {"fast"})
        assert [view.name for view in orla.core.serving.views()] == ["small-a", "small-b"]
        assert [view.name for view in pools.core("fast").views()] == ["small-a", "small-b"]
        orla.wrap(graph("draft")).invoke(hi())
    until(lambda: not [each for each in threading.enumerate() if each.name == "orla-link"])


# Levers


def test_each_lever_reaches_the_core_that_has_it(pools: Pools) -> None:
    pools.start()
    with replicas(pools) as (orla,):
        for backend, pool in (("big", "large"), ("small-b", "fast")):
            scheduler = pools.core(pool).schedulers[backend]
            orla.pause(backend)
            assert scheduler.queue.paused
            assert orla.drain(backend, 1.0)
            orla.resume(backend)
            assert not scheduler.queue.paused
            orla.set_limit(backend, max_concurrency=1)
            assert scheduler.queue.max_concurrency == 1
        orla.set_policy(policy="fcfs")
        orla.set_policy(stage_policy={"big": "priority"})
        names = {
            name: scheduler.queue.policies.stage
            for pool in pools.running
            for name, scheduler in pools.core(pool).schedulers.items()
        }
        assert type(names["big"]).__name__ == "Priority" and type(names["small-a"]).__name__ == "Fcfs"
        with pytest.raises(ConfigError, match="huge"):
            orla.pause("huge")
        with pytest.raises(ConfigError, match="huge"):
            orla.set_policy(stage_policy={"huge": "fcfs"})


def test_a_priority_and_feedback_reach_the_core_of_the_call(pools: Pools) -> None:
    pools.start()
    gate = Gate()
    pools.engines["big"].rule = lambda seen: Reply(gate=gate)
    with replicas(pools) as (orla,):
        run = Run(orla.wrap(graph("draft", "think")), HERE)
        pools.engines["big"].wait(lambda engine: engine.in_flight == 1)
        assert orla.prioritize("thread", 7.0)
        assert [state.priority for state in pools.core("large").book.runs()] == [7.0]
        assert orla.ahead(orla.core.serving.book.runs()[0].id) is not None
        gate.open()
        run.result()
        for record in orla.records():
            orla.feedback(record.id, 1.0)


# Processes


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_links_of_its_own(pools: Pools) -> None:
    pools.start()
    with replicas(pools) as (orla,):
        wrapped = orla.wrap(graph(*STAGES))
        wrapped.invoke(hi())

        def work() -> None:
            assert wrapped.invoke(hi())["messages"][-1].content
            orla.close()

        assert forked(work) == 0
        wrapped.invoke(hi())
        until(lambda: pools.core("fast").statistics().calls == 6 and pools.core("large").statistics().calls == 3)


def test_a_call_that_is_cancelled_while_it_waits_in_another_pool_leaves_it(pools: Pools) -> None:
    pools.start()
    gate = Gate()
    pools.engines["big"].rule = lambda seen: Reply(gate=gate)
    with replicas(pools) as (orla,):
        think = orla.wrap(graph("think"))
        held = [Run(think) for _ in range(2)]
        pools.engines["big"].wait(lambda engine: engine.in_flight == 2)

        async def cancelled() -> None:
            task = asyncio.create_task(think.ainvoke(hi()))  # noqa: TID251
            while pools.core("large").schedulers["big"].queue.waiting != 1:
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(cancelled())
        until(lambda: pools.core("large").schedulers["big"].queue.waiting == 0)
        gate.open()
        for run in held:
            run.result()
        pools.check()


def test_the_links_of_a_closed_orla_end(pools: Pools) -> None:
    pools.start()
    with replicas(pools) as (orla,):
        assert len([each for each in threading.enumerate() if each.name == "orla-link"]) >= 2
        orla.close()
    for pool in pools.running:
        until(lambda pool=pool: not pools.running[pool].server.host.replicas)  # type: ignore[misc]


def test_a_moved_call_keeps_its_age(pools: Pools) -> None:
    pools.say(FREE, BY_LOAD)
    pools.start()
    with replicas(pools) as (orla,):
        orla.pause("big")
        orla.pause("small-a")
        run = Run(orla.wrap(graph("think")))
        time.sleep(0.2)
        orla.resume("big")
        orla.resume("small-a")
        run.result()
        (record,) = orla.records()
        assert record.queue_wait_s >= 0.15
