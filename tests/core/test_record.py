from __future__ import annotations

from dataclasses import replace

import pytest

from orla_lg.core.cache.verification import KEEP_ORDERS
from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import Cost, price
from orla_lg.core.record import CallEvent, Happening, Record, RecordBook

EVENT = CallEvent(Happening.QUEUED, 0.0, "w")


def a_record(call: str) -> Record:
    known = {"id": call, "workflow": "w", "stage": "s", "reason": "", "cache_action": "engine", "external": False}
    known["considered"] = known["cache_orders"] = ()
    numbers = dict.fromkeys(("priority", "queue_wait_s", "duration_s", "attempts"), 0)
    return Record(**dict.fromkeys(Record.__slots__) | known | numbers)


@pytest.mark.parametrize(
    ("usage", "cost", "dollars"),
    [
        (None, Cost(1.0, 1.0), None),
        (Usage(10, None, 5), Cost(2.0, 4.0), 40e-6),
        (Usage(10, 4, 5), Cost(2.0, 4.0), 40e-6),
        (Usage(10, 4, 5), Cost(2.0, 4.0, 0.5), 34e-6),
    ],
)
def test_prices(usage: Usage | None, cost: Cost, dollars: float | None) -> None:
    assert price(usage, cost) == (None if dollars is None else pytest.approx(dollars))


def test_the_newest_records_are_kept_and_the_rest_counted() -> None:
    book = RecordBook(2)
    for call in "abc":
        book.add(a_record(call))
    assert [record.id for record in book.records()] == ["b", "c"]
    assert (book.total, book.dropped) == (3, 1)
    assert book.records()[0].asdict()["id"] == "b"


def test_what_became_known_later_is_in_the_record_however_it_is_read() -> None:
    book = RecordBook(2)
    first, second = (replace(a_record(call), cache_orders=()) for call in "ab")
    for each in (first, second):
        book.add(each)
    for nth in range(KEEP_ORDERS + 1):
        book.ordered("a", f"o{nth}")
    assert book.latest(first).cache_orders == tuple(f"o{nth}" for nth in range(1, KEEP_ORDERS + 1))
    late = book.judged("a", True)
    assert late is not None and len(late.orders) == KEEP_ORDERS, "what was read before counts on"
    assert book.find("a").cache_borne_out is True
    book.ordered("b", "flush:freed")
    assert [record.cache_orders[-1] for record in book.records()] == [f"o{KEEP_ORDERS}", "flush:freed"]
    assert book.ordered("stranger", "o") is None and book.judged("stranger", True) is None
    assert book.latest(a_record("c")) == a_record("c"), "not kept any more, or not yet"


def test_a_listener_that_fails_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    book, heard = RecordBook(1), []

    def fails(event: CallEvent) -> None:
        raise RuntimeError("no")

    stops = [book.subscribe(listener) for listener in (fails, heard.append)]
    assert book.heard
    book.tell(EVENT)
    book.tell(EVENT)
    assert caplog.text.count("failed on queued") == 1, "once is enough"
    for stop in stops:
        stop()
    book.tell(EVENT)
    assert heard == [EVENT, EVENT] and not book.heard
