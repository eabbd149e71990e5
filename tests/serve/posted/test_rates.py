"""So many calls a second, and no more; what waits goes when it may."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from orla_lg.serve.posted.rates import RateBucket
from tests.serve.fixtures import until
from tests.serve.in_thread import server
from tests.serve.posted.test_applying import backend, chat, put, ready
from tests.stub_engine import StubEngine


@given(
    st.floats(0.1, 50),
    st.lists(st.tuples(st.floats(0, 2), st.integers(0, 3)), min_size=1, max_size=40),
)
def test_in_no_time_more_is_granted_than_the_rate_and_one_second_s_worth(
    rate: float, steps: list[tuple[float, int]]
) -> None:
    bucket, now, granted = RateBucket(rate, max(1.0, rate), 0.0, 0), 0.0, 0
    times: list[float] = []
    for pause_s, wanted in steps:
        now += pause_s
        for _ in range(wanted):
            if bucket.is_open(now, granted):
                granted += 1
                times.append(now)
        if not bucket.is_open(now, granted):
            now += bucket.wait_s
            assert bucket.is_open(now + 1e-9, granted)  # it is not looked at in vain
    for first, began_s in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= max(1.0, rate) + (times[last] - began_s) * rate + 1e-6


def test_a_rate_holds_while_calls_wait_and_ends_with_the_next_change(engine: StubEngine) -> None:
    with server() as running:
        ready(running)
        put(running, backend("light", engine, max_concurrency=50, rate_per_second=4.0))
        began_s = time.monotonic()
        with ThreadPoolExecutor(10) as calling:
            calls = [calling.submit(chat, running, "", "light") for _ in range(7)]
            until(lambda: sum(call.done() for call in calls) >= 4)
            assert all(call.result(10).status_code == 200 for call in calls)
        assert time.monotonic() - began_s >= 0.7  # four at once, then one in each quarter
        put(running, backend("light", engine, max_concurrency=50, rate_per_second=0.1))
        assert chat(running, model="light").status_code == 200
        with ThreadPoolExecutor(1) as calling:
            call = calling.submit(chat, running, "", "light")
            until(lambda: running.orla.core.serving.schedulers["light"].queue.waiting == 1)
            put(running, backend("light", engine, max_concurrency=50))
            assert call.result(5).status_code == 200
