"""A replica's calls are watched, and streamed beneath where its engine answers the same both ways."""

from __future__ import annotations

from typing import Any

import pytest

from orla_lg import Backend, Orla
from orla_lg.graph import interception
from orla_lg.openai_api import pair_check
from tests.clients.nodes import inside
from tests.link.real import RealCore
from tests.link.scripted import eventually
from tests.openai_api.raw_engine import MODEL, RawEngine
from tests.openai_api.test_pair_check import DROPS, SAME, TwoWays
from tests.openai_api.test_watched_attempts import ASK, model
from tests.wires.test_watching import Watch


@pytest.mark.parametrize(
    ("settings", "streamed"), [({}, SAME), ({}, DROPS), ({"assemble": True}, SAME), ({"early_tools": False}, SAME)]
)
def test_a_replica_finds_out_for_itself(
    settings: dict[str, bool], streamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches: list[Watch] = []

    def watch_for(*_: Any) -> Watch:
        watches.append(Watch())
        return watches[-1]

    monkeypatch.setattr(interception, "watch_for", watch_for)
    ways = TwoWays(streamed)
    with RawEngine(ways) as engine, RealCore(Backend("main", engine.url, model=MODEL, **settings)) as core:
        with Orla.remote(core.url) as orla:

            def ask() -> Any:
                return inside(orla, lambda: ASK["assembled"](model(engine.url)), tools_safe={"f"})

            found = [ask()]
            agreement = orla.core.clients["main"].agreement
            if not settings:
                eventually(lambda: agreement.found is not None)
            found.append(ask())
            assert [[each["city"] for each in calls] for calls in found] == [["Paris", "Oslo"]] * 2
            stages = [record.stage for record in orla.records()]
        eventually(lambda: not core.serving.book.open_runs())
    if not settings:
        assert ways.pairs == [False, True] and stages.count(pair_check.STAGE) == 2
        assert ways.calls == [False, streamed is SAME]
    else:
        assert not ways.pairs and ways.calls == [settings.get("assemble", False)] * 2
    assert len(watches[-1].calls) == (2 if ways.calls[-1] else 0)
