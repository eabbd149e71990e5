"""What workflows hold: alone, shared, left behind; and what becomes of it when the engine does something for them."""

from __future__ import annotations

from orla_lg.core.cache.prefix.eviction import Eviction, EvictionBand, EvictionOrder
from orla_lg.core.cache.prefix.references import References
from orla_lg.core.cache.prefix.tree import PrefixTree
from orla_lg.core.call import Ask
from orla_lg.core.memory.events import Doing

SYSTEM = "p" * 393


class UsageAccount:
    """A cache with its claims, and calls that take no time."""

    def __init__(self, order: Eviction = Eviction.LRU) -> None:
        self.cache = PrefixTree(eviction_order=EvictionOrder(order))
        self.references = References(self.cache)
        self.now = 0.0

    def call(self, workflow: str, *texts: str, stage: str = "agent") -> None:
        """A prompt whose messages count a hundred tokens each, and an answer of ten."""
        said = [{"role": "system", "content": SYSTEM}]
        said += [{"role": "user", "content": f"{workflow} {text}".ljust(395)} for text in texts]
        self.now += 1
        handle = self.cache.begin(Ask("auto", said), 10.0)
        self.references.enter(workflow, 0.0)
        self.cache.end(handle, 100 * len(said), 10)
        self.references.leave(workflow, stage, handle.answer, self.now, followed=True)
        self.check()

    def check(self) -> None:
        self.cache.check_integrity()
        self.references.check_integrity()

    def numbers(self, workflow: str) -> tuple[int, int, int]:
        holding = self.references.holding(workflow)
        assert holding is not None and holding.shared_tokens == holding.tokens - holding.alone_tokens
        return holding.tokens, holding.alone_tokens, holding.obsolete_tokens


def two() -> UsageAccount:
    account = UsageAccount()
    account.call("u", "one")
    account.call("v", "one")
    return account


def test_what_two_workflows_begin_with_is_shared() -> None:
    account = two()
    assert account.numbers("u") == account.numbers("v") == (210, 110, 0)
    account.references.forget("v")
    assert account.numbers("u") == (210, 210, 0) and account.cache.eviction_order.obsolete_tokens == 110
    account.check()


def test_a_stage_of_ones_own_is_nobody_else() -> None:
    account = two()
    account.call("u", "two", stage="writer")
    assert account.numbers("u") == (320, 220, 0)
    account.references.forget("v")
    assert account.numbers("u") == (320, 320, 0)


def test_a_later_turn_makes_obsolete_what_it_does_not_contain() -> None:
    account = two()
    account.call("u", "one", "more")
    assert account.numbers("u") == (310, 210, 10), "an answer that did not come back"
    account.call("u", "other")
    assert account.numbers("u") == (210, 110, 220) and account.cache.eviction_order.obsolete_tokens == 220
    account.call("u", "one")
    assert account.numbers("u")[2] == 230, "the question that it went back to is not"
    account.check()


def test_released_workflows_still_own_what_is_there() -> None:
    account = two()
    account.references.release("u")
    assert account.numbers("u") == account.numbers("v") == (210, 110, 0)
    account.check()


def test_a_flush_frees_what_the_workflow_had_alone_and_nothing_else() -> None:
    account = two()
    account.call("u", "other")
    account.references.freed("u")
    account.check()
    assert account.references.holding("u") is None and account.cache.tokens == 210
    assert account.numbers("v") == (210, 210, 0)
    account.references.freed("nobody")


def test_a_flush_spares_what_a_call_in_flight_uses() -> None:
    account = two()
    said = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "u one".ljust(395)}]
    handle = account.cache.begin(Ask("auto", said), 10.0)
    account.references.enter("u", 0.0)
    account.references.freed("u")
    assert all(piece.alive for piece in handle.path)
    account.cache.end(handle, 200, 10)
    account.references.leave("u", "agent", handle.answer, 9.0, followed=True)
    account.check()
    assert account.numbers("u") == (210, 110, 0)


def test_demoted_goes_first_and_pinned_last() -> None:
    account = two()
    account.call("w", "one")
    account.references.pinned("u", until_s=100.0)
    account.references.demoted("w")
    account.check()
    account.cache.shrink(330.0)
    assert account.numbers("w") == (100, 0, 0) and account.numbers("v") == (210, 110, 0)
    account.cache.shrink(220.0)
    assert account.numbers("v") == (100, 0, 0) and account.numbers("u") == (210, 110, 0), "though it is the oldest"
    account.check()


def test_a_pin_covers_the_next_turn_and_ends_in_time() -> None:
    account = two()
    account.references.pinned("u", until_s=10.0)
    account.call("u", "one", "more")
    bands = [piece.band for piece in account.references.by_workflow["u"].leaves["agent"].path()]
    assert set(bands) == {EvictionBand.PINNED}
    account.references.expire(9.9)
    assert account.references.by_workflow["u"].pinned
    account.references.expire(10.0)
    account.check()
    assert all(piece.band is EvictionBand.USUAL for piece in account.cache.eviction_order)


def test_a_banded_engine_loses_the_dead_first() -> None:
    account = UsageAccount(Eviction.BANDED)
    account.call("u", "one")
    account.call("v", "one")
    account.call("v", "two")
    account.cache.shrink(account.cache.tokens - 110)
    assert account.numbers("u") == (210, 110, 0) and account.numbers("v") == (210, 110, 0), "though it is younger"
    account.check()


def test_nothing_is_left_of_an_engine_that_was_lost() -> None:
    account = two()
    account.references.pinned("u", until_s=100.0)
    account.references.forget_all()
    account.cache.clear()
    account.check()
    assert (
        account.references.holdings() == [] and account.cache.tokens == 0 and not account.cache.eviction_order.missed
    )


def test_what_is_old_is_forgotten() -> None:
    account = UsageAccount()
    account.call("u", "one")
    account.call("v", "one")
    account.now = 50.0
    account.references.turned("v", Doing.HUMAN, account.now)
    account.call("w", "one")
    account.references.forget("w")
    account.references.forget_older_than(40.0)
    account.check()
    assert [each.workflow for each in account.references.holdings()] == ["v"]
    holding = account.references.holdings()[0]
    assert (holding.doing, holding.since_s, holding.tokens) == (Doing.HUMAN, 50.0, 210)
    account.call("x", "one")
    account.references.forget("x")
    account.references.forget_older_than(90.0)
    account.check()
    assert account.cache.tokens == 210, "what nobody owns goes with its age, which is known to ten seconds"
