"""The plugin under any sequence of requests and orders, against a model that only remembers who used what."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orla_lg_vllm.bands import Band
from tests.vllm_plugin.pool import FakeEngine, FakeRequest

WORKFLOWS = st.sampled_from(["u", "v", "w", ""])
STAGES = st.sampled_from(["plan", "write"])
PROMPTS = st.text("ab", min_size=1, max_size=6)  # few words, so that prompts meet
BANDS = st.lists(st.sampled_from([Band.TOOL, Band.HISTORY, Band.SYSTEM]), max_size=6)
BLOCKS = 13


class Requests(RuleBasedStateMachine):
    """Requests begin, end, are cut off; workflows are pinned, released, flushed; time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = FakeEngine(BLOCKS)
        self.users: dict[int, set[str]] = {}
        """Who left each cached block; a block in here is in the cache."""
        self.doomed: set[str] = set()
        """Running requests whose workflow was flushed."""
        self.before: dict[Band, list[int]] = {}

    # What happens

    @rule(workflow=WORKFLOWS, stage=STAGES, prompt=PROMPTS, bands=BANDS, keep_s=st.sampled_from([None, 0.0, 5.0]))
    def begin(self, workflow: str, stage: str, prompt: str, bands: list[Band], keep_s: float | None) -> None:
        self._expire()
        before = self.order()
        request = self.engine.start(workflow, list(prompt), bands, stage=stage, keep_s=keep_s)
        if request is None:
            return
        found = {block.block_id for block in request.blocks[: request.hits]}
        new = [block.block_id for block in request.blocks[request.hits :]]
        assert new == [block for block in before if block not in found][: len(new)], "taken out of order"
        for block in new:
            self.users.pop(block, None)

    @precondition(lambda self: self.engine.running)
    @rule(data=st.data(), whole=st.booleans())
    def end(self, data: st.DataObject, whole: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.running)))
        request = self.engine.end(self.engine.running[name], whole=whole)
        self._note(request)
        self._expect_bands_fall(request)

    def _note(self, request: FakeRequest) -> None:
        doomed = request.name in self.doomed
        self.doomed.discard(request.name)
        for block in request.blocks:
            if not doomed:
                self.users.setdefault(block.block_id, set()).add(request.labels.workflow or "nobody")
            elif not self.users.get(block.block_id) and block.ref_cnt == 0:
                assert block.block_hash is None, "a flush was forgotten when the request ended"

    def _expect_bands_fall(self, request: FakeRequest) -> None:
        cached = [block.block_id for block in request.blocks if block.block_hash is not None]
        bands = [self.engine.keeper.ledger.band(block) for block in cached]
        unique = all(self.engine.pool.found.get(block.block_hash) == block.block_id for block in request.blocks)
        if unique:  # of a block that is there twice, others may claim the other one
            assert bands == sorted(bands, reverse=True), f"the bands rise along the prompt: {bands}"

    @rule(workflow=WORKFLOWS.filter(bool), ttl_s=st.sampled_from([None, 3.0, 20.0]))
    def pin(self, workflow: str, ttl_s: float | None) -> None:
        self._unchanged("pin", workflow, ttl_s)

    @rule(workflow=WORKFLOWS.filter(bool))
    def release(self, workflow: str) -> None:
        told = self._unchanged("release", workflow)
        assert told["pinned_blocks"] == 0 or told["shared_blocks"]

    def _unchanged(self, verb: str, workflow: str, ttl_s: float | None = None) -> dict[str, Any]:
        self._expire()
        cached = set(self.engine.pool.found)
        told = self.engine.order(verb, workflow, ttl_s)
        assert set(self.engine.pool.found) == cached, f"{verb} took something away"
        return told

    @rule(workflow=WORKFLOWS.filter(bool))
    def flush(self, workflow: str) -> None:
        self._expire()
        theirs = {block for request in self.engine.running.values() for block in map(id, request.blocks)}
        gone = {
            block
            for block, users in self.users.items()
            if users == {workflow} and id(self.engine.pool.blocks[block]) not in theirs
        }
        before = {block.block_id for block in self.engine.pool.blocks if block.block_hash is not None}
        told = self.engine.order("flush", workflow)
        after = {block.block_id for block in self.engine.pool.blocks if block.block_hash is not None}
        assert before - after == gone, "a flush freed more or less than what only its workflow has"
        assert told["freed_blocks"] == len(gone)
        for block in list(self.users):
            self.users[block].discard(workflow)
            if block in gone or not self.users[block]:
                del self.users[block]
        self.doomed |= {name for name, request in self.engine.running.items() if request.labels.workflow == workflow}

    @rule(seconds=st.sampled_from([1.0, 10.0]))
    def wait(self, seconds: float) -> None:
        self.engine.now_s += seconds
        self._expire()

    def _expire(self) -> None:
        """End pins of which the engine would see only now that they ended: what they held moves, once."""
        self.engine.keeper.expire()
        self.within_a_band_nothing_overtakes_what_was_used_later()

    # What always holds

    def order(self) -> list[int]:
        return [block.block_id for block in self.engine.pool.free_block_queue.get_all_free_blocks()]

    @invariant()
    def the_books_are_right(self) -> None:
        self.engine.keeper.check_integrity()

    @invariant()
    def every_free_block_is_in_one_place(self) -> None:
        free = [block.block_id for block in self.engine.pool.blocks[1:] if block.ref_cnt == 0]
        assert sorted(self.order()) == free

    @invariant()
    def owners_are_those_who_used_it(self) -> None:
        for workflow in ("u", "v", "w"):
            known = {block for block, users in self.users.items() if workflow in users}
            assert set(self.engine.keeper.ledger.blocks_of(workflow)) == known
            assert self.engine.keeper.ledger.knows(workflow) == bool(known)

    @invariant()
    def within_a_band_nothing_overtakes_what_was_used_later(self) -> None:
        queue = self.engine.pool.free_block_queue
        now = {band: [block.block_id for block in queue.band(band)] for band in Band if band is not Band.DEAD}
        for band, blocks in now.items():
            stayed = [block for block in self.before.get(band, []) if block in blocks]
            assert blocks[: len(stayed)] == stayed, f"{band.name}: {self.before[band]} became {blocks}"
        self.before = now

    @invariant()
    def the_least_worth_goes_first(self) -> None:
        ledger = self.engine.keeper.ledger
        blocks = [self.engine.pool.blocks[block] for block in self.order()]
        bands = [ledger.band(block.block_id) if block.block_hash else Band.DEAD for block in blocks]
        assert bands == sorted(bands)
        assert ledger.pinned_blocks <= (BLOCKS * 0.5)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

pytestmark = pytest.mark.timeout(300)
