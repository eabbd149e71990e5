"""What engines say of cached prompt tokens, and warm-ups."""

from __future__ import annotations

from typing import Any

from orla_lg.core.engine.backend import Capability, Effect
from orla_lg.testing.conformance.subject import LITTLE, MUCH, Subject, expect, skip
from orla_lg.testing.conformance.suite import Check, check


@check(Capability.CACHED_TOKENS)
async def cached_tokens_are_real(on: Subject) -> None:
    """A long prompt is mostly cached the second time, and one that begins otherwise is not."""
    workflow, prompt = on.unlike(), on.prompt()
    first = await on.ask(on.body(prompt, workflow))
    again = await on.ask(on.body(prompt, workflow))
    other = await on.ask(on.body(on.prompt(), workflow))
    for answer in (first, again, other):
        used = answer.usage
        cached = used.cached_tokens
        expect(cached is not None, "no count of cached tokens came, though the probe says that they are counted")
        expect(0 <= (cached or 0) <= used.prompt_tokens, f"{cached} of {used.prompt_tokens} prompt tokens cached")
    expect(first.cached_part <= LITTLE, f"a prompt never seen before was cached to {first.cached_part:.0%}")
    expect(again.cached_part >= MUCH, f"the same prompt again was cached to {again.cached_part:.0%} only")
    expect(other.cached_part <= LITTLE, f"a prompt that begins otherwise was cached to {other.cached_part:.0%}")


@check()
async def cached_tokens_are_not_hidden(on: Subject) -> None:
    """Where the probe says that cached tokens are not counted, none are."""
    if (await on.probe()).can(Capability.CACHED_TOKENS):
        skip("the probe says that they are counted")
    prompt = on.prompt()
    await on.ask(on.body(prompt))
    cached = (await on.ask(on.body(prompt))).usage.cached_tokens
    expect(not cached, f"{cached} cached tokens were counted all the same")


@check(Capability.WARM, Capability.CACHED_TOKENS)
async def warm_up_helps(on: Subject) -> None:
    """After a warm-up says that it warmed, the real request finds most of its prompt."""
    workflow, prompt = on.unlike(), on.prompt()
    adapter: Any = on.adapter
    warmed = await adapter.warm(on.body(prompt, workflow))
    expect(warmed.effect is Effect.WARMED, f"the effect was {warmed.effect}")
    answer = await on.ask(on.body(prompt, workflow))
    expect(answer.cached_part >= MUCH, f"the request was cached to {answer.cached_part:.0%} only")
    counted = warmed.usage.prompt_tokens
    near = abs(counted - answer.usage.prompt_tokens) <= 2 or not counted
    expect(near, f"the warm-up counted {counted} tokens, the request {answer.usage.prompt_tokens}")


@check(Capability.WARM)
async def failed_warm_up_says_so(on: Subject) -> None:
    """A warm-up that the engine refuses is told as failed, without raising."""
    adapter: Any = on.adapter
    body = {**on.body(on.prompt(8)), "messages": "no messages at all"}
    effect = (await adapter.warm(body)).effect
    expect(effect in (Effect.FAILED, Effect.UNSUPPORTED), f"warming nonsense was told as {effect}")


CHECKS: tuple[Check, ...] = (
    cached_tokens_are_real,
    cached_tokens_are_not_hidden,
    warm_up_helps,
    failed_warm_up_says_so,
)
