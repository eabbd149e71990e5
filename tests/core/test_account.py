"""What we believe an engine holds, against engines that hold blocks and give them up: at random, or the oldest first.

After an answer, the claim about its prompt is at most 5 % above what is there; what the answer showed to be gone is
believed no more.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orla_lg.core.cache.prefix.eviction import PrefixNode
from orla_lg.core.cache.prefix.references import References
from orla_lg.core.cache.prefix.tree import CacheHandle, PrefixTree
from orla_lg.core.call import Ask
from orla_lg.core.memory.events import Doing
from orla_lg_sim.blocks import BlockPool, chain

BLOCK = 4
"""Tokens. Prompts have a hundred and more, so what the last, not full block holds stays within 5 %."""

TOO_MUCH = 1.05
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
"""No shrinking: what fails here fails in few steps, and each of them is dear."""

SYSTEMS = ("rules " * 70, "other " * 90)
QUESTIONS = ("why? " * 8, "please look at this one " * 12 + "a", "please look at this one " * 12 + "b")
ANSWERS = ("yes " * 9, "it is so because " * 10)

Message = dict[str, str]


def tokens_of(messages: list[Message]) -> list[int]:
    """Four characters are a token, so messages that begin alike have tokens in common."""
    return [
        hash(piece)
        for said in messages
        for piece in (said["role"], *(said["content"][at : at + 4] for at in range(0, len(said["content"]), 4)))
    ]


class PoolEngine:
    """Blocks of an engine, held while a call runs."""

    def __init__(self, blocks: int) -> None:
        self.pool = BlockPool(blocks)

    def room(self, prompt: list[int], answer: list[int]) -> bool:
        return self.pool.free >= (len(prompt) + len(answer)) // BLOCK + 2

    def start(self, prompt: list[int]) -> tuple[list[int], int]:
        """Look up and prefill a prompt; the blocks held, and how many tokens were found."""
        hashes = chain(prompt, BLOCK)
        found = self.pool.find(hashes[: (len(prompt) - 1) // BLOCK])
        self.pool.hold(found)
        held = [*found, *self.pool.take(len(hashes) - len(found))]
        self._name(hashes, held, len(found))
        return held, len(found) * BLOCK

    def finish(self, tokens: list[int], held: list[int]) -> None:
        """Take the blocks that the answer fills, its last token excepted, and give all back, the end first."""
        hashes = chain(tokens[:-1], BLOCK)
        before = len(held)
        held += self.pool.take(len(hashes) - before)
        self._name(hashes, held, before)
        self.pool.give_back(reversed(held))

    def _name(self, hashes: list[int], held: list[int], start: int) -> None:
        for at in range(start, len(hashes)):
            self.pool.name(held[at], hashes[at])

    def evict(self, random: Random, share: float) -> None:
        """Give up some of what no call holds, wherever it lies in a prompt."""
        known = [value for value in self.pool.all_known() if self.is_idle(value)]
        for value in random.sample(known, int(share * len(known))):
            self.pool.forget(value)

    def is_idle(self, value: int) -> bool:
        """Whether no call holds any of its copies."""
        copies = self.pool._blocks_of(value)
        return self.pool.idle_among(copies) == len(copies)

    def findable(self, tokens: list[int]) -> int:
        return len(self.pool.find(chain(tokens, BLOCK))) * BLOCK


@dataclass(eq=False, repr=False)
class Flying:
    """A call on its way."""

    workflow: str
    stage: str
    messages: list[Message]
    handle: CacheHandle
    held: list[int] | None = None
    cached: int = 0

    @property
    def prompt(self) -> list[int]:
        return tokens_of(self.messages)


@dataclass(eq=False)
class Ended:
    """What a call left."""

    workflow: str
    leaf: PrefixNode
    tokens: list[int]


class AccountMachine(RuleBasedStateMachine):
    """Workflows of two stages that go on, branch off and end, on an engine that evicts."""

    BLOCKS: ClassVar[int] = 400
    AT_RANDOM: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.engine = PoolEngine(self.BLOCKS)
        self.cache = PrefixTree(tokens_per_char=0.25)
        self.references = References(self.cache)
        self.flying: list[Flying] = []
        self.said: dict[tuple[str, str], list[Message]] = {}
        self.ended: list[Ended] = []
        self.last_use: dict[PrefixNode, int] = {}
        self.times = itertools.count(1)

    # What happens

    @rule(
        workflow=st.sampled_from("uvw"), stage=st.sampled_from("pq"), system=st.sampled_from(SYSTEMS),
        question=st.sampled_from(QUESTIONS), keep=st.sampled_from([0, 2, 99]), own=st.booleans(),
    )  # fmt: skip
    def begin(self, workflow: str, stage: str, system: str, question: str, keep: int, own: bool) -> None:
        """Go on with what the stage said, with a beginning of it, or anew; in words of its own, or as others do."""
        said = self.said.get((workflow, stage)) or [{"role": "system", "content": system}]
        words = f"{question} {workflow}{stage}{next(self.times)}" if own else question
        asked = [*said[: 1 + keep], {"role": "user", "content": words}]
        if any(each.workflow == workflow and each.stage == stage for each in self.flying) or len(self.flying) > 2:
            return
        if not self.engine.room(tokens_of(asked), [0] * 60):
            return
        handle = self.cache.begin(Ask("auto", asked), 30.0, workflow)
        taken = [each for each in self.ended if each.workflow == workflow and each.leaf in handle.path]
        for each in taken:  # a workflow that was forgotten comes back, with an answer that it got before this one
            if each.tokens != tokens_of(asked)[: len(each.tokens)]:
                self.ended.remove(each)
        self.references.enter(workflow, 0.0)
        self.flying.append(Flying(workflow, stage, asked, handle))

    @precondition(lambda self: any(each.held is None for each in self.flying))
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        self.start_on_engine(data.draw(st.sampled_from([each for each in self.flying if each.held is None])))

    def start_on_engine(self, flown: Flying) -> None:
        if self.engine.room(flown.prompt, []):
            flown.held, flown.cached = self.engine.start(flown.prompt)

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), answer=st.sampled_from(ANSWERS), followed=st.booleans())
    def end(self, data: st.DataObject, answer: str, followed: bool) -> None:
        flown = data.draw(st.sampled_from(self.flying))
        said = {"role": "assistant", "content": answer}
        tokens = tokens_of([*flown.messages, said])
        if flown.held is None:
            self.start_on_engine(flown)
        if flown.held is None or not self.engine.room([], tokens[len(flown.prompt) :]):
            return
        self.engine.finish(tokens, flown.held)
        before = dict(self.last_use)
        self.cache.end(flown.handle, len(flown.prompt), len(tokens) - len(flown.prompt), flown.cached)
        now = next(self.times)
        self.references.leave(flown.workflow, flown.stage, flown.handle.answer, now, followed=followed)
        self.flying.remove(flown)
        self.said[flown.workflow, flown.stage] = [*flown.messages, said]
        self.ended = [each for each in self.ended if each.leaf.alive] + [
            Ended(flown.workflow, flown.handle.answer, tokens)
        ]
        self.last_use |= {piece: now for piece in flown.handle.answer.path() if not piece.users}
        self.judge(flown, tokens, before)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def undo(self, data: st.DataObject) -> None:
        flown = data.draw(st.sampled_from(self.flying))
        if flown.held is None:
            self.cache.undo(flown.handle)
            self.references.leave(flown.workflow, flown.stage, None, next(self.times), followed=True)
            self.flying.remove(flown)
            self.last_use |= dict.fromkeys(
                (piece for piece in flown.handle.path if not piece.users), next(self.times)
            )

    @precondition(lambda self: self.AT_RANDOM)
    @rule(seed=st.integers(0, 99), share=st.sampled_from([0.05, 0.3, 1.0]))
    def evict(self, seed: int, share: float) -> None:
        self.engine.evict(Random(seed), share)

    @rule(workflow=st.sampled_from("uvw"))
    def forget(self, workflow: str) -> None:
        self.references.turned(workflow, Doing.HUMAN, next(self.times))
        self.references.forget(workflow)

    # What must be so

    def judge(self, flown: Flying, tokens: list[int], before: dict[PrefixNode, int]) -> None:
        """The claim about the prompt of an answer that just came, and about what it showed to be gone."""
        path = list(flown.handle.answer.path())
        claimed = sum(piece.there_tokens for piece in path)
        assert claimed <= TOO_MUCH * self.engine.findable(tokens), "about its prompt"
        ends, most = list(itertools.accumulate(flown.handle.believed)), flown.cached + self.cache.witness.slack_tokens
        lost = [n for n, end in enumerate(ends) if min(end, len(flown.prompt) - 1) >= most]
        for piece in flown.handle.path[lost[0] :] if lost else ():
            assert not [each for each in piece.children() if each not in path and each.idle], (
                "it followed what was lost"
            )
        if lost and not self.AT_RANDOM and flown.handle.used <= lost[0] < flown.handle.proven:
            used = before[flown.handle.path[lost[0]]]
            older = [piece for piece in self.cache.eviction_order if self.last_use[piece] < used]
            assert not older, "used before what was lost, by an engine that gives up the oldest first"

    @invariant()
    def promises_hold(self) -> None:
        self.cache.check_integrity()
        self.references.check_integrity()
        self.engine.pool.check_integrity()


class OldestFirst(AccountMachine):
    BLOCKS, AT_RANDOM = 180, False


for machine in (AccountMachine, OldestFirst):
    machine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None, phases=PHASES)

TestAtRandom = AccountMachine.TestCase
TestOldestFirst = OldestFirst.TestCase
