"""Where the plugin may be used: the versions it was tried with, and a test at the engine's start.

It reaches into what vLLM keeps private, so it trusts a version only after having been run against it, and even
then looks before it touches anything. Whatever is not as expected leaves vLLM's own scheduler as it is.
"""

from __future__ import annotations

import os
from typing import Any

from orla_lg_vllm.bands import Band, BandedQueue
from orla_lg_vllm.keeper import Ending, Keeper
from orla_lg_vllm.segments import Labels

TESTED_VERSIONS = ("0.32.0",)
"""vLLM's releases that ``tests/engines/test_vllm_plugin.py`` ran against. Others may have renamed or reordered what
is hooked: the pool's free queue, ``_free_request_blocks``, and the engine's utility calls."""

VERSIONS_VARIABLE = "ORLA_VLLM_VERSIONS"
"""Names the versions to trust instead, separated by commas: for who has run those tests against another one."""


def trusted_versions() -> tuple[str, ...]:
    """Return the versions that the plugin works in."""
    named = os.environ.get(VERSIONS_VARIABLE)
    return TESTED_VERSIONS if named is None else tuple(name.strip() for name in named.split(","))


def objection(scheduler: Any) -> str:
    """Return why the plugin must leave this scheduler alone; empty if it need not."""
    import vllm

    if vllm.__version__ not in trusted_versions():
        tested = ", ".join(trusted_versions())
        return f"vLLM {vllm.__version__} is not among the versions it was tested with ({tested})"
    manager = scheduler.kv_cache_manager
    if not manager.enable_caching:
        return "prefix caching is off (--no-enable-prefix-caching)"
    if scheduler.connector is not None:
        return "a KV connector is configured, which frees and offloads blocks in an order of its own"
    if missing := [name for name in ("waiting", "running", "max_num_running_reqs") if not hasattr(scheduler, name)]:
        return f"the scheduler has no {', '.join(missing)}"
    groups = [type(group.kv_cache_spec).__name__ for group in scheduler.kv_cache_config.kv_cache_groups]
    if groups not in (["FullAttentionSpec"], ["MLAAttentionSpec"]):
        return f"the model's KV cache is not of one kind of full attention, but of {', '.join(groups) or 'none'}"
    return self_test()


def self_test() -> str:
    """Try the hooked surfaces on a small pool of vLLM's own making; return what was wrong with them."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import AsyncMPClient

    needed = {
        BlockPool: ("get_cached_block",),
        Scheduler: ("schedule", "_free_request_blocks", "reset_prefix_cache"),
        EngineCore: ("add_request",),
        AsyncMPClient: ("call_utility_all_async",),
    }
    for owner, names in needed.items():
        if missing := [name for name in names if not callable(getattr(owner, name, None))]:
            return f"its self-test failed: {owner.__name__} has no {', '.join(missing)}"
    try:
        _exercise()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, vLLM must start without
        return f"its self-test failed: {type(error).__name__} {error}"
    return ""


def _exercise() -> None:
    """Let two workflows leave blocks in a real pool, and see them taken in the right order."""
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    unknown = {name for name in vars(FreeKVCacheBlockQueue) if not name.startswith("_")} - set(dir(BandedQueue))
    assert not unknown, f"the free queue now has {sorted(unknown)}"
    pool = BlockPool(num_gpu_blocks=8, enable_caching=True, hash_block_size=16)
    keeper = Keeper(pool, 16, clock=lambda: 0.0)
    kept = _leave(pool, keeper, "kept", 3, (Band.SYSTEM, Band.HISTORY))
    other = _leave(pool, keeper, "other", 2, (Band.TOOL,))
    keeper.check_integrity()
    order = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert order[-5:] == [*reversed(other), *reversed(kept)], f"the free queue is in the order {order}"
    pool.touch([pool.blocks[other[0]]])
    assert keeper.order("flush", "other", None, {})["freed_blocks"] == 1, "a flush did not free what is free"
    assert pool.blocks[other[0]].block_hash is not None, "a flush took what is in use"
    pool.free_blocks([pool.blocks[other[0]]])
    assert [block.block_id for block in pool.get_new_blocks(4)][-1] == other[0], "a dead block was not taken first"
    keeper.check_integrity()


def _leave(pool: Any, keeper: Keeper, workflow: str, count: int, bands: tuple[Band, ...]) -> list[int]:
    """Allocate, cache and free blocks as a request does; return them in the order of its prompt."""
    blocks = pool.get_new_blocks(count)
    for number, block in enumerate(blocks):
        pool._insert_block_hash(f"{workflow}{number}".encode(), block, num_tokens=16 * (number + 1))
    ids = [block.block_id for block in blocks]
    ends = tuple(range(16, 16 * len(bands) + 16, 16))
    keeper.ends(Ending("", Labels(workflow, "", ends, bands), ids, 16 * len(bands), 0.0, whole=True))
    pool.free_blocks(reversed(blocks))
    return ids
