from __future__ import annotations

import threading

from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import Capability, Probe, Support
from orla_lg.core.inflight import ABANDONED, InFlightCall, grants_held
from orla_lg.core.lifecycle import serve
from orla_lg.core.serving import Serving
from orla_lg.core.steps import drive
from tests.core.fakes import Sender, a_serving, identity, is_quiet, new_call


def flying(serving: Serving, **call: object) -> InFlightCall:
    return drive(serve(new_call(serving, **call), Sender("stream")))


def test_what_the_edge_asks() -> None:
    serving = a_serving(probe=Probe(slots=1, capabilities={Capability.STREAM_USAGE: Support.FLAG}))
    inflight = flying(serving)
    assert (inflight.external, inflight.backend, inflight.model, inflight.counts_streams) == (False, "b", "m", False)
    assert inflight.request_fields() == {
            "workflow": "w", "priority": 0.0, "slot": 0, "fresh": False, "stage": "node", "keep_s": 0.0,
            "cache_salt": "",
        }  # fmt: skip
    inflight.finish()


def test_the_record_says_what_happened() -> None:
    serving = a_serving()
    inflight = flying(serving)
    serving.clock.now += 2.0
    for _ in range(2):
        inflight.first_token()
        serving.clock.now += 1.0
    inflight.saw(Usage(10, 4, 5))
    inflight.finish()
    record = inflight.record
    assert (record.ttft_s, record.duration_s, record.queue_wait_s) == (2.0, 4.0, 0.0)
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens, record.cost_usd) == (10, 4, 5, 0.0)


def test_the_ledger_learns_the_tokens_the_engine_counted() -> None:
    serving = a_serving()
    serving.progress.run_started("r", thread=None)
    inflight = flying(serving, who=identity("r", run="r"))
    inflight.saw(Usage(10, None, 5))
    inflight.finish()
    assert serving.schedulers["b"].statistics().memory.tokens == 15


def test_only_the_first_end_counts_in_any_thread() -> None:
    serving = a_serving()
    inflight = flying(serving)
    assert grants_held() == {"b"}
    ends = [threading.Thread(target=inflight.finish, args=(ABANDONED,)) for _ in range(8)]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    inflight.finish()
    assert [r.error for r in serving.records.records()] == [ABANDONED]
    assert grants_held() == set() and is_quiet(serving)


def test_an_error_is_cut_short() -> None:
    serving = a_serving()
    inflight = flying(serving)
    inflight.finish(ValueError("x" * 1000))
    assert inflight.record.error.startswith("ValueError: xx") and len(inflight.record.error) == 500
