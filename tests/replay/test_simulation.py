"""Replays are the same each time, and lose no call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.core.engine.backend import Effect, Probe
from orla_lg.core.engine.capabilities import WholeCache, WorkflowCache
from orla_lg.core.policies import NAMES
from orla_lg.replay.adapters import SlotAdapter
from orla_lg.replay.figures import figures_of
from orla_lg.replay.simulation import NO_ROOM, Arrangement, Played, SimulatedBackend, Simulation, with_scaled
from orla_lg.replay.traffic import BackendSetting, Piece, RecordedCall
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest
from tests.replay.test_workload import call, workload

ENGINE = EngineParameters(
    block_tokens=16, kv_blocks=64, context_tokens=1024, max_running=8, request_s=0.0, jitter=0.2
)


def arrangement(name: str = "b", **changes: Any) -> Arrangement:
    setting = BackendSetting(name, kv_tokens=ENGINE.kv_tokens, max_concurrency=changes.pop("cap", None))
    return Arrangement("x", {name: SimulatedBackend(setting, ENGINE, changes.pop("engines", 1))}, **changes)


def seen(number: int, told: tuple[float, float, int, int, int, str], pieces: dict[str, Piece]) -> RecordedCall:
    at_s, took_s, prompt, answer, flow, kind = told
    piece = pieces.setdefault(f"{flow} {kind}", Piece.after(pieces["shared"], hash((flow, kind)) % 10**9, 100))
    fields: dict[str, Any] = {"prompt": piece, "prompt_tokens": prompt, "completion_tokens": answer}
    match kind:
        case "failed":
            fields["error"] = "ValueError: no"
        case "external":
            fields["external"] = True
        case "uncounted":
            fields["prompt_tokens"] = None
        case "alone":
            fields["run"] = None
        case "urgent":
            fields |= {"priority": 3.0, "deadline_s": 0.5, "tenant": "gold", "cache_hint": "flush"}
    return call(str(number), at_s, took_s, **{"workflow": f"w{flow}", "run": f"r{flow}", **fields})


CALLS = st.lists(
    st.tuples(
        st.floats(0, 20), st.floats(0, 9), st.integers(1, 1500), st.integers(1, 40), st.integers(0, 3),
        st.sampled_from(["plain", "plain", "failed", "external", "uncounted", "alone", "urgent"]),
    ),
    min_size=1, max_size=25,
)  # fmt: skip


def played(told: list[Any], how: Arrangement) -> list[Played]:
    pieces = {"shared": Piece.after(None, 7, 100)}
    return Simulation(workload(*(seen(n, each, pieces) for n, each in enumerate(told))), how).run()


@settings(max_examples=40, deadline=None)
@given(CALLS, st.sampled_from(NAMES), st.sampled_from([None, 1, 3]), st.booleans(), st.sampled_from([1, 2]))
def test_the_same_calls_end_the_same_and_none_is_lost(
    told: list[Any], policy: str, cap: int | None, admission: bool, engines: int
) -> None:
    how = arrangement(policy=policy, cap=cap, admission=admission, engines=engines)
    one, again = played(told, how), played(told, how)
    assert [each.call.number for each in one] == list(range(len(told)))
    for each, same in zip(one, again, strict=True):
        assert (each.arrived_s, each.ended_s, each.cached_tokens, each.error) == (
            same.arrived_s, same.ended_s, same.cached_tokens, same.error,
        )  # fmt: skip
        assert each.ended_s >= each.arrived_s >= 0
        if each.call.seen.is_counted and not each.error:
            assert each.first_s is not None and each.arrived_s <= each.first_s <= each.ended_s
        assert not each.error or each.error == NO_ROOM or "Deadline" in each.error
    assert figures_of(one) == figures_of(again)


def test_what_follows_comes_later_where_what_it_follows_does() -> None:
    calls = workload(call("a", 0.0, 1.0, prompt_tokens=100, completion_tokens=50), call("b", 3.0))
    slow = arrangement()
    backend = slow.backends["b"]
    slower = replace(backend, parameters=with_scaled(backend.parameters, prefill=9, decode=9))
    one, other = Simulation(calls, slow).run(), Simulation(calls, replace(slow, backends={"b": slower})).run()
    for first, second in (one, other):
        assert second.arrived_s == pytest.approx(first.ended_s + 2.0)
    assert other[0].ended_s > 5 * one[0].ended_s


def test_a_call_that_cannot_be_simulated_takes_as_long_as_it_took() -> None:
    made = Simulation(workload(call("a", 0.0, 2.5, error="x"), call("b", 3.0, 1.0)), arrangement()).run()
    assert made[0].ended_s == 2.5 and made[1].arrived_s == pytest.approx(3.0)


def test_a_stage_runs_where_a_mapping_says_and_a_workflow_stays_with_its_engine() -> None:
    calls = workload(*(call(f"{n}", n * 0.01, 5.0, workflow=f"w{n % 4}", run=f"r{n % 4}") for n in range(8)))
    heard: list[int] = []
    one = SimulatedBackend(BackendSetting("b"), ENGINE, 2)
    simulation = Simulation(calls, Arrangement("x", {"b": one, "c": one}, mapping={"s": "c"}), heard.append)
    simulation.run()
    assert heard == list(range(1, 9))
    assert {backend for backend, _ in simulation._at} == {"c"} and len(simulation._at) == 4
    assert set(simulation._at.values()) == {"c", "c 2"}


async def test_a_slot_finds_the_last_prompt_that_ran_in_it_and_nothing_of_another() -> None:
    slots = SlotAdapter(Probe(), SimEngine(ENGINE))
    one = slots.sent(SimRequest("a", 64, 1, [1, 2, 3]), 0)
    same, elsewhere = slots.sent(SimRequest("b", 64, 1, [1, 2, 4]), 0), slots.sent(SimRequest("c", 64, 1, [1, 2]), 1)
    assert same.hashes[:2] == one.hashes[:2] and same.hashes[2] != one.hashes[2]
    assert not {*elsewhere.hashes} & {*one.hashes}
    assert (await slots.save(0, "kept")).effect is Effect.SAVED
    assert await slots.flush(WorkflowCache("w", 0)) is Effect.FREED
    assert slots.sent(SimRequest("d", 64, 1, [1, 2]), 0).hashes[0] != one.hashes[0]
    assert await slots.restore(1, "kept") is Effect.RESTORED and await slots.restore(1, "no") is Effect.FAILED
    assert slots.sent(SimRequest("e", 64, 1, [1, 2, 4]), 1).hashes == same.hashes
    assert not slots.sent(SimRequest("f", 64, 1, [1]), None).hashes
    assert await slots.pin(WorkflowCache("w", 0)) is Effect.PINNED
    assert await slots.release(WholeCache()) is await slots.flush(WholeCache()) is Effect.UNSUPPORTED


def test_an_engine_with_slots_serves_as_many_at_once_as_it_has() -> None:
    setting = BackendSetting("b", slots=2, kv_tokens=512, can=frozenset({"flush_workflow", "save_restore", "pin"}))
    calls = workload(*(call(str(n), 0.0, 1.0, workflow=f"w{n}", run=f"r{n}", prompt_tokens=100) for n in range(6)))
    made = Simulation(calls, Arrangement("x", {"b": SimulatedBackend(setting, ENGINE)})).run()
    assert not any(each.error for each in made)
    began = sorted(each.dispatched_s for each in made)
    assert began[0] == began[1] < began[2]
