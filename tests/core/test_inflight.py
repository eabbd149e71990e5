from __future__ import annotations

import threading

from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import Capability, Probe, Support
from orla_lg.core.inflight import ABANDONED, Flight, grants_held
from orla_lg.core.serving import Serving
from orla_lg.core.steps import drive
from tests.core.fakes import Sender, a_serving, identity, is_quiet, new_call


def flying(serving: Serving, **call: object) -> Flight:
    return drive(serving.steps(new_call(serving, **call), Sender("stream")))


def test_what_the_edge_asks() -> None:
    serving = a_serving(probe=Probe(slots=1, capabilities={Capability.STREAM_USAGE: Support.FLAG}))
    flight = flying(serving)
    assert (flight.external, flight.backend, flight.model, flight.counts_streams) == (False, "b", "m", False)
    assert flight.request_fields() == {
            "workflow": "w", "priority": 0.0, "slot": 0, "fresh": False, "stage": "node", "keep_s": 0.0,
            "cache_salt": "",
        }  # fmt: skip
    flight.finish()


def test_the_record_says_what_happened() -> None:
    serving = a_serving()
    flight = flying(serving)
    serving.clock.now += 2.0
    for _ in range(2):
        flight.first_token()
        serving.clock.now += 1.0
    flight.saw(Usage(10, 4, 5))
    flight.finish()
    record = flight.record
    assert (record.ttft_s, record.duration_s, record.queue_wait_s) == (2.0, 4.0, 0.0)
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens, record.cost_usd) == (10, 4, 5, 0.0)


def test_the_ledger_learns_the_tokens_the_engine_counted() -> None:
    serving = a_serving()
    serving.progress.run_started("r", thread=None)
    flight = flying(serving, who=identity("r", run="r"))
    flight.saw(Usage(10, None, 5))
    flight.finish()
    assert serving.desks["b"].statistics().memory.tokens == 15


def test_only_the_first_end_counts_in_any_thread() -> None:
    serving = a_serving()
    flight = flying(serving)
    assert grants_held() == {"b"}
    ends = [threading.Thread(target=flight.finish, args=(ABANDONED,)) for _ in range(8)]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    flight.finish()
    assert [r.error for r in serving.records.records()] == [ABANDONED]
    assert grants_held() == set() and is_quiet(serving)


def test_an_error_is_cut_short() -> None:
    serving = a_serving()
    flight = flying(serving)
    flight.finish(ValueError("x" * 1000))
    assert flight.record.error.startswith("ValueError: xx") and len(flight.record.error) == 500
