from __future__ import annotations

import pytest

from orla_lg.core.backend import Cost
from orla_lg.core.call import Usage
from orla_lg.core.record import CallEvent, Happening, Record, RecordBook, price

EVENT = CallEvent(Happening.QUEUED, 0.0, "w")


def a_record(call: str) -> Record:
    known = {"id": call, "workflow": "w", "stage": "s", "reason": "", "cache_action": "engine", "external": False}
    known["considered"] = ()
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


def test_a_listener_that_fails_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    book, heard = RecordBook(1), []

    def fails(event: CallEvent) -> None:
        raise RuntimeError("no")

    stops = [book.subscribe(listener) for listener in (fails, heard.append)]
    assert book.heard
    book.tell(EVENT)
    for stop in stops:
        stop()
    book.tell(EVENT)
    assert heard == [EVENT] and not book.heard
    assert "failed on queued" in caplog.text
