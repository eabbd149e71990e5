"""The cache told what to keep: an effect is what the next request finds, no more and nowhere else.

What is to stay or to go *under pressure* is in ``pressure``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from orla_lg.core.engine.backend import Capability, Effect
from orla_lg.core.engine.capabilities import KVControl, PrefixCache, WholeCache, WorkflowCache
from orla_lg.testing.conformance.subject import (
    Body,
    StreamedAnswer,
    Subject,
    expect,
    expect_kept,
    expect_lost,
    primed,
    read_rest,
    skip,
    told_effect,
)
from orla_lg.testing.conformance.suite import Check, check

SHORT_STREAM_TOKENS = 48
COUNTED = Capability.CACHED_TOKENS


async def _two_primed(on: Subject) -> tuple[tuple[WorkflowCache, Body], tuple[WorkflowCache, Body]]:
    if on.known.slots == 1:
        skip("one slot holds one workflow")
    return await primed(on), await primed(on)


@check(Capability.FLUSH_WORKFLOW, COUNTED)
async def flush_of_a_workflow_frees_it(on: Subject) -> None:
    """A flushed workflow's prompt is computed anew."""
    scope, body = await primed(on)
    effect = await told_effect(on, "flush", scope)
    expect(effect is Effect.FREED, f"the effect was {effect}")
    await expect_lost(on, body, "the effect was freed")


@check(Capability.FLUSH_WORKFLOW, COUNTED)
async def flush_of_a_workflow_is_not_widened(on: Subject) -> None:
    """Flushing one workflow leaves another's cache where it is."""
    (scope, _), (_, kept) = await _two_primed(on)
    await told_effect(on, "flush", scope)
    await expect_kept(on, kept, "another workflow was flushed")


@check(Capability.FLUSH_WORKFLOW, COUNTED)
async def flush_leaves_what_is_shared(on: Subject) -> None:
    """What two workflows begin alike is still found by one after the other was flushed."""
    if on.known.slots == 1:
        skip("one slot holds one workflow")
    (common,) = on.prompt()
    one, other = on.unlike(), on.unlike()
    bodies = [on.body([{**common, "content": f"{common['content']} I am {who}."}], who) for who in (one, other)]
    for body in bodies:
        await on.ask(body)
    await told_effect(on, "flush", on.scope(one))
    await expect_kept(on, bodies[1], "a workflow that begins alike was flushed")


@check(Capability.FLUSH_WORKFLOW)
async def flush_does_not_break_a_stream(on: Subject) -> None:
    """A workflow flushed while its answer is being written gets the whole answer all the same."""
    workflow = on.unlike()
    body = on.body(on.prompt(24), workflow, max_tokens=SHORT_STREAM_TOKENS)
    async with on.stream(body) as stream, asyncio.TaskGroup() as group:
        first = await anext(stream)
        flush = group.create_task(told_effect(on, "flush", on.scope(workflow)))
        answer: StreamedAnswer = await read_rest(first, stream)
    written = answer.usage.completion_tokens
    whole = answer.finish_reason == "stop" or written >= SHORT_STREAM_TOKENS
    expect(
        whole, f"it ended after {written} tokens, because of {answer.finish_reason}; the flush was {flush.result()}"
    )


@check(Capability.FLUSH_PREFIX, COUNTED)
async def flush_of_a_prefix_frees_it(on: Subject) -> None:
    """A flushed prompt is computed anew, and one that begins otherwise is not."""
    (_, lost), (_, kept) = await _two_primed(on)
    effect = await told_effect(on, "flush", PrefixCache(lost))
    expect(effect is Effect.FREED, f"the effect was {effect}")
    await expect_lost(on, lost, "the effect was freed")
    await expect_kept(on, kept, "another prefix was flushed")


@check(Capability.FLUSH_ALL, COUNTED)
async def flush_of_all_frees_all(on: Subject) -> None:
    """After everything was flushed, no prompt is found."""
    if not on.disruptive and on.known.slots is None and (on.known.kv_tokens or 0) > 1_000_000:
        skip("a big shared cache is only flushed with disruptive=True")
    (_, one), (_, other) = await _two_primed(on) if on.known.slots != 1 else (await primed(on),) * 2
    effect = await told_effect(on, "flush", WholeCache())
    expect(effect is Effect.FREED, f"the effect was {effect}")
    await expect_lost(on, one, "everything was freed")
    if other is not one:
        await expect_lost(on, other, "everything was freed")


@check(Capability.RELEASE, COUNTED)
async def release_keeps_until_needed(on: Subject) -> None:
    """A released workflow's cache is demoted: still found as long as nobody needs the room."""
    scope, body = await primed(on)
    effect = await told_effect(on, "release", scope)
    expect(effect is Effect.DEMOTED, f"the effect was {effect}")
    await expect_kept(on, body, "it was demoted")


@check(Capability.PIN, COUNTED)
async def pin_is_told(on: Subject) -> None:
    """Pinning a workflow is told as pinned and takes nothing away."""
    scope, body = await primed(on)
    effect = await told_effect(on, "pin", scope)
    expect(effect is Effect.PINNED, f"the effect was {effect}")
    await expect_kept(on, body, "it was pinned")
    await told_effect(on, "release", scope)


@check()
async def unusable_orders_say_so(on: Subject) -> None:
    """An order that the probe says is unusable is answered with unsupported, and does nothing."""
    if not isinstance(on.adapter, KVControl):
        skip("the adapter takes no orders about its cache")
    scope = on.scope(on.unlike())
    orders = {
        Capability.FLUSH_WORKFLOW: ("flush", scope),
        Capability.FLUSH_PREFIX: ("flush", PrefixCache(on.body(on.prompt(8)))),
        Capability.FLUSH_ALL: ("flush", WholeCache()),
        Capability.RELEASE: ("release", scope),
        Capability.PIN: ("pin", scope),
    }
    for capability, (order, what) in orders.items():
        if not on.known.can(capability):
            effect = await getattr(on.adapter, order)(what)
            expect(effect is Effect.UNSUPPORTED, f"{capability} is {effect}, though the probe says it is unusable")


@check(Capability.SAVE_RESTORE, COUNTED)
async def saved_slot_comes_back(on: Subject) -> None:
    """A slot saved, erased and restored has its prompt again; erased only, it has not."""
    adapter: Any = on.adapter
    scope, body = await primed(on)
    slot, name = scope.slot, f"orla-{on.unlike()}"
    if slot is None:
        skip("the engine has no slots")
    saved = await adapter.save(slot, name)
    expect(saved.effect is Effect.SAVED, "saving failed")
    expect(saved.tokens is None or saved.tokens > 0, "saving a slot that holds a prompt was told as saving nothing")
    expect(await adapter.erase(slot) is Effect.FREED, "erasing failed")
    await expect_lost(on, body, "its slot was erased")
    expect(await adapter.erase(slot) is Effect.FREED, "erasing failed")
    effect = await adapter.restore(slot, name)
    expect(effect is Effect.RESTORED, f"restoring was told as {effect}")
    await expect_kept(on, body, "its slot was restored")


@check(Capability.SAVE_RESTORE, COUNTED)
async def orders_stay_in_their_slot(on: Subject) -> None:
    """An order for a slot that does not exist is told as failed, and touches no other."""
    adapter: Any = on.adapter
    if not on.known.slots:
        skip("the engine has no slots")
    _, body = await primed(on)
    for beyond in range(on.known.slots, 2 * on.known.slots):
        effect = await adapter.erase(beyond)
        expect(effect in (Effect.FAILED, Effect.UNSUPPORTED), f"erasing slot {beyond} was told as {effect}")
    await expect_kept(on, body, "slots that do not exist were erased")


@check(Capability.SAVE_RESTORE)
async def restoring_nothing_says_so(on: Subject) -> None:
    """Restoring what was never saved is told as failed, without raising."""
    adapter: Any = on.adapter
    effect = await adapter.restore(0, f"orla-never-{on.unlike()}")
    expect(effect is Effect.FAILED, f"restoring what was never saved was told as {effect}")


CHECKS: tuple[Check, ...] = (
    flush_of_a_workflow_frees_it,
    flush_of_a_workflow_is_not_widened,
    flush_leaves_what_is_shared,
    flush_does_not_break_a_stream,
    flush_of_a_prefix_frees_it,
    flush_of_all_frees_all,
    release_keeps_until_needed,
    pin_is_told,
    unusable_orders_say_so,
    saved_slot_comes_back,
    orders_stay_in_their_slot,
    restoring_nothing_says_so,
)
