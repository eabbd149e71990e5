"""How fast a backend is, from what its calls showed."""

from __future__ import annotations

from typing import Any

from orla_lg.core.call import Usage
from orla_lg.core.engine.speed import SpeedMeter
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import serve
from tests.core.fakes import Sender, a_serving, new_call, step


class Told(Sender):
    """Brings an answer in one piece, a second after it was sent."""

    def __init__(self, usage: Usage) -> None:
        super().__init__()
        self.usage = usage

    def send(self, inflight: InFlightCall) -> Any:
        inflight.saw(self.usage)
        inflight.services.clock.now += 1.0  # type: ignore[attr-defined]
        return super().send(inflight)


def test_streams_show_prefill_and_decoding() -> None:
    pace = SpeedMeter()
    pace.note(service_s=3.0, prefill_s=1.0, fresh_tokens=500, completion_tokens=21)
    speed = pace.speed
    assert (speed.service_s, speed.prefill_tokens_per_s, speed.decode_tokens_per_s) == (3.0, 500.0, 10.0)


def test_an_engines_own_word_shows_them_too() -> None:
    serving = a_serving()
    steps = serve(new_call(serving), Told(Usage(500, 100, 21, prefill_s=0.5)))
    assert step(steps) == ("answer",)
    speed = serving.schedulers["b"].pace.speed
    assert (speed.prefill_tokens_per_s, speed.decode_tokens_per_s) == (800.0, 40.0)


def test_an_answer_in_one_piece_shows_what_a_token_took_in_all() -> None:
    pace = SpeedMeter()
    pace.note(service_s=0.5, prefill_s=None, fresh_tokens=500, completion_tokens=20)
    assert (pace.speed.prefill_tokens_per_s, pace.speed.decode_tokens_per_s) == (None, 40.0)
    pace.note(service_s=0.5, prefill_s=None, fresh_tokens=None, completion_tokens=None)
    assert pace.speed.decode_tokens_per_s == 40.0
