"""What dies, and what becomes of the rest: cores, replicas, connections, engines that notice late."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orla_lg.core.engine.backend import Backend, Capability, Probe, Support
from orla_lg.core.engine.capabilities import EngineStats, Warmed
from orla_lg.core.limits.limits import Limit, Limits
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.prefetch.prompts import Prompt
from orla_lg.errors import QueueFull
from orla_lg.link.messages import Bye, Grant, Hello, Ready, Signal
from orla_lg.link.whereabouts import here, is_gone
from orla_lg.serve.access.budgets import CallSlots, HeldSlot
from orla_lg.serve.link import orphans
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.store import StoreUnavailable
from orla_lg.testing.virtual import StillAdapter
from tests.serve.scripted import Core, Replica, World, adopted, end, enter, first, missed

LEASE_S = 10.0
WAITS_S = LEASE_S + 5.0
"""A lease, and what an engine that says nothing is given to notice."""


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def started(world: World, **more: Any) -> Core:
    core = Core(world, **more)
    core.start()
    return core


# The lease


def test_a_lease_gives_an_epoch_and_grants_for_half_its_time(world: World) -> None:
    one, two = (CoreLease(world.store, clock=world.clock, holder=name) for name in ("one", "two"))
    assert one.take() and not two.take() and (one.epoch, two.epoch) == (1, 0)
    world.clock.run_until(world.clock() + 0.7)
    assert one.holds()
    world.clock.run_until(world.clock() + 0.1)
    assert not one.holds()
    assert one.renew() and one.holds(), "it had run out, and is renewed"
    world.clock.run_until(world.clock() + 1.6)
    assert two.take() and two.epoch == 2
    assert not one.renew() and one.deposed and not one.holds()
    two.give_up()
    three = CoreLease(world.store, clock=world.clock, holder="three")
    assert three.take() and three.epoch == 3


def test_a_store_that_does_not_answer_ends_grants_by_time(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = started(world)
    replica = Replica(world, "r1")
    replica.connect(core)

    def fails(*about: Any) -> None:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(world.store, "lease", fails)
    world.settle(2.0)
    replica.tell(enter("c1"))
    assert replica.grants() == [] and not core.lease.deposed
    assert caplog.text.count("the disk is full") == 1
    monkeypatch.undo()
    world.settle(0.6)
    assert replica.grants() == ["c1"]


def test_a_core_that_was_replaced_says_goodbye_and_grants_nothing(world: World) -> None:
    core = started(world, bound=1)
    replica = Replica(world, "r1")
    replica.connect(core)
    replica.tell(enter("c1"), enter("c2"))
    core.run_until_deposed()
    world.settle()
    assert "another core" in str(replica.bye()) and not replica.connected
    assert not core.host.decides and not core.host.replicas["r1"].calls
    assert world.store.scan("replica/"), "the next core waits for it"


# The core dies


def test_calls_keep_their_place_and_grants_are_adopted(world: World) -> None:
    old = started(world, bound=2)
    one, two = Replica(world, "r1"), Replica(world, "r2")
    one.connect(old)
    two.connect(old)
    one.tell(enter("c1"), enter("c2"))
    two.tell(enter("c3"))
    old.kill()
    world.settle(2.0)
    new = started(world, bound=2)
    assert new.lease.epoch == 2
    two.connect(new, ready=False)
    two.tell(enter("c9", age_s=0.1), enter("c3", age_s=2.0), Ready())
    world.settle(3.0)
    assert two.grants() == [], "r1 has not spoken"
    one.connect(new, ready=False)
    one.tell(adopted("c1", age_s=5.0), adopted("c2", age_s=5.0, first=False))
    queue = new.serving.schedulers["a"].queue
    assert (queue.in_flight, queue.waiting) == (2, 0)
    one.tell(enter("c4", age_s=3.5), Ready())
    assert (queue.in_flight, queue.waiting, two.grants()) == (2, 3, [])
    one.tell(first("c2"), end("c1"), end("c2"))
    assert two.grants() == ["c3"] and one.grants()[2:] == ["c4"], "the oldest first"
    assert [grant.epoch for grant in one.got(Grant)] == [1, 1, 2]
    new.serving.check_integrity()


def test_a_replica_that_never_comes_is_waited_for_a_lease(world: World) -> None:
    old = started(world)
    Replica(world, "gone").connect(old)
    old.kill()
    world.settle(2.0)
    new = started(world)
    replica = Replica(world, "r1")
    replica.connect(new)
    replica.tell(enter("c1"))
    world.settle(WAITS_S - 1)
    assert replica.grants() == []
    world.settle(1.5)
    assert replica.grants() == ["c1"]
    assert set(world.store.scan("replica/")) == {"replica/r1"}, "it is over, for the cores after this one too"
    replica.tell(Bye())
    new.kill()
    world.settle(2.0)
    assert started(world).host.recovery.over


def test_one_that_was_lost_before_it_said_all_is_waited_for_anew(world: World) -> None:
    """By joining, its lease began again; what it holds is as unknown as before."""
    old = started(world)
    one, two = Replica(world, "r1"), Replica(world, "r2")
    one.connect(old)
    one.tell(enter("c1"))
    old.kill()
    world.settle(2.0)
    new = started(world)
    two.connect(new)
    two.tell(enter("c2"))
    world.settle(8.0)
    one.connect(new, ready=False)
    one.drop()
    world.settle(WAITS_S - 1)
    assert two.grants() == [] and "replica/r1" in world.store.scan("replica/")
    world.settle(1.5)
    assert two.grants() == ["c2"] and set(world.store.scan("replica/")) == {"replica/r2"}


def test_a_process_that_ended_without_any_core_is_waited_for_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    old = started(world)
    Replica(world, "r1").connect(old, hello=False, ready=False, renews=False)
    old.host.roster.add(Hello(1, "r1", host=here(), pid=ended.pid))
    old.kill()
    world.settle(2.0)
    new = started(world)
    assert "until it is known what 1 replica of the core before may still hold" in caplog.text
    world.settle(2.5)
    assert not new.host.recovery.over, "engines have to notice, too"
    world.settle(1.0)
    assert new.host.recovery.over and not world.store.scan("replica/")
    new.kill()
    world.settle(2.0)
    assert started(world).host.recovery.over


def test_what_joined_a_core_meanwhile_stays_in_the_roster(world: World) -> None:
    """Whether it is this core, or the one that follows it while this one stands still."""
    hello = Hello(1, "r1")
    old = started(world)
    old.host.roster.add(hello)
    old.kill()
    world.settle(2.0)
    new = started(world)
    (ghost,) = new.host.recovery.waits_for.values()
    replica = Replica(world, "r1")
    replica.connect(new, ready=False)
    world.settle(WAITS_S + 1)
    assert new.host.recovery.over, "it is there, and never says what it holds"
    assert set(world.store.scan("replica/")) == {"replica/r1"}
    new.host.roster.strike(ghost)
    assert set(world.store.scan("replica/")) == {"replica/r1"}, "another core wrote this entry"


def test_a_store_that_does_not_answer_leaves_an_entry_and_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world.store.put("replica/gone", b"{}")
    core = started(world)

    def fail(*_: Any, **__: Any) -> int:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(world.store, "put", fail)
    world.settle(WAITS_S + 0.5)
    assert core.host.recovery.over and "replica gone stays in the store: the disk is full" in caplog.text


def test_a_replica_that_said_goodbye_is_not_waited_for(world: World) -> None:
    old = started(world)
    replica = Replica(world, "r1")
    replica.connect(old)
    replica.tell(Bye())
    assert not world.store.scan("replica/") and not old.host.replicas
    old.kill()
    world.settle(2.0)
    assert started(world).host.recovery.over


def test_runs_keep_their_order_over_cores(world: World) -> None:
    new = started(world, bound=1, policy="workflow_fcfs")
    world.store.put("replica/r1", b"{}")
    world.store.put("replica/r2", b"{}")
    new.kill()
    world.settle(2.0)
    new = started(world, bound=1, policy="workflow_fcfs")
    one, two = Replica(world, "r1"), Replica(world, "r2")
    two.connect(new, ready=False)
    two.tell(Signal("run_started", "young", {"age_s": 5.0}), enter("c2", run="young", age_s=4.0), Ready())
    one.connect(new, ready=False)
    one.tell(Signal("run_started", "old", {"age_s": 50.0}), enter("c1", run="old", age_s=1.0), Ready())
    assert (one.grants(), two.grants()) == (["c1"], [])


def test_an_adopted_call_is_not_refused_and_may_still_miss(world: World) -> None:
    limits = Limits(stages={"*": Limit(calls=0)})
    core = started(world, limits=limits)
    replica = Replica(world, "r1")
    replica.connect(core, ready=False)
    late = {"hints": {"deadline_s": 1.0}, "age_s": 30.0}
    replica.tell(adopted("c1", first=False, **late), adopted("c2", backend="zz"), Ready())
    assert core.serving.schedulers["a"].queue.in_flight == 1 and not replica.refusals()
    replica.tell(missed("c1", overloaded=True))
    assert "BudgetExceeded" in replica.refusals()["c1"], "from then on it is a call like any other"
    assert core.serving.schedulers["a"].queue.in_flight == 0
    core.serving.check_integrity()


def test_what_is_spent_outlives_the_core(world: World) -> None:
    limits = Limits(tenants={"acme": Limit(calls=3, per_s=3600)}, run=Limit(calls=2))
    old = started(world, limits=limits, bound=9)
    replica = Replica(world, "r1")
    replica.connect(old)
    said = {"tenant": "acme"}
    replica.tell(
        Signal("run_started", "run", {"tenant": "acme"}),
        enter("c1", said=said, run="run"), enter("c2", said=said), end("c1"),
    )  # fmt: skip
    world.settle(2.1)
    old.kill()
    world.settle(2.0)
    new = started(world, limits=limits, bound=9)
    replica.connect(new, ready=False)
    replica.tell(Signal("run_started", "run", {"tenant": "acme"}), adopted("c2", said=said), Ready())
    replica.tell(enter("c3", said=said, run="run"), enter("c4", said=said, run="run"), enter("c5", said=said))
    assert replica.grants()[2:] == ["c3"]
    assert set(replica.refusals()) == {"c4", "c5"}, "one was spent by the run, one and a reserved one by the tenant"
    replica.tell(end("c3"), end("c2"), Signal("run_ended", "run", {"outcome": "done"}))
    world.settle(2.1)
    assert len(world.store.scan("spent/")) == 1, "a run's account goes with it"


def test_a_core_that_was_replaced_writes_nothing_over(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It may stand still in the middle of a write, after it looked whether it may."""
    limits = Limits(tenants={"acme": Limit(calls=9, per_s=3600)})
    old = started(world, limits=limits, bound=9)
    replica = Replica(world, "r1")
    replica.connect(old)
    said = {"tenant": "acme"}
    replica.tell(enter("c1", said=said), end("c1"))
    begun = old.host._spent._changes(world.clock())
    assert begun, "what it was about to write"
    old.kill()
    world.settle(2.0)
    new = started(world, limits=limits, bound=9)
    replica.connect(new)
    replica.tell(enter("c2", said=said), enter("c3", said=said), end("c2"), end("c3"))
    world.settle(2.1)
    before = world.store.scan("")
    old.host._spent._write(begun, learned=True)
    old.host._labels._may_write = lambda: True
    old.host._labels.keep("w", b"{}")
    old.host._strike(old.host.replicas["r1"])
    stray = Replica(world, "r2")
    stray.connect(old)
    assert "this core does not decide" in str(stray.bye()) and "does not decide" not in caplog.text
    assert world.store.scan("") == before and "replica/r1" in before
    assert caplog.text.count("another process has replaced it") == 3


def test_what_is_learned_outlives_the_core(world: World) -> None:
    old = started(world)
    replica = Replica(world, "r1")
    replica.connect(old)
    replica.tell(
        Signal("run_started", "run", {"graph": "g"}),
        Signal("node_entered", "run", {"stage": "answer", "namespace": "answer:1", "step": 1}),
        enter("c1", run="run", namespace="answer:1"), first("c1"), end("c1"),
        Signal("node_left", "run", {"stage": "answer", "namespace": "answer:1"}),
        Signal("run_ended", "run", {"outcome": "done"}),
    )  # fmt: skip
    world.run(old.host.close())
    assert old.serving.estimates.learned("g", "answer").calls
    new = started(world)
    assert new.lease.epoch == 2, "the lease was given back"
    assert new.serving.estimates.learned("g", "answer").calls


# A replica dies, or only its connection


def test_a_connection_that_comes_back_keeps_places_and_grants(world: World) -> None:
    core = started(world, bound=1)
    one, two = Replica(world, "r1"), Replica(world, "r2")
    one.connect(core)
    two.connect(core)
    one.tell(enter("c1"), enter("c2"))
    two.tell(enter("c3"))
    one.drop()
    queue = core.serving.schedulers["a"].queue
    assert (queue.in_flight, queue.waiting) == (1, 1)
    one.connect(core, ready=False)
    one.tell(adopted("c1"), enter("c2"), Ready())
    assert (queue.in_flight, queue.waiting) == (1, 2)
    one.tell(first("c1"), end("c1"))
    assert one.grants() == ["c1", "c2"] and two.grants() == []
    assert [record.id for record in core.serving.records.records()] == ["c1"]


def test_a_grant_that_was_lost_on_the_way_is_given_again(world: World) -> None:
    core = started(world, bound=1)
    replica = Replica(world, "r1")
    replica.connect(core)
    replica.tell(enter("c1"))
    replica.drop()
    replica.connect(core, ready=False)
    replica.tell(enter("c1"), Ready())
    assert [(grant.epoch, grant.attempt) for grant in replica.got(Grant)] == [(1, 1), (1, 1)]
    replica.tell(enter("c1"))
    assert len(replica.grants()) == 2, "on one connection it is given once"


def test_a_new_connection_ends_the_one_before(world: World) -> None:
    core = started(world)
    replica = Replica(world, "r1")
    replica.connect(core)
    before = replica.wire
    replica.tell(enter("c1"))
    replica.connect(core, ready=False)
    replica.tell(adopted("c1"), Ready())
    assert before is not None and not before.open and replica.connected
    assert list(core.host.replicas["r1"].calls) == ["c1"]


def test_what_a_replica_does_not_speak_of_has_ended(world: World) -> None:
    core = started(world, bound=1)
    replica = Replica(world, "r1")
    replica.connect(core)
    replica.tell(enter("c1"), enter("c2"))
    replica.drop()
    replica.connect(core, ready=False)
    replica.tell(enter("c2"), Ready())
    assert replica.grants() == ["c1", "c2"]


def test_a_dead_replicas_grants_come_back_after_lease_and_bound(world: World) -> None:
    core = started(world, bound=1)
    one, two = Replica(world, "r1"), Replica(world, "r2")
    one.connect(core)
    two.connect(core)
    one.tell(Signal("run_started", "run", {}), enter("c1"))
    two.tell(enter("c2"))
    one.drop()
    world.settle(WAITS_S - 0.5)
    assert two.grants() == []
    world.settle(1.0)
    assert two.grants() == ["c2"]
    assert "r1" not in core.host.replicas and not core.serving.book.open_runs()
    assert set(world.store.scan("replica/")) == {"replica/r2"}
    core.serving.check_integrity()


def test_a_process_that_is_seen_to_be_gone_needs_no_lease(world: World) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    assert is_gone(here(), ended.pid) and not is_gone(here(), os.getpid())
    assert not is_gone("elsewhere", ended.pid)
    assert not is_gone(here(), 2**62), "a peer may say any number"
    core = started(world, bound=1)
    one, two = Replica(world, "r1"), Replica(world, "r2")
    one.connect(core, hello=False, ready=False, renews=False)
    one.tell(Hello(1, "r1", host=here(), pid=ended.pid), Ready(), enter("c1"))
    two.connect(core)
    two.tell(enter("c2"))
    one.drop()
    world.settle(4.5)
    assert two.grants() == []
    world.settle(1.0)
    assert two.grants() == ["c2"]


class Telling(StillAdapter):
    """An engine that says what it runs."""

    def __init__(self) -> None:
        super().__init__(Probe(capabilities={Capability.STATS: Support.NATIVE}))
        self.runs: Callable[[], int] = lambda: 0

    async def stats(self) -> EngineStats:
        return EngineStats(running=self.runs(), waiting=0)


def test_an_engine_that_tells_is_believed(world: World) -> None:
    engine = Telling()
    core = started(world, backends={Backend("a", "http://a/v1", max_concurrency=3): engine})
    one, two = Replica(world, "r1"), Replica(world, "r2")
    one.connect(core)
    two.connect(core)
    world.settle(0.2)
    one.tell(enter("c1"), enter("c2"))
    two.tell(enter("c3"), enter("c4"), enter("c5"))
    busy = 2
    engine.runs = lambda: busy + len(two.grants())
    one.drop()
    world.settle(LEASE_S + 15.0)
    assert two.grants() == ["c3"], "it still runs them"
    busy = 1
    world.settle(4.0)
    assert two.grants() == ["c3", "c4"], "one of them is gone"
    world.settle(4.0)
    assert two.grants() == ["c3", "c4"]
    busy = 0
    world.settle(4.0)
    assert two.grants() == ["c3", "c4", "c5"]
    core.serving.check_integrity()


def test_a_grant_that_may_be_unused_does_not_stand_for_anothers_request(world: World) -> None:
    engine = Telling()
    core = started(world, backends={Backend("a", "http://a/v1", max_concurrency=2): engine})
    one, two, three = (Replica(world, name) for name in ("r1", "r2", "r3"))
    for replica in (one, two, three):
        replica.connect(core)
    world.settle(0.2)
    engine.runs = lambda: 1
    one.tell(enter("c1"))
    one.drop()
    world.settle(LEASE_S + 1.0)
    two.tell(enter("c2"))
    two.drop()
    three.tell(enter("c3"))
    world.settle(5.0)
    assert two.grants() == ["c2"] and three.grants() == [], "what runs is c1, and c2 may be sent yet"


@pytest.fixture
def frozen(world: World) -> Frozen:
    return Frozen(world)


class Frozen:
    """A core whose engine runs a request of a replica that was frozen before the core began."""

    def __init__(self, world: World) -> None:
        world.store.put("replica/frozen", b"{}")
        self.world, self.engine, self.busy = world, Telling(), 1
        self.core = started(world, backends={Backend("a", "http://a/v1", max_concurrency=2): self.engine})
        self.replica = Replica(world, "r1")
        self.replica.connect(self.core)
        self.engine.runs = lambda: self.busy + len(self.replica.grants())
        self.replica.tell(enter("c1"), enter("c2"))
        world.settle(WAITS_S + 4.0)
        assert self.grants == ["c1"], "the other place may be the frozen replica's"
        assert "replica/frozen" in world.store.scan("replica/"), "a core after this one has to know of it, too"

    @property
    def grants(self) -> list[str]:
        return self.replica.grants()


def test_what_a_frozen_replica_may_hold_is_kept_back_until_the_engine_lets_go(frozen: Frozen) -> None:
    frozen.world.settle(100.0)
    assert frozen.grants == ["c1"]
    frozen.busy = 0
    frozen.world.settle(4.0)
    assert frozen.grants == ["c1", "c2"]
    assert set(frozen.world.store.scan("replica/")) == {"replica/r1"}


def test_a_frozen_replica_that_thaws_says_what_it_holds(frozen: Frozen) -> None:
    thawed = Replica(frozen.world, "frozen")
    thawed.connect(frozen.core, ready=False)
    thawed.tell(adopted("c0", age_s=30.0), Ready())
    queue = frozen.core.serving.schedulers["a"].queue
    assert (queue.in_flight, queue.kept_back) == (2, 0)
    thawed.tell(end("c0"))
    assert frozen.grants == ["c1", "c2"]


def test_of_two_frozen_replicas_one_that_thaws_gives_back_only_what_it_says(world: World) -> None:
    world.store.put("replica/other", b"{}")
    frozen = Frozen(world)
    thawed = Replica(world, "frozen")
    thawed.connect(frozen.core)
    world.settle(4.0)
    assert frozen.grants == ["c1"], "the request is the other one's"


def test_what_an_engine_shows_for_ever_is_not_ours(frozen: Frozen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "KEPT_BACK_S", 60.0)
    frozen.world.settle(50.0)
    assert frozen.grants == ["c1"]
    frozen.world.settle(10.0)
    assert frozen.grants == ["c1", "c2"], "others use the engine, too"


# Warm-ups


class Warm(StillAdapter):
    def __init__(self) -> None:
        super().__init__(Probe())

    async def warm(self, body: Any) -> Warmed:
        raise AssertionError("the core has no prompt to send")


def test_a_replica_sends_the_prefetch_of_the_prompt_that_it_keeps(world: World) -> None:
    from orla_lg.core.memory.events import CacheAction, Verb
    from orla_lg.link import messages

    core = started(world, backends={Backend("a", "http://a/v1", engine="warm", max_concurrency=4): Warm()},
                   warm_up=WarmUp(least_tokens=1))  # fmt: skip
    replica = Replica(world, "r1")
    replica.connect(core)
    replica.tell(Signal("run_started", "run", {"thread": "t", "graph": "g"}))
    call = enter("c1", run="run", workflow="t", thread=True, chars=[8000, 8000], prompt_chars=16_000)
    replica.tell(call, messages.Keeps("c1", 16_000, 3), first("c1"), end("c1", prompt_tokens=4000))
    scheduler = core.serving.schedulers["a"]
    kept = scheduler.prefetcher.prompts.last.get("t")
    assert isinstance(kept, Prompt) and kept.chars == 16_000
    scheduler.forgotten()
    scheduler.apply(CacheAction(Verb.WARM, "t", "a"))
    world.settle(0.1)
    (warm,) = replica.got(messages.Warm)
    assert (warm.workflow, warm.backend, warm.messages, warm.prefix) == ("t", "a", None, 12)
    assert warm.fields["told"]["priority"] < 0
    replica.tell(messages.WarmEnded(warm.order, None, 4000, 0))
    assert scheduler.statistics().warm_ups.done == 1
    scheduler.forgotten()
    scheduler.apply(CacheAction(Verb.WARM, "t", "a"))
    world.settle(0.1)
    replica.tell(enter("c2", run="run", workflow="t", thread=True))
    world.settle(0.1)
    assert [each.order for each in replica.got(messages.StopWarm)] == [replica.got(messages.Warm)[1].order]
    replica.drop()
    assert scheduler.prefetcher.running is None


def test_a_place_among_the_calls_of_a_key_comes_back_however_a_call_leaves(world: World) -> None:
    slots = CallSlots()

    def taken(caller: Any, refuses: bool) -> HeldSlot:
        slot = slots.take("k", 2)
        if slot is None:
            raise QueueFull("as many as may be")
        return slot

    core = started(world, bound=1, taken=taken)
    replica = Replica(world, "r1")
    replica.connect(core)
    replica.tell(enter("c1"), enter("c2"), enter("c3"))
    assert set(replica.refusals()) == {"c3"}
    replica.drop()  # c2, which waits, leaves its queue
    replica.connect(core, ready=False)
    replica.tell(adopted("c1"), enter("c2"), Ready())
    replica.tell(end("c1"), enter("c4"))
    assert set(replica.refusals()) == {"c3"} and replica.grants() == ["c1", "c2"]
    replica.tell(end("c2"), end("c4"))
    assert not slots._taken


def test_a_grant_that_was_not_used_is_none_of_the_attempts(world: World) -> None:
    replica = Replica(world, "r1")
    core = started(world, bound=2)
    replica.connect(core, ready=False)
    replica.tell(adopted("held", first=False, max_attempts=1), Ready(), enter("new", max_attempts=1))
    assert replica.grants() == ["new"]
    for call in ("held", "new"):
        replica.tell(missed(call, overloaded=True, unused=True))
    world.settle(1.0)
    assert sorted(replica.grants()) == ["held", "new", "new"]
    for call in ("held", "new"):
        replica.tell(missed(call, 2, overloaded=True))
    world.settle(1.0)
    assert set(replica.refusals()) == {"held", "new"}
    core.serving.check_integrity()
