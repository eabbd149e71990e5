from __future__ import annotations

import pytest

from orla_lg.core.cache.prefix.admission import UNTOLD
from orla_lg.core.cache.prefix.blocks import CachedBlocks
from orla_lg.core.cache.prefix.nodes import PrefixNode
from orla_lg.core.cache.prefix.tree import PrefixTree
from orla_lg.core.call import Ask, Usage
from orla_lg.core.engine.capabilities import BlocksRemoved, BlocksStored
from orla_lg.core.scheduler import BackendScheduler
from tests.core.cache.prefix.test_admission import a_call, a_scheduler, say

BLOCK = 16


def told(call_tokens: int, *, last_before_answer: bool) -> tuple[CachedBlocks, int]:
    """Return the account after a call, and how many calls it still expects blocks of."""
    cache = PrefixTree()
    blocks = CachedBlocks(cache)
    blocks.listening = True
    stay = cache.begin(Ask("m", say("x")), 5.0)
    blocks.began("w", stay)
    hashes = list(range(call_tokens // BLOCK))
    if last_before_answer:
        blocks.apply(BlocksStored(hashes, None, BLOCK, "w"))
    cache.end(stay, call_tokens - 8, 8, 0)
    blocks.ended("w", stay, 0, reached=True)
    expected = len(blocks._late)
    if not last_before_answer:
        blocks.apply(BlocksStored(hashes, None, BLOCK, "w"))
    blocks.check_integrity()
    return blocks, expected


@pytest.mark.parametrize(("last_before_answer", "expected"), [(True, 0), (False, 1)])
def test_a_call_is_waited_for_until_its_last_block_is_told(last_before_answer: bool, expected: int) -> None:
    blocks, late = told(70, last_before_answer=last_before_answer)
    assert late == expected and not blocks._late and not blocks._calls


@pytest.mark.parametrize("tip_is_gone", [False, True])
def test_what_an_answer_was_generated_as_is_nothing_once_it_came_back_in_other_tokens(tip_is_gone: bool) -> None:
    cache = PrefixTree()
    blocks = CachedBlocks(cache)
    blocks.listening = True
    messages = say("x", "why?")
    first = cache.begin(Ask("m", messages), 40.0)
    blocks.began("w", first)
    blocks.apply(BlocksStored(["prompt", "begin", "thought", "more"], None, BLOCK, "w"))
    cache.end(first, 20, 50, 0)
    blocks.ended("w", first, 0, reached=True)
    if tip_is_gone:
        blocks.apply(BlocksRemoved(["more"]))
    again = say("x", "why?", "because", "and then?")
    second = cache.begin(Ask("m", again), 10.0)
    blocks.began("w", second)
    blocks.apply(BlocksStored(["said", "asked"], "begin", BLOCK, "w"))
    cache.end(second, 60, 5, 32)
    blocks.ended("w", second, 32, reached=True)
    claimed = cache.there_tokens(Ask("m", again))
    assert claimed == pytest.approx(60)
    blocks.apply(BlocksRemoved(["thought"] if tip_is_gone else ["more", "thought"]))
    assert cache.there_tokens(Ask("m", again)) == pytest.approx(60)
    blocks.check_integrity()
    blocks.apply(BlocksRemoved(["asked"]))
    assert cache.there_tokens(Ask("m", again)) == pytest.approx(48)
    blocks.apply(BlocksRemoved(["said"]))
    assert cache.there_tokens(Ask("m", again)) == pytest.approx(32)
    blocks.check_integrity()


def filled_by(scheduler: BackendScheduler, workflow: str, text: str, tokens: int) -> list[PrefixNode]:
    queued = scheduler.enter(
        a_call(scheduler, workflow, say("be nice", text)), order=None, running=False, holds_grant=False
    )
    path = scheduler.cache.gate._entries[queued].stay.path
    scheduler.leave(queued, usage=Usage(tokens, 10, 0), tokens=tokens + 10, followed=lambda: True)
    return path


@pytest.mark.parametrize("listening", [False, True])
def test_where_the_engine_tells_nothing_is_given_up_because_something_must_be(listening: bool) -> None:
    scheduler, _ = a_scheduler(1_000)
    scheduler.cache.gate.blocks.listening = listening
    first = filled_by(scheduler, "first", "a" * 2_000, 600)
    filled_by(scheduler, "second", "b" * 2_000, 600)
    assert first[-1].alive is listening
    for number in range(5):  # no event ever comes: a bound holds even so
        filled_by(scheduler, f"more {number}", f"{number}" * 2_000, 600)
    assert scheduler.cache.gate.cache.tokens <= UNTOLD * 1_000 and not first[-1].alive


@pytest.mark.parametrize("told_by_events", [False, True])
def test_where_the_engine_tells_an_answer_says_nothing_of_others(told_by_events: bool) -> None:
    cache = PrefixTree(told=told_by_events)

    def call(name: str) -> list[PrefixNode]:
        stay = cache.begin(Ask("m", say("be nice", name * 2_000)), 5.0)
        cache.end(stay, 600, 5, cached_tokens=0)
        return stay.path

    older = call("a")
    call("b")
    call("b")  # gone, though it was used after the other
    assert older[-1].alive is told_by_events
