"""Small caches filled on purpose: what was pinned or is expected back stays, what was released goes first."""

from __future__ import annotations

import asyncio

from orla_lg.core.engine.backend import Capability, Directions
from orla_lg.testing.conformance.subject import (
    LITTLE,
    MUCH,
    Body,
    Subject,
    expect,
    expect_kept,
    primed,
    skip,
    told_effect,
)
from orla_lg.testing.conformance.suite import Check, check

PRESSURE_TOKENS = 6_000
"""A cache that holds more is not filled."""

EVICTED_PART = 0.7
"""So much of one prompt must go: enough to be seen, and not so much that a second one must go too."""

PIN_S = 0.3
KEEP_S = 600.0
COUNTED = Capability.CACHED_TOKENS


def _capacity(on: Subject) -> int:
    """Return what the cache holds, in tokens; skips where that is too much to fill, or lies in slots."""
    capacity = on.known.kv_tokens
    if on.known.slots:
        skip("its cache lies in slots, which the core gives away and takes back")
    if not capacity or capacity > PRESSURE_TOKENS:
        skip(f"the cache holds {capacity or 'an unknown number of'} tokens, too many to fill")
    return capacity


async def _fill(on: Subject, tokens: int, keep_s: float | None = None) -> None:
    """Have prompts of about *tokens* tokens cached, each of its own workflow, of use for *keep_s* more seconds."""
    left = tokens
    while left > 0:
        workflow = on.unlike()
        told = Directions(call_id=on.unlike(), workflow=workflow, keep_s=keep_s)
        answer = await on.ask(on.body(on.prompt(min(left, on.prompt_words)), workflow, told=told, max_tokens=1))
        left -= answer.usage.prompt_tokens


async def _tokens(on: Subject, body: Body) -> int:
    return (await on.ask({**body, "max_tokens": 1})).usage.prompt_tokens


@check(Capability.PIN, COUNTED)
async def pin_withstands_pressure(on: Subject) -> None:
    """A pinned prompt is still cached after others filled the cache."""
    slots = on.known.slots
    if slots == 1:
        skip("one slot holds one workflow")
    fill = (slots - 1) * on.prompt_words if slots else _capacity(on) + on.prompt_words
    scope, body = await primed(on)
    await told_effect(on, "pin", scope)
    if slots:  # every other slot gets a prompt of its own
        for _ in range(slots - 1):
            await on.ask(on.body(on.prompt(), on.unlike(), max_tokens=1))
    else:
        await _fill(on, fill)
    await expect_kept(on, body, f"it was pinned before {fill} other tokens came")
    await told_effect(on, "release", scope)


@check(Capability.PIN, COUNTED)
async def pin_ends_with_its_time(on: Subject) -> None:
    """A prompt pinned for a time is evicted like any other once the time is over."""
    fill = _capacity(on) + on.prompt_words
    scope, body = await primed(on)
    await told_effect(on, "pin", scope, ttl_s=PIN_S)
    await asyncio.sleep(2 * PIN_S)
    await _fill(on, fill)
    part = (await on.ask(body)).cached_part
    await told_effect(on, "release", scope)  # a pin that did not end must not spoil what is checked next
    why = f"it was pinned for {PIN_S:g} s, and {fill} other tokens came after that"
    expect(part <= LITTLE, f"{why}, yet {part:.0%} of its prompt was still cached")


@check(Capability.RELEASE, COUNTED)
async def released_goes_first(on: Subject) -> None:
    """Of two workflows the released one makes room, though the other was used less recently."""
    capacity = _capacity(on)
    (_, kept), (scope, lost) = await primed(on), await primed(on)
    held = await _tokens(on, kept) + await _tokens(on, lost)
    await told_effect(on, "release", scope)
    await _fill(on, capacity - held + round(EVICTED_PART * held / 2))
    await expect_kept(on, kept, "another workflow was released to make room")
    part = (await on.ask(lost)).cached_part
    expect(part < MUCH, f"it was released and room was needed, yet {part:.0%} of its prompt was still cached")


@check(Capability.KEEP, COUNTED)
async def kept_outlives_the_rest(on: Subject) -> None:
    """A prompt that is expected to be of use is still cached after others, which are not, filled the cache."""
    fill = _capacity(on) + on.prompt_words
    workflow, prompt = on.unlike(), on.prompt()
    told = Directions(call_id=on.unlike(), workflow=workflow, keep_s=KEEP_S)
    await on.ask(on.body(prompt, workflow, told=told))
    await _fill(on, fill, keep_s=0.0)
    await expect_kept(on, on.body(prompt, workflow), f"it was expected back before {fill} other tokens came")


CHECKS: tuple[Check, ...] = (
    pin_withstands_pressure,
    pin_ends_with_its_time,
    released_goes_first,
    kept_outlives_the_rest,
)
