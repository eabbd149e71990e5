"""A thread that is moved between two real llama.cpp servers of one folder finds its cache at the other one."""

from __future__ import annotations

import pytest

from bench.move.__main__ import COLD, RESTORED, WARMED, turn, two_engines

pytestmark = [pytest.mark.engines, pytest.mark.timeout(280)]


def test_what_was_saved_here_is_restored_there_and_else_prefilled() -> None:
    with two_engines(2048) as urls:
        restored, warmed, cold = (turn(arm, urls, 0, 600, 6.0) for arm in (RESTORED, WARMED, COLD))
    for each in (restored, warmed, cold):
        assert each.record.backend == "new" and each.record.reason.startswith("moved from 'old'")
    assert restored.record.cache_action == "restored"
    assert (restored.record.cached_tokens or 0) > 500
    assert (warmed.record.cached_tokens or 0) > 150, "on a machine that is busy the call came before it was done"
    assert (cold.record.cached_tokens or 0) < 100
    assert max(restored.ttft_ms, warmed.ttft_ms) < cold.ttft_ms
