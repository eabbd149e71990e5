from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orla_lg.core.cache.prefix import eviction, tree
from orla_lg.core.cache.prefix.eviction import Eviction, EvictionOrder, PrefixNode
from orla_lg.core.cache.prefix.tree import CacheHandle, PrefixTree
from orla_lg.core.call import Ask

Said = tuple[str, str]
"""Role and text."""

PER_CHAR = 0.25


def ask(*said: Said) -> Ask:
    return Ask("auto", [{"role": role, "content": text} for role, text in said])


def chat(*texts: str) -> Ask:
    """A system message, then user and assistant by turns."""
    return ask(*turns(texts))


def turns(texts: tuple[str, ...] | list[str]) -> tuple[Said, ...]:
    return tuple(("system" if not n else "user" if n % 2 else "assistant", text) for n, text in enumerate(texts))


@dataclass(eq=False)
class Known:
    """What the naive model knows of a prefix."""

    tokens: float
    filled: bool = False
    alive: bool = True
    used: int = 0
    """When it was used last."""
    said: dict[str, Known | None] = field(default_factory=dict)
    """The answers given after it by whom they were given to; ``None``: one that has a name, or several."""


@dataclass(eq=False)
class Flying:
    """A call in flight, in the naive model and in the real one."""

    prompt_owner: str
    texts: tuple[Said, ...]
    path: list[Known]
    answer: Known
    handle: CacheHandle

    @property
    def all(self) -> list[Known]:
        return [*self.path, self.answer]


class ResidencyMachine(RuleBasedStateMachine):
    """``PrefixTree`` against a list of prefixes, the time of their last use, and sets."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixTree(tokens_per_char=PER_CHAR)
        self.known: dict[tuple[Said, ...], Known] = {}
        self.nameless: list[Known] = []
        self.flying: list[Flying] = []
        self.ended: list[Flying] = []
        self.claimed: list[Flying] = []
        self.times = itertools.count(1)

    # The model

    def find(self, prompt_owner: str, texts: tuple[Said, ...]) -> list[Known]:
        found: list[Known] = []
        for length in range(1, len(texts) + 1):
            one = self.known.get(texts[:length])
            if one is None and found and texts[length - 1][0] == "assistant":
                one = found[-1].said.get(prompt_owner)
            if one is None or not one.alive:
                break
            found.append(one)
        return found

    def living(self) -> list[Known]:
        return [one for one in (*self.known.values(), *self.nameless) if one.alive]

    def in_use(self) -> set[Known]:
        return {one for each in self.flying for one in each.all}

    def wanted(self) -> set[Known]:
        return self.in_use() | {one for each in self.claimed for one in each.all}

    def idle(self) -> list[Known]:
        return sorted(set(self.living()) - self.in_use(), key=lambda one: one.used)

    def drop(self, one: Known) -> None:
        one.alive = False
        self.known = {prefix: each for prefix, each in self.known.items() if each is not one}
        self.nameless = [each for each in self.nameless if each is not one]

    def land(self, flown: Flying) -> None:
        self.flying.remove(flown)
        for one in reversed(flown.all):
            if one not in self.in_use():
                one.used = next(self.times)

    # What happens

    @rule(
        prompt_owner=st.sampled_from("vw"), texts=st.lists(st.sampled_from(["a", "b" * 40]), max_size=6),
        answer=st.integers(0, 30),
    )  # fmt: skip
    def begin(self, prompt_owner: str, texts: list[str], answer: int) -> None:
        self.ask(prompt_owner, turns(texts), answer)

    @precondition(lambda self: self.ended)
    @rule(data=st.data(), prompt_owner=st.sampled_from("vw"), said=st.sampled_from(["yes", "no"]))
    def answer_comes_back(self, data: st.DataObject, prompt_owner: str, said: str) -> None:
        before = data.draw(st.sampled_from(self.ended))
        self.ask(prompt_owner, (*before.texts, ("assistant", said), ("user", "and then?")), 8)

    def ask(self, prompt_owner: str, texts: tuple[Said, ...], answer_tokens: float) -> None:
        prompt, found = ask(*texts), self.find(prompt_owner, texts)
        assert [piece.tokens for piece in self.cache.find(prompt, prompt_owner)] == [one.tokens for one in found]
        enough = self.enough(found)
        use, want = self.cache.adds(prompt, answer_tokens, prompt_owner)
        used, wanted = self.cache.in_use_tokens + use, self.cache.wanted_tokens + want
        handle = self.cache.begin(prompt, answer_tokens, prompt_owner)
        assert (self.cache.in_use_tokens, self.cache.wanted_tokens) == pytest.approx((used, wanted))
        assert handle.expected_tokens == pytest.approx(sum(one.tokens for one in found if one.filled))
        path = self.begin_in_model(prompt_owner, texts, found)
        assert len(handle.fresh) == len(path) - len(found)
        if enough:
            more = answer_tokens + sum(piece.tokens for piece in handle.fresh)
            assert enough + more <= handle.enough_tokens + 1e-6, "an engine of that size may have lost it"
            assert handle.enough_tokens <= self.cache.tokens + 1e-6
        answer = Known(answer_tokens)
        self.nameless.append(answer)
        self.flying.append(Flying(prompt_owner, texts, path, answer, handle))

    def begin_in_model(self, prompt_owner: str, texts: tuple[Said, ...], found: list[Known]) -> list[Known]:
        path = list(found)
        for length in range(1, len(texts) + 1):
            if length > len(found):
                role, text = texts[length - 1]
                path.append(Known(PER_CHAR * len(f"{role}\n{text}")))
            elif texts[:length] not in self.known:
                self.nameless.remove(path[length - 1])
                path[length - 2].said[prompt_owner] = None
            self.known[texts[:length]] = path[length - 1]
        return path

    def enough(self, found: list[Known]) -> float:
        """What was used since the last of what should be found was, itself included."""
        filled = [one for one in found if one.filled]
        if not filled:
            return 0.0
        later = {one for one in self.idle() if filled[-1] not in self.in_use() and one.used >= filled[-1].used}
        return sum(one.tokens for one in later | self.in_use())

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        flown = data.draw(st.sampled_from(self.flying))
        self.cache.filled(flown.handle)
        for one in flown.path:
            one.filled = True

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), answer=st.none() | st.integers(0, 50))
    def end(self, data: st.DataObject, answer: int | None) -> None:
        flown = data.draw(st.sampled_from(self.flying))
        self.cache.end(flown.handle, None, answer)
        flown.answer.tokens = flown.answer.tokens if answer is None else answer
        for one in flown.all:
            one.filled = True
        if flown.path:
            last = flown.path[-1]
            last.said[flown.prompt_owner] = None if flown.prompt_owner in last.said else flown.answer
        self.land(flown)
        self.ended.append(flown)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        flown = data.draw(st.sampled_from(self.flying))
        self.cache.undo(flown.handle)
        self.land(flown)
        for one in flown.all:
            if one is flown.answer or (one not in self.in_use() and not one.filled):
                self.drop(one)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        ended = data.draw(st.sampled_from(self.ended))
        self.cache.claim(ended.handle.answer)
        self.claimed.append(ended)

    @precondition(lambda self: self.claimed)
    @rule(data=st.data())
    def disclaim(self, data: st.DataObject) -> None:
        claimed = data.draw(st.sampled_from(self.claimed))
        self.cache.disclaim(claimed.handle.answer)
        self.claimed.remove(claimed)

    @rule(limit=st.integers(0, 120))
    def shrink(self, limit: int) -> None:
        self.cache.shrink(limit)
        while (idle := self.idle()) and sum(one.tokens for one in (*idle, *self.in_use())) > limit:
            self.drop(idle[0])

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        for one in self.living():
            self.drop(one)

    # What must be so

    @invariant()
    def the_same(self) -> None:
        self.cache.check_integrity()
        for tokens, ones in (
            (self.cache.in_use_tokens, self.in_use()),
            (self.cache.idle_tokens, set(self.idle())),
            (self.cache.wanted_tokens, self.wanted()),
        ):
            assert tokens == pytest.approx(sum(one.tokens for one in ones), abs=1e-6)
        assert len(self.cache.pieces) == len(self.living())
        assert [piece.tokens for piece in self.cache.eviction_order] == [one.tokens for one in self.idle()]

    @invariant()
    def no_piece_without_what_is_before_it(self) -> None:
        assert all(piece.parent is None or piece.parent.alive for piece in self.cache.pieces.values())

    def teardown(self) -> None:
        for flown in list(self.flying):
            self.undo_quietly(flown)
        for claimed in self.claimed:
            self.cache.disclaim(claimed.handle.answer)
        assert self.cache.in_use_tokens == pytest.approx(0, abs=1e-6)
        assert self.cache.wanted_tokens == pytest.approx(0, abs=1e-6)
        self.cache.shrink(0)
        assert not any(piece.tokens for piece in self.cache.pieces.values())
        assert self.cache.tokens == pytest.approx(0, abs=1e-6)

    def undo_quietly(self, flown: Flying) -> None:
        self.cache.undo(flown.handle)
        self.flying.remove(flown)


ResidencyMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestResidency = ResidencyMachine.TestCase


def ended(cache: PrefixTree, prompt: Ask, answer: int = 10, counted: int | None = None) -> CacheHandle:
    handle = cache.begin(prompt, 100.0)
    cache.end(handle, counted, answer)
    return handle


def keys(pieces: list[PrefixNode]) -> list[str]:
    return [f"{piece.tokens:.0f}" for piece in pieces]


# One thing at a time


def test_a_prefix_of_two_calls_counts_once() -> None:
    cache, policy = PrefixTree(), "p" * 400
    alone = cache.begin(chat(policy, "one"), 0.0)
    tokens = cache.in_use_tokens
    cache.begin(chat(policy, "two"), 0.0)
    assert cache.in_use_tokens == tokens + alone.path[1].tokens


def test_an_answer_is_found_as_the_next_prompts_message_and_named_by_it() -> None:
    cache = PrefixTree()
    before = ended(cache, chat("s", "u"), answer=50)
    grown = chat("s", "u", "whatever it said", "u2")
    assert [*before.path, before.answer] == cache.find(grown)
    assert cache.begin(grown, 0.0).expected_tokens == before.answer.tokens + sum(p.tokens for p in before.path)
    assert cache.find(chat("s", "u", "another text"))[2:] == [], "an answer has one text"
    assert cache.find(grown)[2] is before.answer


def test_of_two_answers_to_one_prompt_nobody_knows_which_comes_back() -> None:
    cache = PrefixTree()
    for _ in range(3):
        ended(cache, chat("s", "u"))
    assert len(cache.find(chat("s", "u", "one of them", "v"))) == 2


def test_of_two_who_asked_the_same_each_is_believed_to_repeat_its_own_answer() -> None:
    cache = PrefixTree()
    stays = {prompt_owner: cache.begin(chat("s", "u"), 10.0, prompt_owner) for prompt_owner in "vw"}
    for prompt_owner, tokens in (("v", 50), ("w", 7)):
        cache.end(stays[prompt_owner], None, tokens)
    grown = chat("s", "u", "what it said", "u2")
    assert [cache.find(grown, prompt_owner)[-1].tokens for prompt_owner in "vw"] == [50, 7]
    assert len(cache.find(grown, "x")) == 2, "who never asked repeats neither"
    cache.begin(grown, 0.0, "w")
    assert cache.find(grown, "v")[2] is stays["w"].answer, "by its text, everybody finds it"
    assert cache.find(chat("s", "u", "other text"), "v")[2] is stays["v"].answer


def test_only_so_many_answers_to_one_prompt_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "MAX_OWNERS", 2)
    cache = PrefixTree()
    for prompt_owner in "uvw":
        cache.end(cache.begin(chat("s"), 10.0, prompt_owner), None, 5)
    found = [len(cache.find(ask(("system", "s"), ("assistant", "a")), prompt_owner)) for prompt_owner in "uvw"]
    assert found == [1, 2, 2], "the oldest is forgotten"


def test_a_user_does_not_say_what_the_model_said() -> None:
    cache = PrefixTree()
    ended(cache, ask(("user", "u")))
    assert len(cache.find(ask(("user", "u"), ("user", "v")))) == 1


def test_what_the_engine_counted_replaces_the_estimate_and_teaches() -> None:
    cache = PrefixTree()
    handle = ended(cache, chat("s" * 93, "u" * 95), answer=7, counted=100)  # by length: 25 + 25
    assert keys(handle.path) == ["50", "50"] and cache.tokens == pytest.approx(107)
    assert cache.tokens_per_char == pytest.approx(0.25 * 1.3), "by what was wrong, but slowly"
    grown = ended(cache, chat("s" * 93, "u" * 95, "a", "v"), answer=1, counted=120)
    assert sum(piece.tokens for piece in grown.path) == pytest.approx(120)
    assert keys(grown.path[:2]) == ["50", "50"], "what was counted before stays"


def test_a_count_below_what_was_counted_before_changes_nothing() -> None:
    cache = PrefixTree()
    ended(cache, chat("s" * 93), counted=100)
    per_char = cache.tokens_per_char
    ended(cache, chat("s" * 93, "u"), counted=40)
    assert cache.tokens_per_char == per_char
    cache.check_integrity()


def test_calls_side_by_side_do_not_correct_the_same_estimate_once_more_each() -> None:
    cache = PrefixTree(tokens_per_char=0.25)
    for wave in range(20):
        stays = [cache.begin(ask(("user", f"{wave} {number} {'x' * 400}")), 10.0) for number in range(64)]
        for handle in stays:
            cache.end(handle, prompt_tokens=120, answer_tokens=10)
        assert 0.25 < cache.tokens_per_char < 0.3, "what was counted is 120 tokens for some 400 characters"


def test_prompts_without_text_count_as_the_engine_says() -> None:
    cache = PrefixTree()
    handle = cache.begin(ask(), 0.0)
    assert handle.path == [] and cache.in_use_tokens == 0
    cache.end(handle, 30, 5)
    assert cache.tokens == 5


def test_the_end_of_a_prompt_goes_before_its_beginning_and_the_oldest_before_all() -> None:
    cache, policy = PrefixTree(), "p" * 393  # 100 tokens
    old, new = ended(cache, chat(policy, "o" * 395)), ended(cache, chat(policy, "n" * 195))
    named = dict(zip("pocnd", [*old.path, old.answer, new.path[1], new.answer], strict=True))
    alive = []
    for limit in (270, 265, 165, 155, 105, 0):
        cache.shrink(limit)
        alive.append("".join(name for name, piece in named.items() if piece.alive))
    assert alive == ["pocnd", "pond", "pnd", "pn", "p", ""]


def test_only_so_many_pieces_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "MAX_PIECES", 10)
    cache = PrefixTree()
    for number in range(20):
        ended(cache, chat(f"{number}"))
        cache.shrink(float("inf"))
    assert len(cache.pieces) == 10 and cache.find(chat("19")) and not cache.find(chat("1"))


# What an answer shows


def lengths(cache: PrefixTree, *texts: str) -> list[int]:
    """What is believed to be there of each message."""
    return [round(piece.there_tokens) for piece in cache.find(chat(*texts))]


def tell(cache: PrefixTree, prompt: Ask, counted: int, cached: int) -> CacheHandle:
    handle = cache.begin(prompt, 10.0)
    cache.end(handle, counted, 10, cached)
    return handle


def three_that_begin_alike(cache: PrefixTree) -> None:
    """Prompts of 1200 tokens, the first 1000 in common, asked twice so that what they hold is proven."""
    for name in ("old", "mid", "new"):
        tell(cache, chat("p" * 3993, name.ljust(795)), 1200, 0 if name == "old" else 992)
    for name in ("old", "mid", "new"):
        tell(cache, chat("p" * 3993, name.ljust(795)), 1200, 1184)


def test_what_was_used_before_a_lost_piece_was_is_lost_too_and_what_was_used_since_is_not() -> None:
    cache = PrefixTree()
    three_that_begin_alike(cache)
    tell(cache, chat("p" * 3993, "mid".ljust(795)), 1200, 992)
    assert lengths(cache, "p" * 3993, "mid".ljust(795)) == [1000, 200], "it was computed again"
    assert lengths(cache, "p" * 3993, "old".ljust(795)) == [1000]
    assert lengths(cache, "p" * 3993, "new".ljust(795)) == [1000, 200]
    cache.check_integrity()


def test_a_banded_engine_gives_up_in_another_order() -> None:
    cache = PrefixTree(eviction_order=EvictionOrder(Eviction.BANDED))
    three_that_begin_alike(cache)
    tell(cache, chat("p" * 3993, "mid".ljust(795)), 1200, 992)
    assert lengths(cache, "p" * 3993, "old".ljust(795)) == [1000, 200]


def test_with_a_beginning_all_that_begins_like_it_is_lost() -> None:
    for order in Eviction:
        cache = PrefixTree(eviction_order=EvictionOrder(order))
        three_that_begin_alike(cache)
        tell(cache, chat("p" * 3993, "mid".ljust(795)), 1200, 496)
        assert lengths(cache, "p" * 3993, "new".ljust(795)) == [1000]


def test_a_last_block_that_is_not_found_is_no_loss() -> None:
    cache = PrefixTree()
    three_that_begin_alike(cache)
    tell(cache, chat("p" * 3993, "mid".ljust(795)), 1200, 1184)
    assert lengths(cache, "p" * 3993, "old".ljust(795)) == [1000, 200]


def test_a_last_block_that_is_full_is_no_loss_either() -> None:
    cache = PrefixTree()
    three_that_begin_alike(cache)
    for _ in range(2):
        tell(cache, chat("p" * 3993, "wide".ljust(859)), 1216, 1200)  # 76 blocks of 16
    assert lengths(cache, "p" * 3993, "old".ljust(795)) == [1000, 200]


def test_an_answer_that_is_rendered_anew_says_nothing_of_others() -> None:
    cache = PrefixTree()
    three_that_begin_alike(cache)
    grown = tell(cache, chat("p" * 3993, "new".ljust(795), "said " * 200, "more"), 1500, 1200)
    assert grown.path[2].tokens > 100, "the answer came back longer than it was"
    assert lengths(cache, "p" * 3993, "old".ljust(795)) == [1000, 200]


def test_what_is_lost_though_somebody_owns_it_is_the_same_when_it_comes_back() -> None:
    cache = PrefixTree()
    handle = ended(cache, chat("p" * 393, "q"), counted=110)
    cache.eviction_order.own(handle.answer)
    cache.claim(handle.answer)
    wanted = cache.wanted_tokens
    cache.shrink(0)
    assert (cache.tokens, cache.wanted_tokens) == pytest.approx((0, wanted))
    again = cache.begin(chat("p" * 393, "q"), 0.0)
    assert again.path == handle.path and cache.wanted_tokens == wanted, "not wanted twice"
    assert again.expected_tokens == 0 and again.fresh == again.path
    cache.check_integrity()


class Unchained(Ask):
    """A prompt by a replica that names its messages as it likes."""

    @property
    def pieces(self) -> Any:
        return tuple((message["content"], 8) for message in self.messages)


@given(prompts=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), max_size=12), data=st.data())
def test_names_that_are_not_chained_harm_no_account(prompts: list[list[int]], data: st.DataObject) -> None:
    cache, flying = PrefixTree(), list[CacheHandle]()
    for prompt in prompts:
        roles = itertools.cycle(("user", "assistant"))
        asked = Unchained(
            "auto", [{"role": role, "content": name} for name, role in zip(prompt, roles, strict=False)]
        )
        cache.adds(asked, 5.0, "w")
        flying.append(cache.begin(asked, 5.0, "w"))
        while flying and data.draw(st.booleans()):
            cache.filled(handle := flying.pop(data.draw(st.integers(0, len(flying) - 1))))
            cache.end(handle, 40, 5, 0)
        cache.check_integrity()
