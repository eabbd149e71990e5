"""Held requests are out of vLLM's queue while it plans a step, and back in their places when it has.

vLLM's ``schedule()`` seats waiting requests in the order of their queue. What ``Suspension`` holds back is taken
out just before and put back just after, in the same call: between two steps the queue is as vLLM knows it, so
aborts, counts of the unfinished, metrics and preemption see every request, and an aborted one is gone for good.
Requests that could not be scheduled anyway, since they wait for a grammar or hold blocks already, are left alone.

This file runs inside the engine: it imports the standard library only, and is given vLLM's objects.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Hashable, Set
from typing import Any

from orla_lg_vllm.bands import Band
from orla_lg_vllm.keeper import Keeper
from orla_lg_vllm.segments import WORKFLOW
from orla_lg_vllm.suspension import Asking, Lack, PlannedStep

UNPAUSED = 0
"""Of vLLM's ``PauseState``."""


class HeldRequests:
    """One step of one scheduler: ``take_out``, then the scheduler plans, then ``put_back`` and ``note_begun``."""

    def __init__(self, scheduler: Any, keeper: Keeper) -> None:
        self._scheduler, self._keeper = scheduler, keeper
        self._before: list[Any] = []
        self._held: list[Any] = []

    def take_out(self, now_s: float) -> None:
        """Take out of the queue who is held back at this step."""
        scheduler, suspension = self._scheduler, self._keeper.suspension
        if suspension is None or scheduler.pause_state != UNPAUSED:  # a paused scheduler seats nobody
            return
        block, waiting = scheduler.block_size, list(scheduler.waiting)
        growth = sum(_growth(request, block) for request in scheduler.running)
        if suspension.all_fits(growth + sum(_blocks(request, block) for request in waiting)):
            return
        held = suspension.plan(
            PlannedStep(
                now_s=now_s,
                asking=[self._asking(request) for request in waiting if not _is_blocked(request)],
                seats=scheduler.max_num_running_reqs - len(scheduler.running),
                growth_blocks=growth,
                running=bool(scheduler.running),
            )
        )
        if held:
            self._before = waiting
            self._held = [request for request in waiting if request.request_id in held]
            scheduler.waiting.remove_requests(self._held)

    def put_back(self) -> None:
        """Put them back where they were; who was pushed out meanwhile stays in front of all."""
        queue = self._scheduler.waiting
        if not self._held:
            return
        if isinstance(queue, deque):
            places = {request.request_id: place for place, request in enumerate(self._before)}
            pushed_out = [request for request in queue if request.request_id not in places]
            stayed = [request for request in queue if request.request_id in places]
            stayed = sorted([*stayed, *self._held], key=lambda request: places[request.request_id])
            queue.clear()
            queue.extend([*pushed_out, *stayed])
        else:  # a heap, which knows their places
            for request in self._held:
                queue.add_request(request)
        self._held = []

    def note_begun(self, output: Any) -> None:
        """Tell whose requests were scheduled."""
        suspension, requests = self._keeper.suspension, self._scheduler.requests
        new = [each.req_id for each in output.scheduled_new_reqs]
        for name in [*new, *output.scheduled_cached_reqs.resumed_req_ids]:
            if suspension is not None and (workflow := _workflow(requests[name])):
                suspension.begins(name, workflow)

    def _asking(self, request: Any) -> Asking:
        lack = functools.partial(self._lack, request)
        return Asking(request.request_id, _workflow(request), request.block_hashes, request.arrival_time, lack)

    def _lack(self, request: Any, coming: Set[Hashable]) -> Lack:
        pool, queue = self._scheduler.kv_cache_manager.block_pool, self._keeper.queue
        in_use = kept = 0
        for each in request.block_hashes:
            if each in coming:
                in_use += 1
            elif (found := pool.get_cached_block(each, [0])) is None:
                break
            elif found[0].ref_cnt:
                in_use += 1
            elif queue.place(found[0]) > Band.SPARE:
                kept += 1
        return Lack(max(_blocks(request, self._scheduler.block_size) - in_use - kept, 0), kept)


def _blocks(request: Any, block_tokens: int) -> int:
    """Return how many blocks a request needs to be scheduled as a whole."""
    return -(-int(request.num_tokens) // block_tokens)


def _growth(request: Any, block_tokens: int) -> int:
    """Return how many more blocks a running one needs; what is computed has its blocks already."""
    tokens = int(request.num_tokens) + int(request.num_output_placeholders)  # the answer's, still in flight
    return max(-(-tokens // block_tokens) - -(-int(request.num_computed_tokens) // block_tokens), 0)


def _workflow(request: Any) -> str:
    parameters = request.sampling_params  # none for a pooling request
    said = (parameters.extra_args if parameters is not None else None) or {}
    workflow = said.get(WORKFLOW, "")
    return workflow if isinstance(workflow, str) else ""


def _is_blocked(request: Any) -> bool:
    """Whether vLLM would pass it over: it waits for a grammar that is not there yet."""
    if not request.status.name.startswith("WAITING_FOR_"):
        return False
    structured = request.structured_output_request
    return structured is None or structured.grammar is None
