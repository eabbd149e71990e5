"""A replica says what its calls left in the slots of engines to a core that did not see it."""

from __future__ import annotations

from collections.abc import Callable

from orla_lg import Orla
from orla_lg.link.messages import End, Enter, Ready, SlotContents
from tests.link.scripted import ScriptedCore
from tests.link.test_calls import graph
from tests.link.test_reconnect import Run
from tests.stub_engine import StubEngine

Replica = Callable[..., Orla]


def test_the_next_core_hears_what_is_in_which_slot(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    core.grants = False
    wrapped = replica().wrap(graph(engine))
    for number, slot in enumerate((1, 0, 1), 1):
        run = Run(wrapped)
        core.line.send(core.grant(core.wait(Enter, number).call, slot=slot, cache_action="claimed"))
        assert run.result()
        core.wait(End, number)
    calls = [each.call for each in core.all(Enter)]
    core.drop()
    core.wait(Ready, 2)
    assert not core.all(SlotContents), "that core has seen them"
    core.gone()
    core.next_core()
    core.wait(Ready)
    told = core.all(SlotContents)
    assert [(each.enter[0], each.backend, each.slot) for each in told] == [
        (calls[1], "main", 0),
        (calls[2], "main", 1),
    ]
    assert all(each.tokens > 0 and 0 <= each.age_s < 60 for each in told)
    assert [type(each) for each in core.heard].index(SlotContents) < [type(each) for each in core.heard].index(Ready)


def test_what_was_in_no_slot_is_not_said(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    assert Run(replica().wrap(graph(engine))).result()
    core.gone()
    core.next_core()
    core.wait(Ready)
    assert not core.all(SlotContents)
