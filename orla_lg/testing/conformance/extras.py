"""What else an engine may tell or do, and an adapter's own life: loops and closing."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from orla_lg.core.engine.backend import BackendAdapter, Capability, Effect
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.testing.conformance.streaming import expect_idle
from orla_lg.testing.conformance.subject import LITTLE, Subject, expect, skip
from orla_lg.testing.conformance.suite import Check, check

SEEN_LIMIT_S = 3.0
ENOUGH_LOOKS = 3
LOOP_LIMIT_S = 20.0
TEMPLATE_TOKENS = 2
"""What a chat template may add on one way and not on the other."""


@check(Capability.STATS)
async def stats_follow_the_load(on: Subject) -> None:
    """A running stream is counted as running, and no more once it ended; other figures can be."""
    await expect_idle(on, SEEN_LIMIT_S)
    looks = await _looks(on)
    if len(looks) < ENOUGH_LOOKS:
        skip(f"the answer ended after {len(looks)} looks")
    expect(any(said.running for said in looks), f"in {len(looks)} looks at a running stream none was counted")
    for said in looks:
        _expect_possible(said)
    await expect_idle(on, SEEN_LIMIT_S)


async def _looks(on: Subject) -> list[EngineStats]:
    """Return what the statistics said after each piece of a stream, until they counted it."""
    adapter: Any = on.adapter
    looks: list[EngineStats] = []
    began = time.perf_counter()
    async with on.stream(on.long_body()) as stream:
        async for chunk in stream:
            if chunk.text:
                looks.append(await adapter.stats())
                seen = looks[-1].running and len(looks) >= ENOUGH_LOOKS
                if seen or time.perf_counter() - began > SEEN_LIMIT_S:
                    break
    return looks


def _expect_possible(said: EngineStats) -> None:
    for name in ("running", "waiting", "prefix_queries", "prefix_hits", "preemptions"):
        count = getattr(said, name)
        expect(count is None or count >= 0, f"{name} is {count}")
    expect(said.kv_usage is None or 0 <= said.kv_usage <= 1, f"kv_usage is {said.kv_usage}, not a part of 1")
    expect(said.kv_tokens is None or said.kv_tokens > 0, f"kv_tokens is {said.kv_tokens}")
    hits, queries = said.prefix_hits, said.prefix_queries
    expect(hits is None or queries is None or hits <= queries, f"{hits} hits of {queries} queries")


@check(Capability.TOKENIZE, Capability.STREAM_USAGE)
async def tokens_are_those_of_the_prompt(on: Subject) -> None:
    """Tokenizing a request gives as many tokens as the engine counts for it."""
    adapter: Any = on.adapter
    for words in (10, 60):
        body = on.body(on.prompt(words), max_tokens=1)
        tokens = await adapter.tokenize(body)
        counted = (await on.ask(body)).usage.prompt_tokens
        expect(abs(len(tokens) - counted) <= TEMPLATE_TOKENS, f"{len(tokens)} tokens, the engine counted {counted}")
        expect(all(isinstance(token, int) for token in tokens), "a token is no number")


@check(Capability.SLEEP)
async def sleep_and_wake(on: Subject) -> None:
    """The model leaves memory and comes back, with an empty cache (only with ``disruptive=True``)."""
    if not on.disruptive:
        skip("it interrupts others; ask for it with disruptive=True")
    adapter: Any = on.adapter
    body = on.body(on.prompt(), on.unlike())
    await on.ask(body)
    effect = await adapter.sleep()
    expect(effect is Effect.FREED, f"sleeping was told as {effect}")
    effect = await adapter.wake()
    expect(effect is Effect.RESTORED, f"waking was told as {effect}")
    part = (await on.ask(body)).cached_part
    expect(part <= LITTLE, f"{part:.0%} of a prompt outlived the sleep")


@check()
async def works_in_any_loop(on: Subject) -> None:
    """One adapter serves event loops one after the other: nothing binds it to the first."""
    body = on.body(on.prompt(8), max_tokens=1)

    async def once() -> None:
        async with asyncio.timeout(LOOP_LIMIT_S):
            await on.adapter.probe()
            await on.ask(body)

    for _ in range(2):
        await asyncio.to_thread(asyncio.run, once())


@check()
async def closing_twice_is_fine(on: Subject) -> None:
    """An adapter can be closed before it was used, after, and twice."""
    unused, used = on.another(), on.another()
    await used.probe()
    for adapter in (unused, used):
        await _close_twice(adapter)


async def _close_twice(adapter: BackendAdapter) -> None:
    await adapter.aclose()
    await adapter.aclose()


CHECKS: tuple[Check, ...] = (
    stats_follow_the_load,
    tokens_are_those_of_the_prompt,
    sleep_and_wake,
    works_in_any_loop,
    closing_twice_is_fine,
)
