"""Hints about order that nothing in force reads: one warning, with the hint, what is in force, and what helps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orla_lg import Hints, Orla
from orla_lg.core.call import Ask, Assignment
from orla_lg.core.engine.backend import Capability, Probe, Support
from orla_lg.core.identity import Identity
from orla_lg.core.lifecycle import arrive
from orla_lg.core.operation.policy_choice import PolicyChoice
from orla_lg.core.policies import RequestChoice, StageChoice
from orla_lg.core.queues import Queued, Sortable
from orla_lg.core.workflow import Outcome
from tests.conftest import at
from tests.stub_engine import StubEngine

MakeOrla = Callable[..., Orla]


class Mine:
    """A policy of a user's own, which may read anything."""

    def key(self, head: Queued, now: float) -> Sortable:
        return (head.order,)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING, logger="orla_lg"):
        yield lambda: [record.getMessage() for record in caplog.records]


def call(orla: Orla, hints: Hints, stage: str = "reply") -> None:
    """Let a call with these hints enter the queue, and end."""
    services = orla.core.serving.services
    inflight = arrive(services, Identity("w", stage=stage), Ask("auto", ()), call_id=services.new_id(), said=hints)
    inflight.enter(services.schedulers["main"], Assignment("main"))
    inflight.finish("enough")


URGENT = Hints(priority=8)


@pytest.mark.parametrize(
    ("policies", "hints", "said"),
    [
        ({}, URGENT, ["hint priority=8", "'reply'", "'main'", "stages go by 'workflow_fcfs'", 'policy="priority"']),
        ({}, Hints(deadline_s=5), ["hint deadline_s=5", "no policy in force reads it", 'policy="edf"']),
        ({"policy": "edf"}, URGENT, ["stages go by 'edf', calls of one stage by 'edf'"]),
        ({"policy": "priority"}, Hints(priority=8, deadline_s=5), ["hint deadline_s=5"]),
        (
            {"stage_policy": "priority"},
            URGENT,
            ["only the order of stages", "calls of one stage go by 'workflow_fcfs'"],
        ),
        ({"request_policy": "priority"}, URGENT, ["only the order of calls of one stage", "stages go by"]),
    ],
)
def test_what_is_not_read_is_warned_of_once(
    engine: StubEngine, make_orla: MakeOrla, warned: Callable[[], list[str]], policies: dict[str, Any], hints: Hints,
    said: list[str],
) -> None:  # fmt: skip
    orla = make_orla(at(engine), mapper={"*": "main"}, **policies)
    call(orla, Hints(cache="flush", tenant="acme"))
    assert not warned(), "such hints are no policy's business"
    for _ in range(3):
        call(orla, hints)
    (warning,) = warned()
    assert all(part in warning for part in said), warning


@pytest.mark.parametrize(
    "policies",
    [
        {"policy": "priority"},
        {"stage_policy": "priority", "request_policy": "sjf"},  # each chosen: one level is meant
        {"policy": "sjf", "request_policy": "priority"},
        {"policy": Mine()},
        {"request_policy": {"reply": Mine()}, "stage_policy": Mine()},
    ],
)
def test_what_is_read_is_not_warned_of(
    engine: StubEngine, make_orla: MakeOrla, warned: Callable[[], list[str]], policies: dict[str, Any]
) -> None:
    call(make_orla(at(engine), mapper={"*": "main"}, **policies), URGENT)
    assert not warned()


def test_an_engine_that_orders_by_priority_itself_is_enough_while_nothing_waits_here(
    engine: StubEngine, make_orla: MakeOrla, warned: Callable[[], list[str]]
) -> None:
    orla = make_orla(at(engine, max_concurrency=1), mapper={"*": "main"})
    health = orla.core.serving.schedulers["main"].health
    orla.connect()
    health.probe = Probe(capabilities={Capability.PRIORITY: Support.NATIVE})
    call(orla, URGENT)
    assert not warned()
    orla.pause("main")
    call(orla, URGENT)
    assert len(warned()) == 1
    orla.resume("main")


def test_a_priority_given_from_outside_is_looked_at_too(
    engine: StubEngine, make_orla: MakeOrla, warned: Callable[[], list[str]]
) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    services, scheduler = orla.core.serving.services, orla.core.serving.schedulers["main"]
    services.book.run_started("r", thread=None)
    orla.pause("main")
    identity = Identity("r", "r", "reply")
    inflight = arrive(services, identity, Ask("auto", ()), call_id="c")
    inflight.enter(scheduler, Assignment("main"))
    assert not warned() and orla.prioritize("r", 8)
    (warning,) = warned()
    assert "hint priority=8 (stage 'reply'" in warning
    inflight.finish("enough")
    orla.core.serving.progress.run_ended("r", Outcome.DONE)
    orla.resume("main")


def test_a_policy_set_later_counts(engine: StubEngine, make_orla: MakeOrla, warned: Callable[[], list[str]]) -> None:
    orla = make_orla(at(engine), mapper={"*": "main"})
    orla.set_policy(policy="priority")
    call(orla, URGENT)
    assert not warned()


@pytest.mark.parametrize(
    ("both", "stage", "request_", "made"),
    [
        (None, None, None, ("workflow_fcfs", "workflow_fcfs")),
        ("priority", None, None, ("priority", "priority")),
        ("priority", "edf", None, ("edf", "priority")),
        ("priority", None, "sjf", ("priority", "sjf")),
        ("priority", {"main": "edf"}, {"reply": "sjf"}, ("edf", "sjf")),
        ("priority", {"other": "edf"}, {"draft": "sjf"}, ("priority", "priority")),
        (None, {"other": "edf"}, {"draft": "sjf"}, ("workflow_fcfs", "workflow_fcfs")),
    ],
)
def test_one_policy_for_both_levels_which_each_may_refine(
    engine: StubEngine, other_engine: StubEngine, make_orla: MakeOrla, both: PolicyChoice | None,
    stage: StageChoice | None, request_: RequestChoice | None, made: tuple[str, str],
) -> None:  # fmt: skip
    from orla_lg.core.policies import name_of

    orla = make_orla(at(engine), at(other_engine, "other"), policy=both, stage_policy=stage, request_policy=request_)
    in_force = orla.core.serving.schedulers["main"].queue.policies
    assert (name_of(in_force.stage), name_of(in_force.of("reply"))) == made
    if made[0] == made[1]:
        assert in_force.stage is in_force.of("reply"), "one account for both levels"
