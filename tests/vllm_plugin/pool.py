"""A pool of KV blocks as vLLM's, as far as the plugin touches it, and requests that use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orla_lg_vllm.bands import Band
from orla_lg_vllm.keeper import Ending, Keeper
from orla_lg_vllm.segments import Labels

BLOCK_TOKENS = 16


@dataclass(eq=False)
class FakeBlock:
    block_id: int
    ref_cnt: int = 0
    block_hash: bytes | None = None
    prev_free_block: Any = None
    next_free_block: Any = None


class FakePool:
    """Allocates, caches, finds and frees, line by line as vLLM's ``BlockPool`` does."""

    def __init__(self, blocks: int) -> None:
        self.blocks = [FakeBlock(number) for number in range(blocks)]
        self.free_block_queue: Any = self  # until a keeper replaces it
        self.found: dict[bytes, int] = {}

    def get_all_free_blocks(self) -> list[FakeBlock]:
        return self.blocks[1:]  # the first is vLLM's null block

    def get_new_blocks(self, count: int) -> list[FakeBlock]:
        taken: list[FakeBlock] = self.free_block_queue.popleft_n(count)
        for block in taken:
            self.evict_blocks({block.block_id})
            assert block.ref_cnt == 0
            block.ref_cnt = 1
        return taken

    def touch(self, blocks: Iterable[FakeBlock]) -> None:
        for block in blocks:
            if block.ref_cnt == 0:
                self.free_block_queue.remove(block)
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[FakeBlock]) -> None:
        first, last = [], []
        for block in blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                (last if block.block_hash else first).append(block)
        self.free_block_queue.prepend_n(first)
        self.free_block_queue.append_n(last)

    def evict_blocks(self, block_ids: set[int]) -> None:
        for number in block_ids:
            block = self.blocks[number]
            if block.block_hash is not None:
                if self.found.get(block.block_hash) == number:
                    del self.found[block.block_hash]
                block.block_hash = None


@dataclass(eq=False)
class FakeRequest:
    """A prompt of whole blocks, each named by a word; equal beginnings are the same blocks."""

    name: str
    words: Sequence[str]
    labels: Labels
    began_s: float
    hits: int = 0
    blocks: list[FakeBlock] = field(default_factory=list)


class FakeEngine:
    """A pool under a keeper, at a time that tests set."""

    def __init__(self, blocks: int = 33) -> None:
        self.now_s = 1000.0
        self.pool = FakePool(blocks)
        self.keeper = Keeper(self.pool, BLOCK_TOKENS, clock=lambda: self.now_s)
        self.running: dict[str, FakeRequest] = {}
        self._names = 0

    def start(
        self, workflow: str, words: Sequence[str], bands: Sequence[Band] = (), stage: str = "",
        keep_s: float | None = None,
    ) -> FakeRequest | None:  # fmt: skip
        """Begin a request; *bands* are of its blocks, one each. ``None`` if there is no room."""
        self.keeper.expire()
        self._names += 1
        ends = tuple((number + 1) * BLOCK_TOKENS for number in range(len(bands)))
        labels = Labels(workflow, stage, ends, tuple(bands), keep_s)
        request = FakeRequest(f"r{self._names}", words, labels, self.now_s)
        hashes = ["/".join(words[: number + 1]).encode() for number in range(len(words))]
        known = 0
        while known < len(words) and hashes[known] in self.pool.found:
            known += 1
        old = [self.pool.blocks[self.pool.found[each]] for each in hashes[:known]]
        in_queue = sum(block.ref_cnt == 0 for block in old)
        if len(words) - known > self.pool.free_block_queue.num_free_blocks - in_queue:
            return None
        self.pool.touch(old)
        new = self.pool.get_new_blocks(len(words) - known)
        for block, each in zip(new, hashes[known:], strict=True):
            block.block_hash = each
            self.pool.found.setdefault(each, block.block_id)
        request.hits, request.blocks = known, [*old, *new]
        self.running[request.name] = request
        return request

    def end(self, request: FakeRequest, *, whole: bool = True) -> FakeRequest:
        self.now_s += 1.0
        ids = [block.block_id for block in request.blocks]
        tokens = len(request.words) * BLOCK_TOKENS
        self.keeper.ends(Ending(request.name, request.labels, ids, tokens, request.began_s, whole=whole))
        self.pool.free_blocks(reversed(request.blocks))
        del self.running[request.name]
        self.now_s += 1.0
        return request

    def ask(self, workflow: str, words: str, bands: Sequence[Band] = (), **more: Any) -> int:
        """Make a whole request of a prompt of one-letter words; return how many of its blocks were found."""
        request = self.start(workflow, list(words), bands, **more)
        assert request is not None, "no room"
        return self.end(request).hits

    def order(self, verb: str, workflow: str = "", ttl_s: float | None = None) -> dict[str, Any]:
        running = {
            name: [block.block_id for block in request.blocks]
            for name, request in self.running.items()
            if workflow and request.labels.workflow == workflow
        }
        return self.keeper.order(verb, workflow, ttl_s, running)

    def cached(self, words: str) -> int:
        """Return how many blocks of a prompt would be found now."""
        hashes = ["/".join(words[: number + 1]).encode() for number in range(len(words))]
        return next((number for number, each in enumerate(hashes) if each not in self.pool.found), len(words))
