from __future__ import annotations

import pytest

from orla_lg.core.cache.slots.files import SavedPool
from orla_lg.core.cache.slots.swap import Slot, Swaps
from orla_lg.core.cache.slots.table import SlotTable
from orla_lg.core.cache.slots.worth import Prices
from orla_lg.core.engine.speed import SpeedMeter
from orla_lg.core.memory.events import Doing


def paced(tokens_per_s: int = 100) -> Prices:
    speed_meter = SpeedMeter()
    speed_meter.note(service_s=2.0, prefill_s=1.0, fresh_tokens=tokens_per_s, completion_tokens=None)
    return Prices(speed_meter)


def a_slot(doing: Doing | None, tokens: int = 1000) -> Slot:
    return Slot(0, owner="w", doing=doing, tokens=tokens, prefix=(1,))


def test_saving_makes_a_loss_small_where_prefill_is_slow_and_not_where_it_is_fast() -> None:
    lost = Swaps(None, prices=paced()).loss_s(a_slot(Doing.TOOL), 0.0)
    saved = Swaps(SavedPool("e", 1), prices=paced()).loss_s(a_slot(Doing.TOOL), 0.0)
    assert lost == 9.5 and 0.1 < saved < 0.2
    fast = Swaps(SavedPool("e", 1), prices=paced(20_000))
    assert fast.loss_s(a_slot(Doing.TOOL), 0.0) == 0.95 * 0.05
    assert fast.begin_saving(a_slot(Doing.TOOL), 0.0) is None, "it is computed sooner than written and read"


def test_saves_that_turn_out_slow_are_done_no_more() -> None:
    swaps = Swaps(SavedPool("e", 1), prices=paced())
    for _ in range(40):
        swaps.prices.saved(20.0)
    assert swaps.begin_saving(a_slot(Doing.TOOL), 0.0) is None
    assert swaps.loss_s(a_slot(Doing.TOOL), 0.0) == 9.5


def test_the_slot_of_least_loss_is_taken_though_used_last() -> None:
    table = SlotTable(2, swaps=Swaps(None, prices=paced()))
    for number, (workflow, tokens) in enumerate([("u", 1000), ("v", 10)]):
        lease = table.acquire(workflow, (), float(number), hold=True)
        assert lease is not None
        table.release_lease(lease, (number,), tokens, float(number), hold=True)
        table.turned(workflow, Doing.IDLE)
        table.release(workflow)
    taken = table.acquire("w", (), 9.0, hold=True)
    assert taken is not None and taken.slot == 1


def test_learned_odds_may_say_otherwise() -> None:
    swaps = Swaps(None, prices=paced(), odds=lambda workflow, doing, since_s, now: 1.0 if workflow == "w" else 0.0)
    assert swaps.loss_s(a_slot(None), 0.0) == 10.0


@pytest.mark.parametrize("change", ["turned", "read", "dropped", "written"])
def test_what_is_saved_is_weighed_anew_when_it_changed(change: str) -> None:
    """The least of all that is saved is looked for once at a moment, unless something happens in it."""
    swaps = Swaps(pool := SavedPool("e", 2), prices=paced())
    for owner in "uv":
        entry = pool.begin_writing(owner, (1,), 1000, Doing.TOOL, 9.5, lambda each: 0.0)
        assert entry is not None
        pool.written(entry, 0.0, ok=True)
    assert swaps.loss_s(a_slot(Doing.HUMAN), 0.0) == 6.0, "what is saved is worth more: it would be lost"
    match change:
        case "turned":
            pool.turned("u", Doing.IDLE)
        case "read":
            pool.begin_reading(entry)
            pool.read(entry, 0.0, ok=True)
        case "dropped":
            pool.drop("u")
        case "written":
            swaps.odds = lambda workflow, doing, since_s, now: 0.5
            entry = pool.begin_writing("v", (1,), 10, Doing.IDLE, 0.1, lambda each: 0.0)
            assert entry is not None
            pool.written(entry, 0.0, ok=True)
    assert swaps.loss_s(a_slot(Doing.HUMAN), 0.0) < 1.0, "now there is a name for it"
