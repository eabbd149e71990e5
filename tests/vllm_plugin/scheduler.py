"""A scheduler that plans as vLLM's does, as far as holding back touches it: queues, seats, preemption, blocks."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from types import SimpleNamespace
from typing import Any

from orla_lg_vllm.holding import HeldRequests
from orla_lg_vllm.keeper import Ending, Keeper
from orla_lg_vllm.segments import labels_of
from orla_lg_vllm.suspension import SuspensionSettings
from tests.vllm_plugin.pool import BLOCK_TOKENS, FakeBlock, FakePool


class Status(Enum):
    WAITING = auto()
    WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR = auto()
    RUNNING = auto()
    PREEMPTED = auto()


@dataclass(eq=False)
class FakeCall:
    """Some whole blocks, each named by a word, and half of one more."""

    request_id: str
    workflow: str
    words: Sequence[str]
    arrival_time: float
    priority: int = 0
    status: Status = Status.WAITING
    blocks: list[FakeBlock] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    structured_output_request: Any = None

    def __post_init__(self) -> None:
        self.num_tokens = len(self.words) * BLOCK_TOKENS + BLOCK_TOKENS // 2
        self.block_hashes = ["/".join(self.words[: number + 1]).encode() for number in range(len(self.words))]
        self.sampling_params = SimpleNamespace(extra_args={"orla_workflow": self.workflow} if self.workflow else None)

    def __lt__(self, other: FakeCall) -> bool:
        return (self.priority, self.arrival_time) < (other.priority, other.arrival_time)


class Fcfs(deque[Any]):
    def prepend(self, call: FakeCall) -> None:
        self.appendleft(call)

    def add_request(self, call: FakeCall) -> None:
        self.append(call)

    def pop_request(self) -> FakeCall:
        call: FakeCall = self.popleft()
        return call

    def remove_requests(self, calls: Iterable[FakeCall]) -> None:
        left = [call for call in self if call not in set(calls)]
        self.clear()
        self.extend(left)


class Priority:
    def __init__(self) -> None:
        self.heap: list[FakeCall] = []

    def add_request(self, call: FakeCall) -> None:
        heapq.heappush(self.heap, call)

    prepend = add_request

    def pop_request(self) -> FakeCall:
        return heapq.heappop(self.heap)

    def remove_requests(self, calls: Iterable[FakeCall]) -> None:
        self.heap = [call for call in self.heap if call not in set(calls)]
        heapq.heapify(self.heap)

    def __iter__(self) -> Iterator[FakeCall]:
        return iter(sorted(self.heap))

    def __len__(self) -> int:
        return len(self.heap)


class FoundPool(FakePool):
    def get_cached_block(self, block_hash: bytes, groups: list[int]) -> list[FakeBlock] | None:
        number = self.found.get(block_hash)
        return None if number is None else [self.blocks[number]]


class FakeScheduler:
    """Steps of an engine whose calls are prefilled at once, and then get a few tokens at each step."""

    def __init__(self, blocks: int, seats: int, queue: Any, settings: SuspensionSettings | None) -> None:
        self.now_s = 1000.0
        self.pool = FoundPool(blocks)
        self.kv_cache_manager = SimpleNamespace(block_pool=self.pool)
        self.keeper = Keeper(self.pool, BLOCK_TOKENS, clock=lambda: self.now_s, settings=settings)
        self.block_size, self.max_num_running_reqs, self.pause_state = BLOCK_TOKENS, seats, 0
        self.waiting = queue
        self.running: list[FakeCall] = []
        self.requests: dict[str, FakeCall] = {}
        self.taken: list[FakeBlock] = []
        """In the last step."""

    def add(self, call: FakeCall) -> None:
        self.requests[call.request_id] = call
        self.waiting.add_request(call)

    def step(self) -> None:
        self.keeper.expire()
        holding = HeldRequests(self, self.keeper)
        holding.take_out(self.now_s)
        try:
            output = self.schedule()
        finally:
            holding.put_back()
        holding.note_begun(output)
        for call in self.running:
            call.num_tokens += 4

    def schedule(self) -> Any:
        self.before_schedule()
        pushed_out = False
        for call in list(self.running):
            while call in self.running and not self._grow(call):
                self.preempt(max(self.running) if isinstance(self.waiting, Priority) else self.running[-1])
                pushed_out = True
        new, passed = [], []
        while self.waiting and not pushed_out and len(self.running) < self.max_num_running_reqs:
            call = next(iter(self.waiting))
            if call.status is Status.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR:
                passed.append(self.waiting.pop_request())
            elif not self._seat(call):
                break
            else:
                new.append(self.waiting.pop_request())
        for call in reversed(passed):
            self.waiting.prepend(call)
        resumed = {call.request_id for call in new if call.status is Status.PREEMPTED}
        for call in new:
            call.status = Status.RUNNING
        names = [SimpleNamespace(req_id=call.request_id) for call in new if call.request_id not in resumed]
        return SimpleNamespace(
            scheduled_new_reqs=names, scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=resumed)
        )

    def before_schedule(self) -> None:
        """For tests that look at what the scheduler is shown."""

    def _seat(self, call: FakeCall) -> bool:
        old = []
        for each in call.block_hashes:
            if each not in self.pool.found:
                break
            old.append(self.pool.blocks[self.pool.found[each]])
        missing = -(-call.num_tokens // BLOCK_TOKENS) - len(old)
        if missing > self.pool.free_block_queue.num_free_blocks - sum(block.ref_cnt == 0 for block in old):
            return False
        self.pool.touch(old)
        call.blocks = [*old, *self._new(missing)]
        for block, each in zip(call.blocks, call.block_hashes, strict=False):
            if block.block_hash is None:
                block.block_hash = each
                self.pool.found.setdefault(each, block.block_id)
        call.num_computed_tokens = call.num_tokens
        self.running.append(call)
        return True

    def _grow(self, call: FakeCall) -> bool:
        missing = -(-call.num_tokens // BLOCK_TOKENS) - len(call.blocks)
        if missing > self.pool.free_block_queue.num_free_blocks:
            return False
        call.blocks += self._new(missing)
        call.num_computed_tokens = call.num_tokens
        return True

    def _new(self, count: int) -> list[FakeBlock]:
        got = self.pool.get_new_blocks(count)
        self.taken += got
        return got

    def preempt(self, call: FakeCall) -> None:
        self.running.remove(call)
        self._free(call, whole=False)
        call.status, call.num_computed_tokens = Status.PREEMPTED, 0
        self.waiting.prepend(call)

    def finish(self, name: str, *, whole: bool = True) -> None:
        """End a call: it is done, or it was aborted wherever it stood."""
        call = self.requests.pop(name)
        if call in self.running:
            self.running.remove(call)
        else:
            self.waiting.remove_requests([call])
        self._free(call, whole=whole)

    def _free(self, call: FakeCall, *, whole: bool) -> None:
        ids = [block.block_id for block in call.blocks]
        labels = labels_of(call.sampling_params.extra_args)
        began = call.arrival_time
        self.keeper.ends(Ending(call.request_id, labels, ids, call.num_tokens, began, whole=whole))
        self.pool.free_blocks(reversed(call.blocks))
        call.blocks = []
