"""The cache told what to keep: an effect is what the next request finds, no more and nowhere else."""

from __future__ import annotations

import asyncio
from typing import Any

from orla_lg.core.backend import Capability, Effect
from orla_lg.core.control import KVControl, PrefixCache, WholeCache, WorkflowCache
from orla_lg.testing.conformance.subject import LITTLE, MUCH, PROMPT_WORDS, Body, Subject, expect, skip
from orla_lg.testing.conformance.suite import Check, check

PRESSURE_TOKENS = 6_000
"""A cache that holds more is not filled to put a pin under pressure."""

DEFERRALS = 10
COUNTED = Capability.CACHED_TOKENS


async def _primed(on: Subject) -> tuple[WorkflowCache, Body]:
    """Return a workflow whose prompt is cached, and a request that finds it."""
    workflow, prompt = on.unlike(), on.prompt()
    await on.ask(on.body(prompt, workflow))
    return on.scope(workflow), on.body(prompt, workflow)


async def _two_primed(on: Subject) -> tuple[tuple[WorkflowCache, Body], tuple[WorkflowCache, Body]]:
    if on.known.slots == 1:
        skip("one slot holds one workflow")
    return await _primed(on), await _primed(on)


async def _effect(on: Subject, order: str, scope: Any) -> Effect:
    """Give an order to an idle engine, which may say ``deferred`` for a moment."""
    effect = Effect.DEFERRED
    for _ in range(DEFERRALS):
        effect = await getattr(on.adapter, order)(scope)
        if effect is not Effect.DEFERRED:
            break
        await asyncio.sleep(0.3)
    return effect


async def _expect_lost(on: Subject, body: Body, why: str) -> None:
    part = (await on.ask(body)).cached_part
    expect(part <= LITTLE, f"{why}, yet {part:.0%} of its prompt was still cached")


async def _expect_kept(on: Subject, body: Body, why: str) -> None:
    part = (await on.ask(body)).cached_part
    expect(part >= MUCH, f"{why}, yet only {part:.0%} of its prompt was cached")


@check(Capability.FLUSH_WORKFLOW, COUNTED)
async def flush_of_a_workflow_frees_it(on: Subject) -> None:
    """A flushed workflow's prompt is computed anew."""
    scope, body = await _primed(on)
    effect = await _effect(on, "flush", scope)
    expect(effect is Effect.FREED, f"the effect was {effect}")
    await _expect_lost(on, body, "the effect was freed")


@check(Capability.FLUSH_WORKFLOW, COUNTED)
async def flush_of_a_workflow_is_not_widened(on: Subject) -> None:
    """Flushing one workflow leaves another's cache where it is."""
    (scope, _), (_, kept) = await _two_primed(on)
    await _effect(on, "flush", scope)
    await _expect_kept(on, kept, "another workflow was flushed")


@check(Capability.FLUSH_PREFIX, COUNTED)
async def flush_of_a_prefix_frees_it(on: Subject) -> None:
    """A flushed prompt is computed anew, and one that begins otherwise is not."""
    (_, lost), (_, kept) = await _two_primed(on)
    effect = await _effect(on, "flush", PrefixCache(lost))
    expect(effect is Effect.FREED, f"the effect was {effect}")
    await _expect_lost(on, lost, "the effect was freed")
    await _expect_kept(on, kept, "another prefix was flushed")


@check(Capability.FLUSH_ALL, COUNTED)
async def flush_of_all_frees_all(on: Subject) -> None:
    """After everything was flushed, no prompt is found."""
    if not on.disruptive and on.known.slots is None and (on.known.kv_tokens or 0) > 1_000_000:
        skip("a big shared cache is only flushed with disruptive=True")
    (_, one), (_, other) = await _two_primed(on) if on.known.slots != 1 else (await _primed(on),) * 2
    effect = await _effect(on, "flush", WholeCache())
    expect(effect is Effect.FREED, f"the effect was {effect}")
    await _expect_lost(on, one, "everything was freed")
    if other is not one:
        await _expect_lost(on, other, "everything was freed")


@check(Capability.RELEASE, COUNTED)
async def release_keeps_until_needed(on: Subject) -> None:
    """A released workflow's cache is demoted: still found as long as nobody needs the room."""
    scope, body = await _primed(on)
    effect = await _effect(on, "release", scope)
    expect(effect is Effect.DEMOTED, f"the effect was {effect}")
    await _expect_kept(on, body, "it was demoted")


@check(Capability.PIN, COUNTED)
async def pin_is_told(on: Subject) -> None:
    """Pinning a workflow is told as pinned and takes nothing away."""
    scope, body = await _primed(on)
    effect = await _effect(on, "pin", scope)
    expect(effect is Effect.PINNED, f"the effect was {effect}")
    await _expect_kept(on, body, "it was pinned")
    await _effect(on, "release", scope)


@check(Capability.PIN, COUNTED)
async def pin_withstands_pressure(on: Subject) -> None:
    """A pinned prompt is still cached after others filled the cache."""
    capacity, slots = on.known.kv_tokens, on.known.slots
    if slots is None and not (capacity and capacity <= PRESSURE_TOKENS):
        skip(f"the cache holds {capacity or 'an unknown number of'} tokens, too many to fill")
    if slots == 1:
        skip("one slot holds one workflow")
    scope, body = await _primed(on)
    await _effect(on, "pin", scope)
    others = slots - 1 if slots else (capacity or 0) // PROMPT_WORDS + 2
    for _ in range(others):
        await on.ask(on.body(on.prompt(), on.unlike(), max_tokens=1))
    await _expect_kept(on, body, f"it was pinned before {others} other prompts came")
    await _effect(on, "release", scope)


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
    scope, body = await _primed(on)
    slot, name = scope.slot, f"orla-{on.unlike()}"
    if slot is None:
        skip("the engine has no slots")
    expect(await adapter.save(slot, name) is Effect.SAVED, "saving failed")
    expect(await adapter.erase(slot) is Effect.FREED, "erasing failed")
    await _expect_lost(on, body, "its slot was erased")
    expect(await adapter.erase(slot) is Effect.FREED, "erasing failed")
    effect = await adapter.restore(slot, name)
    expect(effect is Effect.RESTORED, f"restoring was told as {effect}")
    await _expect_kept(on, body, "its slot was restored")


@check(Capability.SAVE_RESTORE, COUNTED)
async def orders_stay_in_their_slot(on: Subject) -> None:
    """An order for a slot that does not exist is told as failed, and touches no other."""
    adapter: Any = on.adapter
    if not on.known.slots:
        skip("the engine has no slots")
    _, body = await _primed(on)
    for beyond in range(on.known.slots, 2 * on.known.slots):
        effect = await adapter.erase(beyond)
        expect(effect in (Effect.FAILED, Effect.UNSUPPORTED), f"erasing slot {beyond} was told as {effect}")
    await _expect_kept(on, body, "slots that do not exist were erased")


@check(Capability.SAVE_RESTORE)
async def restoring_nothing_says_so(on: Subject) -> None:
    """Restoring what was never saved is told as failed, without raising."""
    adapter: Any = on.adapter
    effect = await adapter.restore(0, f"orla-never-{on.unlike()}")
    expect(effect is Effect.FAILED, f"restoring what was never saved was told as {effect}")


CHECKS: tuple[Check, ...] = (
    flush_of_a_workflow_frees_it,
    flush_of_a_workflow_is_not_widened,
    flush_of_a_prefix_frees_it,
    flush_of_all_frees_all,
    release_keeps_until_needed,
    pin_is_told,
    pin_withstands_pressure,
    unusable_orders_say_so,
    saved_slot_comes_back,
    orders_stay_in_their_slot,
    restoring_nothing_says_so,
)
