"""The arithmetic of the mapping experiment; the engines are not needed for it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from bench.lib.figures import Rounds
from bench.mapping import __main__ as bench
from bench.mapping import arms
from orla_lg.core.call import NO_HINTS, Ask, Call
from orla_lg.core.identity import Identity
from orla_lg.mappers.commands import Row
from orla_lg.mappers.features import UserPrompt


def rows(count: int) -> list[Row]:
    return [
        Row(UserPrompt(f"{label} {n} " + "word " * n), label, "") for n in range(count) for label in (False, True)
    ]


def asked(text: str) -> Call:
    ask = Ask("auto", [{"role": "user", "content": text}])
    return Call("c", Identity("w", None, "answer"), ask, NO_HINTS, NO_HINTS, 0.0)


def test_blocks_have_the_papers_share_and_no_prompt_twice() -> None:
    blocks = arms.blocks_of(rows(75), 3, 40, (8, 24), random.Random(0))
    assert [sum(not one.is_complex for one in block) for block in blocks] == [17, 17, 17]
    texts = [one.text for block in blocks for one in block]
    assert len(set(texts)) == len(texts) == 120
    assert {(one.is_complex, one.max_tokens) for block in blocks for one in block} == {(False, 8), (True, 24)}


def test_too_few_prompts_are_told() -> None:
    assert len(arms.blocks_of(rows(75), None, 24, (8, 24), random.Random(0))) == 5
    with pytest.raises(SystemExit, match="prompts for 3 blocks of 40, each with 17 simple ones"):
        arms.blocks_of(rows(75), 4, 40, (8, 24), random.Random(0))


def test_folds_hold_every_row_once_and_equal_prompts_together() -> None:
    given = rows(20)
    given.append(given[0])
    folds = arms.folds_of(given)
    assert sorted(n for fold in folds for n in fold) == list(range(41))
    assert [{0, 40} <= {*fold} for fold in folds].count(True) == 1
    assert all(len({given[n].label for n in fold}) == 2 for fold in folds)


def test_chance_draws_the_share_from_each_block() -> None:
    blocks = arms.blocks_of(rows(75), 3, 40, (8, 24), random.Random(0))
    drawn = arms.chosen_by_chance(blocks, random.Random(1))
    assert [sum(one.text in drawn for one in block) for block in blocks] == [17, 17, 17]


def test_a_rule_sends_what_is_simple_to_light() -> None:
    rule = arms.Rule("length", lambda text: len(text) < 4, "light", "heavy")
    assert [rule.map(asked(text), ()).backend for text in ("abc", "abcd")] == ["light", "heavy"]


def test_score_counts_what_a_model_that_can_has_answered() -> None:
    class FakeRecord:
        stage, error, cached_tokens, completion_tokens, cost_usd = "answer", None, 0, 8, 2e-6

        def __init__(self, run: str, backend: str, duration_s: float) -> None:
            self.run, self.backend, self.duration_s = run, backend, duration_s

    requests = {str(n): arms.Request("text", n > 1, 8) for n in range(4)}
    placed = ["light", "heavy", "heavy", "light"]
    run = bench.run_of(
        "labels", 3, 5.0, [FakeRecord(str(n), name, n + 1.0) for n, name in enumerate(placed)], requests
    )
    assert (run.score, run.light_share) == (0.75, 0.5)
    assert (run.completion_s, run.cost_usd, run.answer_tokens) == (2.5, pytest.approx(8e-6), 32)


def test_changes_are_block_by_block_against_all_heavy() -> None:
    one = arms.Run("", 0, 1.0, 1.0, 1.0, 1.0, 0.42, 8, 0)
    walls = {arms.BASE: [10, 20, 10], "labels": [5, 16, 7]}
    made = [replace(one, arm=arm, seed=n, wall_s=wall) for arm, row in walls.items() for n, wall in enumerate(row)]
    runs = Rounds(made)
    assert arms.change(runs, "labels", "wall_s") == pytest.approx((-0.3, -0.5, -0.2))
    assert [line.partition(": ")[2] for line in arms.misses(runs)] == [
        "labels: wall -30%, wanted -38%",
        "labels: completion +0%, wanted -60%",
        "labels: cost +0%, wanted -35%",
    ]
    assert "| labels | 42% | 7.0 | **-30%** (-50% … -20%) |" in arms.report(runs)[3]
