"""Links to a core: what a replica says, and what it is answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from orla_lg.core.call import Assignment, Call
from orla_lg.core.engine.backend import Backend, Probe
from orla_lg.core.limits.limits import Limit, Limits, LimitScope
from orla_lg.core.placement.view import BackendView
from orla_lg.link.framing import frame
from orla_lg.link.messages import (
    PROTOCOL,
    Bye,
    Grant,
    Graph,
    Hello,
    Keeps,
    Ready,
    Renew,
    Renewed,
    Request,
    RequestDone,
    Signal,
    View,
    Welcome,
)
from orla_lg.serve.link import session as session_module
from orla_lg.testing.virtual import StillAdapter
from tests.serve.scripted import Core, Key, Replica, World, adopted, end, enter, first, missed


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


def linked(world: World, *, key: Key | None = None, **more: Any) -> tuple[Core, Replica]:
    core = Core(world, **more)
    core.start()
    replica = Replica(world, "r1", key or Key())
    replica.connect(core)
    return core, replica


def two_backends() -> dict[Backend, Any]:
    return {Backend(name, f"http://{name}/v1", max_concurrency=2): StillAdapter() for name in "ab"}


# A call's way


def test_a_call_is_granted_and_ends(world: World) -> None:
    core, replica = linked(world)
    (welcome,) = replica.got(Welcome)
    assert welcome.epoch == 1 and [each["name"] for each in welcome.backends] == ["a"]
    replica.tell(enter("c1"))
    (grant,) = replica.got(Grant)
    assert (grant.call, grant.epoch, grant.attempt, grant.backend) == ("c1", 1, 1, "a")
    replica.tell(first("c1"), end("c1"))
    (record,) = core.serving.records.records()
    assert (record.id, record.backend, record.error, record.prompt_tokens) == ("c1", "a", None, 25)
    assert core.serving.schedulers["a"].queue.in_flight == 0
    core.serving.check_integrity()


def test_a_call_waits_for_its_turn_and_a_cancelled_one_leaves(world: World) -> None:
    core, one = linked(world, bound=1)
    two = Replica(world, "r2")
    two.connect(core)
    one.tell(enter("c1"))
    two.tell(enter("c2"), enter("c3"))
    assert (one.grants(), two.grants()) == (["c1"], [])
    two.tell(end("c2", "CancelledError: "))
    one.tell(first("c1"), end("c1"))
    assert two.grants() == ["c3"]


def test_messages_count_once_however_often_they_come(world: World) -> None:
    core, replica = linked(world)
    replica.tell(enter("c1"), enter("c1"), enter("c2"), enter("c2"))
    assert replica.grants() == ["c1", "c2"]
    replica.tell(first("c1"), first("c1"), end("c1"), end("c1"), end("c1", "other"), missed("c1"))
    assert [record.error for record in core.serving.records.records()] == [None]
    assert core.serving.schedulers["a"].queue.in_flight == 1


def test_a_missed_attempt_goes_to_an_alternative_and_then_to_its_replica(world: World) -> None:
    core, replica = linked(world, backends=two_backends())
    own = {"backend": "a", "alternatives": ["b"], "mapper": "mine", "reason": "because"}
    replica.tell(enter("c1", own=own, max_attempts=1))
    (grant,) = replica.got(Grant)
    assert (grant.backend, grant.mapper, grant.reason) == ("a", "mine", "because")
    replica.tell(missed("c1", 1, "500", overloaded=True))
    assert [(each.backend, each.attempt) for each in replica.got(Grant)] == [("a", 1), ("b", 2)]
    replica.tell(missed("c1", 2, "500 again", overloaded=True))
    assert replica.refusals() == {"c1": "cause: 500 again"}
    assert core.serving.schedulers["b"].queue.in_flight == 0


def test_a_deadline_and_a_callers_timeout_end_a_wait(world: World) -> None:
    _, replica = linked(world, bound=1)
    replica.tell(enter("c1"), enter("c2", hints={"deadline_s": 3.0}, age_s=2.0))
    replica.tell(enter("c3", timeout_s=0.5, max_attempts=1))
    world.settle(0.7)
    assert replica.refusals()["c3"].startswith("timeout: ")
    world.settle(0.5)
    assert replica.refusals()["c2"].startswith("DeadlineExceeded: ")


def test_a_call_that_nothing_places_goes_where_its_code_says(world: World) -> None:
    core, replica = linked(world)
    replica.tell(enter("c1", model="gpt-9", may_pass=True), enter("c2", able=[]), enter("c3", model="gpt-9"))
    assert [(each.call, each.backend) for each in replica.got(Grant)] == [("c1", None), ("c2", None)]
    assert replica.refusals()["c3"].startswith("MappingError: ")
    assert core.serving.schedulers["a"].queue.in_flight == 0


class Reads:
    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        return Assignment("a" if len(call.ask.messages) > 3 else "b")


def test_a_mapper_that_reads_messages_is_told_where_it_belongs(world: World) -> None:
    _, replica = linked(world, backends=two_backends(), mapper=Reads())
    replica.tell(enter("c1"))
    assert "prompts stay in the replica" in replica.refusals()["c1"]


def test_a_prompt_is_known_by_its_hashes(world: World) -> None:
    core, replica = linked(world)
    replica.tell(enter("c1", workflow="w"), first("c1"), end("c1", prompt_tokens=400))
    again = enter("c2", workflow="w", hashes=[11, 12, 13], chars=[800, 800, 40], prompt_chars=1640)
    replica.tell(again)
    assert replica.got(Grant)[-1].expected_tokens is not None
    replica.tell(Request(1, "resident", {"backend": "a", "hashes": [11, 12], "chars": [800, 800], "workflow": "w"}))
    (done,) = replica.got(RequestDone)
    assert done.error is None and done.value > 0
    assert core.serving.schedulers["a"].statistics().memory is not None


# Keys


def test_a_tenant_comes_from_the_key(world: World) -> None:
    core, replica = linked(world, key=Key("k", tenants=("acme",)))
    replica.tell(enter("c1"), enter("c2", said={"tenant": "acme"}), enter("c3", said={"tenant": "other"}))
    assert replica.grants() == ["c1", "c2"]
    assert "'other' is none of this key's, which carries acme; `orla-lg keys create" in replica.refusals()["c3"]
    replica.tell(end("c1"), end("c2"))
    assert {record.tenant for record in core.serving.records.records()} == {"acme"}
    several = Replica(world, "r2", Key("k2", tenants=("one", "two")))
    several.connect(core)
    several.tell(enter("d1"), enter("d2", hints={"tenant": "two"}))
    assert several.grants() == ["d2"] and "carries 2 tenants" in several.refusals()["d1"]


def test_a_workflow_named_like_a_tenants_is_none(world: World) -> None:
    core, replica = linked(world)
    replica.tell(enter("c1", workflow="tenant=4:acmesecret"), end("c1"))
    (record,) = core.serving.records.records()
    assert (record.tenant, record.workflow) == (None, "secret")


def test_a_key_may_use_its_backends_and_stages_only(world: World) -> None:
    _, replica = linked(world, backends=two_backends(), key=Key("k", backends=("b",), stages=("answer",)))
    (welcome,) = replica.got(Welcome)
    assert [each["name"] for each in welcome.backends] == ["b"]
    replica.tell(enter("c1", model="a"), enter("c2", model="b"), enter("c3", model="b", stage="other"))
    assert replica.grants() == ["c2"]
    assert "may not use backend 'a'" in replica.refusals()["c1"]
    assert "may not call from stage 'other'" in replica.refusals()["c3"]


def test_limits_of_graph_and_key_hold_over_all_replicas(world: World) -> None:
    key_layer = LimitScope(Limits(stages={"*": Limit(calls=3)}), ("key", "k"), " of key 'k'")
    core, one = linked(world, bound=9, layers=lambda caller: (key_layer,))
    two = Replica(world, "r2")
    two.connect(core)
    graph = [{"key": "support", "where": " of graph 'support'", "of_run": False,
              "limits": {"stages": {"draft": {"calls": 1}}}}]  # fmt: skip
    one.tell(enter("c1", stage="draft", layers=graph))
    two.tell(enter("c2", stage="draft", layers=graph))
    assert one.grants() == ["c1"] and "of graph 'support'" in two.refusals()["c2"]
    two.tell(enter("c3"), enter("c4"), enter("c5"), enter("c6"))
    assert two.grants() == ["c3", "c4", "c5"] and "of key 'k'" in two.refusals()["c6"]


def test_a_key_that_ended_ends_its_links(world: World) -> None:
    valid = [True]
    core, replica = linked(world, is_valid=lambda caller: valid[0])
    world.settle(1.2)
    assert replica.connected
    valid[0] = False
    world.settle(1.2)
    assert not replica.connected and "key" in str(replica.bye())
    assert core.host.connected == 0


# Who is let in


def test_a_replica_that_cannot_be_served_is_told_why(world: World) -> None:
    core, _ = linked(world)
    for hello, why in (
        (Hello(PROTOCOL + 1, "x"), "protocol"),
        (Hello(PROTOCOL, "x", names=["light"]), "names backend 'light'"),
    ):
        replica = Replica(world, "x")
        replica.connect(core, hello=False, ready=False, renews=False)
        replica.tell(hello)
        assert why in str(replica.bye()) and not replica.connected
        assert [each.protocol for each in replica.got(Welcome)] == [PROTOCOL] * (hello.protocol != PROTOCOL)
    core.run_until_deposed()
    late = Replica(world, "late")
    late.connect(core)
    assert "does not decide" in str(late.bye())


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", frame(("Enter", "c1")), frame(("Grant", "c", 1, 1, "a", "m")),
        frame(("Hello", 1, "twice")), frame(("Enter", *enter("c", hashes=["x"]))),
        frame(("Enter", *enter("c", chars=[1]))), frame(("Enter", *enter("c" * 300))),
        frame(("Enter", *enter("c", workflow="tenant=x"))),
        frame(("Signal", "tool_ended", "run", {"stage": "s", "seconds": "long"})),
        frame(("Adopt", ["c"], "a", None, 1, True)), frame(("Graph", "g", {"s": 3}, {}, {})),
        frame(("Enter", *enter("c", layers=[{"key": "k", "limits": {"run": {"calls": "many"}}}]))),
        frame(("Signal", "node_entered", "run", {})),
    ],
)  # fmt: skip
def test_garbage_ends_the_connection_and_nothing_else(world: World, data: bytes) -> None:
    core, replica = linked(world)
    other = Replica(world, "r2")
    other.connect(core)
    replica.tell(Signal("run_started", "run", {"thread": None, "graph": "g", "age_s": 0.0}))
    assert replica.session is not None
    world.loop.call_soon(replica.session.data_received, data)
    world.settle()
    assert not replica.connected or replica.refusals(), "it is cut off, or the call is refused"
    other.tell(enter("fine"))
    assert other.grants() == ["fine"]
    core.serving.check_integrity()


def test_what_a_newer_peer_says_is_passed_over(world: World) -> None:
    _, replica = linked(world)
    assert replica.session is not None
    world.loop.call_soon(replica.session.data_received, frame(("Brandish", 1)))
    replica.tell(Signal("danced", "run", {}), enter("c1", age_s=float("nan"), timeout_s=float("inf")))
    assert replica.grants() == ["c1"]


def test_a_replica_that_does_not_read_is_cut_off(world: World) -> None:
    core, replica = linked(world)
    assert replica.wire is not None and replica.wire.high == session_module.MOST_OUTBOX
    replica.tell(enter("c1"))
    assert replica.session is not None
    replica.session.pause_writing()
    world.settle()
    assert not replica.connected
    assert core.serving.schedulers["a"].queue.in_flight == 1, "its call stays out until it is known to be gone"


def test_a_silent_replica_is_cut_off_but_not_by_a_core_that_stood_still(world: World) -> None:
    core, replica = linked(world)
    silent = Replica(world, "r2")
    silent.connect(core, renews=False)
    world.settle(1.5)
    assert silent.connected
    world.clock._now_s += 5.0  # the process stands still
    world.settle(0.3)
    assert silent.connected and replica.connected
    world.settle(2.5)
    assert not silent.connected and replica.connected


def test_bounds_on_what_one_replica_may_have(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orla_lg.serve.link.arrivals.MOST_CALLS", 2)
    monkeypatch.setattr("orla_lg.serve.link.signals.MOST_RUNS", 2)
    core, replica = linked(world, bound=1)
    replica.tell(*(enter(f"c{n}") for n in range(4)))
    assert set(replica.refusals()) == {"c2", "c3"} and "QueueFull" in replica.refusals()["c2"]
    replica.tell(*(Signal("run_started", f"run{n}", {}) for n in range(4)))
    assert core.serving.book.open_runs() == 2


def test_leases_are_renewed_only_by_a_core_that_has_its_own(world: World) -> None:
    core, replica = linked(world)
    replica.tell(Renew(900))
    assert replica.got(Renewed)[-1].number == 900
    core.lease._until_s = 0.0  # the store does not answer
    replica.tell(Renew(901), enter("c1"))
    assert replica.got(Renewed)[-1].number == 900 and replica.grants() == []
    world.settle(0.6)  # it does again
    assert replica.grants() == ["c1"]


# Runs


def test_runs_are_followed_and_end_with_their_replica(world: World) -> None:
    core, replica = linked(world)
    edges = {
        "__start__": [["plan"], [], False],
        "plan": [[], ["answer", "__end__"], False],
        "answer": [[], [], False],
    }
    replica.tell(
        Graph("g", edges, {}, {"answer": "a"}),
        Signal("run_started", "run", {"thread": "t", "graph": "g", "age_s": 5.0}),
        Signal("node_entered", "run", {"stage": "plan", "namespace": "plan:1", "step": 1}),
    )
    run = core.serving.book.run("run")
    assert run is not None and run.stages() == ["plan"] and run.forecast is not None
    assert run.standing.arrived_s == pytest.approx(world.clock() - 5.0)
    replica.tell(Request(1, "ahead", {"run": "run"}))
    (done,) = replica.got(RequestDone)
    assert set(done.value["stages"]) == {"answer"}
    replica.tell(
        Signal("tool_started", "run", {"stage": "plan", "name": "search"}),
        Signal("tool_ended", "run", {"stage": "plan", "name": "search", "seconds": 2.0}),
        Signal("node_left", "run", {"stage": "plan", "namespace": "plan:1"}),
        Signal("node_left", "run", {"stage": "plan", "namespace": "plan:1"}),
        Signal("interrupted", "run", {}),
        Signal("run_ended", "run", {"outcome": "done"}),
        Signal("run_started", "run2", {}),
    )
    assert core.serving.book.statistics().outcomes == {"interrupted": 1}
    replica.tell(Bye())
    assert core.serving.book.statistics().outcomes == {"interrupted": 1, "abandoned": 1}
    core.serving.check_integrity()


def test_a_replica_speaks_of_its_own_runs_only(world: World) -> None:
    core, replica = linked(world)
    other = Replica(world, "r2")
    other.connect(core)
    replica.tell(Signal("run_started", "run", {"thread": "t"}))
    other.tell(
        Signal("run_started", "run", {}), Signal("run_ended", "run", {"outcome": "done"}),
        Signal("node_entered", "run", {"stage": "x"}), enter("c1", run="run"), end("c1"),
    )  # fmt: skip
    run = core.serving.book.run("run")
    assert run is not None and not run.stages()
    assert core.serving.records.records()[0].run is None


# Requests and views


def test_requests(world: World) -> None:
    core, replica = linked(world, bound=1)
    replica.tell(enter("c1"), enter("c2"))
    asked: list[tuple[str, dict[str, Any]]] = [
        ("statistics", {}), ("pause", {"backend": "a"}), ("resume", {"backend": "a"}),
        ("set_policy", {"stage_policy": "priority", "request_policy": {"*": "sjf"}, "backend": None}),
        ("set_limit", {"backend": "a", "max_concurrency": 2}), ("prioritize", {"run": "none", "priority": 3}),
        ("limits", {"limits": {"run": {"calls": 5}}}), ("feedback", {"record": "c0", "score": 0.5}),
        ("explode", {}), ("pause", {"backend": "zz"}), ("set_policy", {"stage_policy": 7}),
    ]  # fmt: skip
    for number, (what, more) in enumerate(asked):
        replica.tell(Request(number, what, more))
    done = {each.number: (each.error, each.value) for each in replica.got(RequestDone)}
    assert [done[number][0] for number in range(7)] == [None] * 7
    assert done[0][1]["backends"]["a"]["queue"]["waiting"] == 1
    assert replica.grants() == ["c1", "c2"], "the limit went up"
    assert done[5][1] is False and done[6][1] == {"run": {"calls": 5}}
    assert done[7][0] == "RecordUnknown" and done[8][0] == "ConfigError" and "unknown request" in done[8][1]
    assert done[9][0] == done[10][0] == "ConfigError"
    replica.tell(Request(20, "drain", {"backend": "a", "timeout_s": 5}))
    assert not [each for each in replica.got(RequestDone) if each.number == 20]
    replica.tell(end("c1"), end("c2"))
    assert [each.value for each in replica.got(RequestDone) if each.number == 20] == [True]
    assert core.serving.schedulers["a"].queue.paused


def test_views_are_pushed_when_they_change(world: World) -> None:
    core, replica = linked(world)
    world.settle(0.3)
    before = len(replica.got(View))
    world.settle(0.5)
    assert len(replica.got(View)) == before, "nothing changed"
    replica.tell(*(enter(f"c{n}") for n in range(4)))
    world.settle(0.15)
    (view,) = replica.got(View)[before:]
    assert (view.views[0]["in_flight"], view.views[0]["waiting"]) == (2, 2)
    core.host.refresh()
    world.settle()
    assert len(replica.got(Welcome)) == 2


# Engines with slots


def test_an_adopted_calls_slot_is_left_alone(world: World) -> None:
    backend = Backend("a", "http://a/v1")
    core = Core(world, backends={backend: StillAdapter(Probe(slots=2))})
    core.start()
    replica = Replica(world, "r1")
    replica.connect(core, ready=False)
    replica.tell(adopted("c1", slot=1), enter("c2"), Ready())
    world.settle(1.0)
    assert [(grant.call, grant.slot) for grant in replica.got(Grant)] == [("c2", 0)]
    replica.tell(end("c1"), enter("c3"))
    assert [(grant.call, grant.slot) for grant in replica.got(Grant)[1:]] == [("c3", 1)]


def test_prompts_are_kept_only_for_granted_calls(world: World) -> None:
    _, replica = linked(world)
    replica.tell(Keeps("none", 5), enter("c1"), Keeps("c1", 5000, 7), first("c1"), end("c1"))
    assert replica.connected
