"""bench/observe: a round of it, and what its report says."""

from __future__ import annotations

import sys

import pytest

from bench.observe import __main__ as bench


def test_a_round_has_every_arm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.observe", "--rounds", "1", "--calls", "20"])
    assert bench.main() in (0, 1), "one round judges nothing"
    said = capsys.readouterr().out
    for arm in (*bench.ARMS, bench.BareSpan.name):
        assert f"| {arm} | " in said
    assert "the goal is 60" in said and "a scrape of 10 stages takes" in said
