"""How fast a backend is, from what its calls showed."""

from __future__ import annotations

from orla_lg.core.pace import Pace


def test_streams_show_prefill_and_decoding() -> None:
    pace = Pace()
    pace.note(service_s=3.0, ttft_s=1.0, fresh_tokens=500, completion_tokens=21)
    speed = pace.speed
    assert (speed.service_s, speed.prefill_tokens_per_s, speed.decode_tokens_per_s) == (3.0, 500.0, 10.0)


def test_an_answer_in_one_piece_shows_what_a_token_took_in_all() -> None:
    pace = Pace()
    pace.note(service_s=0.5, ttft_s=None, fresh_tokens=500, completion_tokens=20)
    assert (pace.speed.prefill_tokens_per_s, pace.speed.decode_tokens_per_s) == (None, 40.0)
    pace.note(service_s=0.5, ttft_s=None, fresh_tokens=None, completion_tokens=None)
    assert pace.speed.decode_tokens_per_s == 40.0
