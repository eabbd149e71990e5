"""The connection ends, or the core does: nothing is lost, nothing is sent twice, and what waits keeps waiting."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from orla_lg import BackendUnavailable, DeadlineExceeded, Orla
from orla_lg.link import connection
from orla_lg.link.messages import Adopt, End, Enter, FirstToken, Hello, Missed, Ready, Signal
from tests.link.scripted import ScriptedCore, eventually
from tests.link.test_calls import graph, hi
from tests.stub_engine import Gate, Reply, StubEngine

Replica = Callable[..., Orla]


class Run(threading.Thread):
    """A run of a wrapped graph, in a thread of its own."""

    def __init__(self, wrapped: Any, config: dict[str, Any] | None = None, *, stream: bool = False) -> None:
        super().__init__(daemon=True)
        self.wrapped, self.config, self.stream = wrapped, config, stream
        self.answer: Any = None
        self.error: BaseException | None = None
        self.seen: list[str] = []
        self.start()

    def run(self) -> None:
        try:
            if self.stream:
                for message, _ in self.wrapped.stream(hi(), self.config, stream_mode="messages"):
                    self.seen.append(message.content)
                self.answer = "".join(self.seen)
            else:
                self.answer = self.wrapped.invoke(hi(), self.config)["messages"][-1].content
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(60.0)
        assert not self.is_alive(), "it does not end"
        if self.error is not None:
            raise self.error
        return self.answer


@contextmanager
def held(engine: StubEngine, **reply: Any) -> Iterator[Gate]:
    """Let the engine answer once the gate is opened."""
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate, **reply)
    try:
        yield gate
    finally:
        gate.open()
        engine.rule = None


def test_a_call_that_waits_is_entered_again(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    core.grants = False
    orla = replica()
    run = Run(orla.wrap(graph(engine)))
    first = core.wait(Enter)
    core.drop()
    second = core.wait(Enter, 2)
    assert second.call == first.call and second.age_s >= first.age_s
    hellos = core.all(Hello)
    assert hellos[0].replica == hellos[1].replica
    core.wait(Ready, 2)
    core.line.send(core.grant(first.call))
    assert run.result()
    assert len(engine.chats) == 1
    assert [each.what for each in core.all(Signal)].count("run_started") == 2, "said again to the core"


def test_calls_are_said_in_the_order_of_their_arrival(
    core: ScriptedCore, engine: StubEngine, replica: Replica
) -> None:
    core.grants = False
    wrapped = replica().wrap(graph(engine))
    runs = []
    for number in range(3):
        runs.append(Run(wrapped))
        core.wait(Enter, number + 1)
    arrived = [each.call for each in core.all(Enter)]
    core.gone()
    core.next_core()
    core.wait(Ready)
    assert [each.call for each in core.all(Enter)] == arrived
    core.line.send(*(core.grant(call) for call in arrived))
    assert all(run.result() for run in runs)


def test_what_is_held_is_adopted_and_not_sent_again(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    wrapped = replica().wrap(graph(engine))
    with held(engine) as gate:
        run = Run(wrapped)
        call = core.wait(Enter).call
        eventually(lambda: engine.chats)
        core.gone()
        time.sleep(0.05)
        core.next_core()
        adopted = core.wait(Adopt)
        assert (adopted.enter[0], adopted.backend, adopted.attempt, adopted.first) == (call, "main", 1, False)
        core.line.send(core.grant(call, 1), core.grant(call, 2))  # neither is waited for
        gate.open()
        assert run.result()
    assert core.wait(End).call == call
    assert len(engine.chats) == 1


def test_a_stream_goes_on_without_the_core(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    wrapped = replica().wrap(graph(engine))
    engine.rule = lambda seen: Reply(text="one two three four five six", token_s=0.05)
    run = Run(wrapped, stream=True)
    core.wait(FirstToken)
    core.gone()
    core.next_core()
    assert core.wait(Adopt).first
    assert run.result() == "one two three four five six"
    core.wait(End)


def test_a_call_that_ended_meanwhile_is_told_to_the_next_core(
    core: ScriptedCore, engine: StubEngine, replica: Replica
) -> None:
    wrapped = replica().wrap(graph(engine))
    with held(engine) as gate:
        run = Run(wrapped)
        call = core.wait(Enter).call
        eventually(lambda: engine.chats)
        core.gone()
        eventually(lambda: not orla_of(wrapped).core.serving.link.up)  # type: ignore[attr-defined]
        gate.open()
        assert run.result()
    core.next_core()
    assert core.wait(Adopt).enter[0] == call
    assert core.wait(End).call == call
    core.wait(Ready)
    kinds = [type(each) for each in core.heard]
    assert kinds.index(Adopt) < kinds.index(End) < kinds.index(Ready)


ORLAS: dict[int, Orla] = {}


def orla_of(wrapped: Any) -> Orla:
    return ORLAS[id(wrapped)]


@pytest.fixture
def replica(replica: Replica) -> Replica:
    """Return a maker whose Orlas are found by the graphs that they wrap."""

    def make(*args: Any, **settings: Any) -> Orla:
        orla = replica(*args, **settings)
        wrap = orla.wrap

        def wrapping(graph: Any, **more: Any) -> Any:
            wrapped = wrap(graph, **more)
            ORLAS[id(wrapped)] = orla
            return wrapped

        orla.wrap = wrapping  # type: ignore[assignment]
        return orla

    return make


@pytest.mark.parametrize("same_core", [True, False])
def test_a_missed_attempt_without_an_answer(
    core: ScriptedCore, engine: StubEngine, replica: Replica, *, same_core: bool
) -> None:
    replies = iter([Reply(status=500)])
    engine.rule = lambda seen: next(replies, None)
    core.grants = False
    run = Run(replica().wrap(graph(engine, max_retries=2)))
    call = core.wait(Enter).call
    core.line.send(core.grant(call))
    core.wait(Missed)
    if same_core:
        core.drop()
        core.wait(Ready, 2)
        again = core.wait(Enter, 2)
        assert (again.call, again.attempts, again.max_attempts) == (call, 1, 3)
        assert core.wait(Missed, 2).attempt == 1
        core.line.send(core.grant(call, 1))  # had already
        core.line.send(core.grant(call, 2))
    else:
        core.gone()
        core.next_core()
        core.wait(Ready)
        again = core.wait(Enter)
        assert (again.attempts, again.max_attempts) == (0, 2) and not core.all(Missed)
        core.line.send(core.grant(call, 1))  # the first of this core
    assert run.result()
    assert len(engine.chats) == 2


def test_grants_of_an_older_core_are_ignored(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    core.grants, core.epoch = False, 5
    run = Run(replica().wrap(graph(engine)))
    call = core.wait(Enter).call
    core.line.send(core.grant(call)._replace(epoch=4))
    time.sleep(0.05)
    assert not engine.chats
    core.line.send(core.grant(call))
    assert run.result()


def test_an_older_core_is_not_followed(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    core.epoch = 5
    orla = replica()
    core.epoch = 4
    core.drop()
    eventually(lambda: len(core.all(Hello)) > 2)
    assert not orla.core.serving.link.up  # type: ignore[attr-defined]
    core.epoch = 6
    eventually(lambda: orla.core.serving.link.up)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 1 << 24) + b"x",
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 1) + b"\x01",
        struct.pack(">I", 8) + b"\x92\xa5Grant\x01",
    ],
    ids=["oversized", "no msgpack", "no array", "a grant of a number"],
)
def test_garbage_from_the_server_costs_a_connection(
    core: ScriptedCore, engine: StubEngine, replica: Replica, data: bytes
) -> None:
    core.grants = False
    run = Run(replica().wrap(graph(engine)))
    call = core.wait(Enter).call
    core.line.send_bytes(data)
    core.wait(Ready, 2)
    core.line.send(core.grant(call))
    assert run.result()


def test_a_view_that_is_none_inside_costs_a_connection(core: ScriptedCore, replica: Replica) -> None:
    from orla_lg.link.messages import View

    replica()
    core.line.send(View([{"name": "main", "waiting": "many"}]))
    core.wait(Ready, 2)
    core.line.send(View([{"name": "main", "probe": {"models": 3}}]))
    core.wait(Ready, 3)


def test_a_silent_core_is_dead(
    core: ScriptedCore, engine: StubEngine, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SILENT_S", 0.2)
    monkeypatch.setattr(connection, "RENEW_S", 0.05)
    core.grants = False
    run = Run(replica().wrap(graph(engine)))
    call = core.wait(Enter).call
    core.line.silent = True
    core.wait(Ready, 2)
    core.line.send(core.grant(call))
    assert run.result()


def test_deadlines_count_without_a_core(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    core.grants = False
    wrapped = replica().wrap(graph(engine))
    run = Run(wrapped, {"configurable": {"orla": {"deadline_s": 0.2}}})
    core.wait(Enter)
    core.gone()
    with pytest.raises(DeadlineExceeded, match="the core, which is lost"):
        run.result()


def test_patience_for_a_core_ends(
    core: ScriptedCore, engine: StubEngine, replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    core.grants = False
    wrapped = replica(core_patience_s=0.2).wrap(graph(engine))
    run = Run(wrapped)
    core.wait(Enter)
    core.gone()
    with pytest.raises(BackendUnavailable, match=r"no core for 0.2 s .*orla-lg serve"):
        run.result()
    with pytest.raises(BackendUnavailable, match="no core"):
        Run(wrapped).result()
    assert caplog.text.count("1 call waits in this process for the next one, for 0.2 s at most") == 1


def test_fail_is_at_once(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    core.grants = False
    wrapped = replica(on_core_lost="fail").wrap(graph(engine))
    run = Run(wrapped)
    core.wait(Enter)
    core.gone()
    with pytest.raises(BackendUnavailable, match="the core is lost"):
        run.result()
    with pytest.raises(BackendUnavailable, match="the core is lost"):
        Run(wrapped).result()
    assert not engine.chats


def test_direct_goes_on_with_a_part_of_the_bound(
    core: ScriptedCore, engine: StubEngine, replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    from dataclasses import replace

    core.grants, core.replicas = False, 3
    core.backends = (replace(core.backends[0], max_concurrency=7),)
    core.mapping = {"tables": [{"where": "shared", "rules": {"*": {"to": ["main"], "temperature": 0.5}}, "open": ""}]}
    orla = replica(on_core_lost="direct")
    wrapped = orla.wrap(graph(engine))
    run = Run(wrapped)
    core.wait(Enter)
    with held(engine) as gate:
        core.gone()
        runs = [run, *(Run(wrapped) for _ in range(5))]
        eventually(lambda: len(engine.chats) == 2)
        time.sleep(0.05)
        assert len(engine.chats) == 2, "7 // 3 at once"
        gate.open()
        assert all(each.result() for each in runs)
    assert engine.chats[0].body["temperature"] == 0.5
    assert orla.statistics().direct == 6
    assert len([each for each in caplog.records if "calls go on without it" in each.message]) == 1
    core.next_core()
    core.wait(Ready)
    core.grants = True
    assert Run(wrapped).result()
    core.wait(Enter)
    assert orla.core.serving.losses.direct_calls == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", ["plain", "stream", "async"])
def test_a_replica_cut_off_for_its_lease_ends_its_requests(
    core: ScriptedCore, engine: StubEngine, replica: Replica, way: str
) -> None:
    core.replica_lease_s = 0.3
    wrapped = replica().wrap(graph(engine))
    text = "one two three four five six seven"
    engine.rule = lambda seen: Reply(text=text, before_s=0.0 if way == "stream" else 5.0, token_s=0.5)
    if way == "async":
        error: list[BaseException] = []

        def begin() -> None:
            try:
                asyncio.run(wrapped.ainvoke(hi()))
            except BackendUnavailable as caught:
                error.append(caught)

        thread = threading.Thread(target=begin)
        thread.start()
        eventually(lambda: engine.chats)
        core.gone()
        thread.join(30.0)
        assert error and "this replica's lease" in str(error[0])
    else:
        run = Run(wrapped, stream=way == "stream")
        eventually(lambda: engine.chats)
        core.gone()
        with pytest.raises(BackendUnavailable, match="this replica's lease"):
            run.result()
    eventually(lambda: engine.in_flight == 0)
    (record,) = orla_of(wrapped).records()
    assert "lease" in str(record.error)


def test_what_is_due_does_not_wait_for_a_server_that_is_cut_off(
    core: ScriptedCore, engine: StubEngine, replica: Replica
) -> None:
    core.replica_lease_s = 0.4
    orla = replica(core_patience_s=0.5)
    wrapped = orla.wrap(graph(engine))
    with held(engine) as gate:
        at_engine = Run(wrapped)
        eventually(lambda: engine.chats)
        core.grants, core.deaf = False, True  # connections are taken, and nothing is answered
        waiting = Run(wrapped)
        core.wait(Enter, 2)
        began_s = time.monotonic()
        core.drop()
        with pytest.raises(BackendUnavailable, match="this replica's lease"):
            at_engine.result()
        with pytest.raises(BackendUnavailable, match="no core for"):
            waiting.result()
        assert time.monotonic() - began_s < 8.0, "of the 10 s for which a server's welcome is waited for"
        gate.open()
    orla.close()
    core.deaf = False
    core.drop()


def test_a_grant_that_was_not_used_within_the_lease_holds_no_more(
    core: ScriptedCore, engine: StubEngine, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a process that was frozen between its grant and its request, and finds its core again at once."""
    orla = replica()
    serving: Any = orla.core.serving
    leaves, frozen = serving.leaves, []

    def late(call: Any) -> bool:
        if not frozen:
            frozen.append(call)
            serving.link.confirmed_s = float("-inf")
            core.grants = False
            core.drop()
            core.wait(Ready, 2)
            assert not engine.chats
        return bool(leaves(call))

    monkeypatch.setattr(serving, "leaves", late)
    run = Run(orla.wrap(graph(engine)))
    missed = core.wait(Missed)
    assert missed.overloaded and not engine.chats and not core.all(Adopt)
    core.line.send(core.grant(missed.call, attempt=2))
    run.result()
    assert len(engine.chats) == 1
