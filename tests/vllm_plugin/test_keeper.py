"""What is kept, pinned, released and flushed, on a pool as vLLM's."""

from __future__ import annotations

import pytest

from orla_lg_vllm.bands import Band
from tests.vllm_plugin.pool import FakeEngine

DEAD, SPARE, TOOL, HISTORY, SYSTEM, PINNED = Band


@pytest.fixture
def engine() -> FakeEngine:
    """A pool of 32 blocks."""
    return FakeEngine()


def bands(engine: FakeEngine, words: str) -> list[Band]:
    """Return where the cached blocks of a prompt now stand."""
    found = [engine.pool.found["/".join(words[: n + 1]).encode()] for n in range(engine.cached(words))]
    return [engine.keeper.ledger.band(block) for block in found]


def crowd(engine: FakeEngine, count: int, of: int = 4) -> None:
    """Let *count* other workflows pass by, each with *of* blocks of its own."""
    for number in range(count):
        engine._names += 1
        request = engine.start(f"crowd{engine._names}", [f"{engine._names}.{n}" for n in range(of)])
        assert request is not None, number
        engine.end(request)
    engine.keeper.check_integrity()


# Later turns ----------------------------------------------------------------------------------------------


def test_what_only_an_earlier_call_of_the_stage_had_is_dead(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    engine.ask("w", "abxy")
    assert bands(engine, "abcd") == [HISTORY, HISTORY, DEAD, DEAD]
    assert bands(engine, "abxy") == [HISTORY] * 4
    engine.keeper.check_integrity()


def test_another_stage_or_workflow_makes_nothing_obsolete(engine: FakeEngine) -> None:
    engine.ask("w", "abcd", stage="plan")
    engine.ask("w", "abxy", stage="write")
    engine.ask("v", "abzz", stage="plan")
    assert bands(engine, "abcd") == [HISTORY] * 4


def test_a_turn_that_goes_back_to_what_was_dead_revives_it(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    engine.ask("w", "abxy")
    assert engine.ask("w", "abcd") == 4
    assert bands(engine, "abcd") == [HISTORY] * 4
    assert bands(engine, "abxy") == [HISTORY, HISTORY, DEAD, DEAD]


def test_branches_of_a_stage_each_follow_their_own(engine: FakeEngine) -> None:
    one, two = engine.start("w", "sabc"), engine.start("w", "sxyz")
    assert one is not None and two is not None
    engine.end(one)
    engine.end(two)
    assert bands(engine, "sabc") == bands(engine, "sxyz") == [HISTORY] * 4
    engine.ask("w", "sabcd")
    assert bands(engine, "sxyz") == [HISTORY] * 4  # only the branch that went on took its own place
    engine.ask("w", "sxyq")
    assert bands(engine, "sabcd") == [HISTORY] * 5
    assert bands(engine, "sxyz") == [HISTORY, HISTORY, HISTORY, DEAD]


def test_a_call_that_was_cut_off_makes_nothing_obsolete(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    cut = engine.start("w", "abxy")
    assert cut is not None
    engine.end(cut, whole=False)
    assert bands(engine, "abcd") == bands(engine, "abxy") == [HISTORY] * 4
    engine.ask("w", "abxyz")
    assert engine.keeper.ledger.statistics("w").blocks == 7
    engine.keeper.check_integrity()


# Bands ----------------------------------------------------------------------------------------------------


def test_under_pressure_tool_outputs_go_first_then_history_then_system_prompts(engine: FakeEngine) -> None:
    engine.ask("w", "smto", (SYSTEM, HISTORY, TOOL, TOOL))
    engine.ask("v", "sn", (SYSTEM, HISTORY))
    assert bands(engine, "smto") == [SYSTEM, HISTORY, TOOL, TOOL]
    crowd(engine, 7)  # 28 blocks beside the 5 of these: one too many
    assert engine.cached("smto") == 3
    crowd(engine, 7)
    assert (engine.cached("smto"), engine.cached("sn")) == (1, 1)


def test_a_system_prompt_that_only_one_workflow_has_is_history(engine: FakeEngine) -> None:
    engine.ask("w", "sm", (SYSTEM, HISTORY))
    assert bands(engine, "sm") == [HISTORY, HISTORY]
    engine.ask("v", "sn", (SYSTEM, HISTORY))
    assert bands(engine, "sm") == [SYSTEM, HISTORY]
    engine.order("flush", "v")
    assert bands(engine, "sm") == [HISTORY, HISTORY]
    engine.keeper.check_integrity()


def test_calls_without_a_workflow_compete_as_history_and_nobody_flushes_theirs(engine: FakeEngine) -> None:
    engine.ask("", "abc")
    engine.ask("w", "abd")
    assert engine.order("flush", "w")["freed_blocks"] == 1
    assert engine.cached("abc") == 3 and bands(engine, "abc") == [HISTORY] * 3
    assert engine.order("flush", "")["effect"] == "freed" and engine.cached("abc") == 3


def test_a_call_that_nobody_will_come_back_for_is_the_first_to_go(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    engine.ask("v", "efgh", keep_s=0.0)
    crowd(engine, 7)
    assert (engine.cached("abcd"), engine.cached("efgh")) == (4, 0)


# Pins -----------------------------------------------------------------------------------------------------


def test_a_pin_withstands_pressure_until_its_time_is_over(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    engine.ask("v", "efgh")
    told = engine.order("pin", "w", ttl_s=100.0)
    assert (told["effect"], told["pinned_blocks"], told["left_out_blocks"]) == ("pinned", 4, 0)
    crowd(engine, 12)
    assert (engine.cached("abcd"), engine.cached("efgh")) == (4, 0)
    engine.now_s += 100.0
    crowd(engine, 12)
    assert engine.cached("abcd") == 0 and not engine.keeper.ledger.knows("w")


def test_a_pinned_block_is_taken_when_nothing_else_is_free(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    engine.order("pin", "w")
    big = engine.start("v", [f"v{n}" for n in range(32)])
    assert big is not None and engine.cached("abcd") == 0
    assert engine.keeper.ledger.pinned_blocks == 0
    engine.keeper.check_integrity()


def test_pins_beyond_half_of_the_pool_are_refused_and_those_there_stay(engine: FakeEngine) -> None:
    first, second = "abcdefghijkl", "ABCDEFGH"
    engine.ask("w", first)
    engine.ask("v", second)
    assert engine.order("pin", "w")["pinned_blocks"] == 12
    told = engine.order("pin", "v")
    assert (told["effect"], told["pinned_blocks"], told["left_out_blocks"]) == ("pinned", 4, 4)
    assert told["reason"] == "4 blocks were left out: at most 16 of the pool may be pinned"
    engine.ask("u", "123")
    assert engine.order("pin", "u")["effect"] == "failed"
    crowd(engine, 12)
    assert (engine.cached(first), engine.cached(second), engine.cached("123")) == (12, 4, 0)
    engine.keeper.check_integrity()


def test_a_call_may_pin_what_it_leaves_and_the_next_one_decides_anew(engine: FakeEngine) -> None:
    engine.ask("w", "abcd", keep_s=60.0)
    assert bands(engine, "abcd") == [PINNED] * 4
    engine.ask("w", "abcde")
    assert bands(engine, "abcde") == [HISTORY] * 5


def test_a_pinned_workflow_stays_pinned_while_it_grows(engine: FakeEngine) -> None:
    engine.ask("w", "ab")
    engine.order("pin", "w", ttl_s=500.0)
    engine.ask("w", "abcd")
    assert bands(engine, "abcd") == [PINNED] * 4
    engine.order("release", "w")
    assert bands(engine, "abcd") == [DEAD] * 4


def test_the_last_word_on_a_pin_counts(engine: FakeEngine) -> None:
    engine.ask("w", "ab", keep_s=900.0)
    engine.order("pin", "w", ttl_s=5.0)
    engine.now_s += 6.0
    assert engine.order("stat")["pinned_blocks"] == 0


def test_a_pin_of_nothing_fails_and_one_of_a_running_call_is_deferred(engine: FakeEngine) -> None:
    told = engine.order("pin", "w", ttl_s=9.0)
    assert told["effect"] == "failed" and told["reason"] == "nothing of this workflow is in the cache"
    running = engine.start("w", "abc")
    assert running is not None
    assert engine.order("pin", "w", ttl_s=9.0)["effect"] == "deferred"
    engine.end(running)
    assert bands(engine, "abc") == [PINNED] * 3


# Release and flush ----------------------------------------------------------------------------------------


def test_a_released_workflow_is_found_until_room_is_needed_and_counts_again_when_it_returns(
    engine: FakeEngine,
) -> None:
    engine.ask("v", "efgh")
    engine.ask("w", "abcd")
    assert engine.order("release", "w")["effect"] == "demoted"
    crowd(engine, 7)
    assert (engine.cached("abcd"), engine.cached("efgh")) == (0, 4)
    engine.ask("w", "abcd")
    engine.order("release", "w")
    assert engine.ask("w", "abcd") == 4
    assert bands(engine, "abcd") == [HISTORY] * 4


def test_a_flush_frees_what_nobody_else_has(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    engine.ask("v", "abxy")
    told = engine.order("flush", "w")
    assert (told["effect"], told["freed_blocks"], told["shared_blocks"]) == ("freed", 2, 2)
    assert (engine.cached("abcd"), engine.cached("abxy")) == (2, 4)
    assert not engine.keeper.ledger.knows("w")
    engine.keeper.check_integrity()


def test_a_flush_frees_what_is_dead_or_released_too(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    engine.ask("w", "wxyz")
    engine.order("release", "w")
    assert engine.order("flush", "w")["freed_blocks"] == 8
    assert engine.cached("abcd") == engine.cached("wxyz") == 0


def test_a_flush_while_the_workflow_runs_takes_effect_when_it_ends(engine: FakeEngine) -> None:
    engine.ask("w", "ab")
    running = engine.start("w", "abcd")
    assert running is not None
    told = engine.order("flush", "w")
    assert (told["effect"], told["freed_blocks"], told["deferred_blocks"]) == ("deferred", 0, 4)
    assert engine.cached("abcd") == 4
    engine.end(running)
    assert engine.cached("abcd") == 0 and not engine.keeper.ledger.knows("w")
    assert engine.ask("w", "abcd") == 0
    assert engine.cached("abcd") == 4  # what came after the order is not its business


def test_a_flush_leaves_what_another_workflows_running_call_holds(engine: FakeEngine) -> None:
    engine.ask("w", "abcd")
    running = engine.start("v", "abxy")
    assert running is not None and running.hits == 2
    told = engine.order("flush", "w")
    assert (told["effect"], told["freed_blocks"], told["shared_blocks"]) == ("freed", 2, 2)
    engine.end(running)
    assert engine.cached("abxy") == 4 and bands(engine, "abxy") == [HISTORY] * 4


def test_a_release_while_the_workflow_runs_holds_for_what_it_leaves(engine: FakeEngine) -> None:
    running = engine.start("w", "abcd")
    assert running is not None
    assert engine.order("release", "w")["effect"] == "deferred"
    engine.end(running)
    assert bands(engine, "abcd") == [DEAD] * 4


# The whole ------------------------------------------------------------------------------------------------


def test_owners_are_forgotten_with_their_blocks(engine: FakeEngine) -> None:
    for number in range(300):
        engine.ask(f"w{number}", ["s", f"{number}a", f"{number}b"], stage=f"stage{number % 7}")  # type: ignore[arg-type]
    ledger = engine.keeper.ledger
    assert len(list(ledger.workflows())) <= 33 and len(ledger._holdings) <= 32
    engine.keeper.check_integrity()


def test_an_emptied_cache_is_as_new(engine: FakeEngine) -> None:
    engine.ask("w", "abcd", keep_s=50.0)
    engine.pool.evict_blocks(set(range(33)))
    engine.keeper.emptied()
    engine.keeper.check_integrity()
    assert engine.order("stat")["pinned_blocks"] == 0 and engine.order("stat", "w")["blocks"] == 0
    assert engine.ask("w", "abcd") == 0


def test_a_keeper_given_up_is_a_plain_list(engine: FakeEngine) -> None:
    engine.ask("w", "ab", keep_s=50.0)
    engine.ask("v", "cd")
    engine.keeper.give_up()
    for words in ("ef", "gh"):
        request = engine.start("u", words)
        assert request is not None
        engine.pool.free_blocks(reversed(request.blocks))
    assert engine.cached("ef") == 2


def test_stat_tells_bands_owners_and_hits(engine: FakeEngine) -> None:
    engine.ask("w", "smt", (SYSTEM, HISTORY, TOOL))
    engine.ask("v", "sn", (SYSTEM, HISTORY))
    engine.order("pin", "v", ttl_s=10.0)
    told = engine.order("stat")
    assert told["blocks"] == 32 and told["free_blocks"] == 32 and told["workflows"] == 2
    assert told["bands"] == {"dead": 0, "spare": 0, "tool": 1, "history": 1, "system": 0, "pinned": 2}
    assert (told["pinned_blocks"], told["pin_budget_blocks"], told["reused_blocks"]) == (2, 16, 1)
    told = engine.order("stat", "w")
    assert (told["blocks"], told["shared_blocks"], told["resident_tokens"]) == (3, 1, 48)
