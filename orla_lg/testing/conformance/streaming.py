"""Streams: pieces as they come, counts at the end, refusals by name, and an end when the reader leaves."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import httpx

from orla_lg.core.engine.backend import Capability, Directions
from orla_lg.core.engine.capabilities import Observable
from orla_lg.errors import EngineRefused
from orla_lg.testing.conformance.subject import StreamedAnswer, Subject, expect, read_some, skip
from orla_lg.testing.conformance.suite import Check, check

TOGETHER = 8
CLOSE_LIMIT_S = 5.0
TOOL_LIMIT_S = 30.0
POLL_S = 0.02
TOO_LONG_TO_BE_TOO_LONG = 300_000
"""A context of more tokens than this is not overfilled."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"colour": {"type": "string", "enum": ["red", "green"]}, "sure": {"type": "boolean"}},
    "required": ["colour", "sure"],
    "additionalProperties": False,
}


@check()
async def tokens_come_one_by_one(on: Subject) -> None:
    """An answer comes in pieces while it is made, not all at its end."""
    answer = StreamedAnswer((), ())
    for _ in range(3):
        answer = await on.ask(on.body(on.prompt(16, "Tell me about all of these."), max_tokens=16))
        pieces = [at for chunk, at in zip(answer.chunks, answer.arrivals_s, strict=True) if chunk.text]
        if len(pieces) > 2:
            break
    else:
        skip(f"three answers of fewer than three pieces: {answer.text!r}")
    spread_ms = 1000 * (pieces[-1] - pieces[0])
    expect(spread_ms > 2, f"{len(pieces)} pieces came within {spread_ms:.2f} ms, {pieces[0]:.2f} s after the request")


@check(Capability.STREAM_USAGE)
async def usage_comes_at_the_end(on: Subject) -> None:
    """A stream ends with a reason and token counts: a prompt above zero, an answer within what was allowed."""
    allowed = 12
    answer = await on.ask(on.body(on.prompt(16), max_tokens=allowed))
    used = answer.usage
    expect(answer.finish_reason, "no finish reason")
    last_text = max((number for number, chunk in enumerate(answer.chunks) if chunk.text), default=-1)
    usage_at = max(number for number, chunk in enumerate(answer.chunks) if chunk.usage is not None)
    expect(usage_at >= last_text, "text came after the last token counts")
    expect(used.prompt_tokens > 0, f"a prompt of {used.prompt_tokens} tokens")
    expect(used.completion_tokens <= allowed, f"{used.completion_tokens} tokens, {allowed} were allowed")
    expect(used.completion_tokens > 0 or not answer.text, f"no tokens counted for {answer.text!r}")
    full = answer.finish_reason != "length" or used.completion_tokens == allowed
    expect(full, f"ended for its length, but counts {used.completion_tokens} of {allowed} tokens")


@check(Capability.STREAM_USAGE)
async def streams_do_not_mix(on: Subject) -> None:
    """Eight streams at once each get their own prompt's counts."""
    prompts = [on.prompt(10 + 20 * number) for number in range(TOGETHER)]
    bodies = [on.body(prompt, on.unlike(), max_tokens=4) for prompt in prompts]
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(on.ask(body)) for body in bodies]
    counts = [task.result().usage.prompt_tokens for task in asked]
    expect(counts == sorted(set(counts)), f"prompts of growing length counted {counts} tokens")


@check()
async def too_long_is_refused(on: Subject) -> None:
    """A prompt longer than the context raises EngineRefused with a status of 4xx."""
    context = (await on.probe()).context_tokens
    if context is None or context > TOO_LONG_TO_BE_TOO_LONG:
        skip(f"the context is {context or 'not told'}")
    await _expect_refused(on, on.body(on.prompt(context + context // 2 + 64)), f"{context * 3 // 2} words")


@check()
async def unknown_model_is_refused(on: Subject) -> None:
    """A model that is not served raises EngineRefused with a status of 4xx, unless the engine takes any name."""
    if not (await on.probe()).models:
        skip("the engine does not list its models")
    body = {**on.body(on.prompt(8), max_tokens=1), "model": "orla-no-such-model"}
    try:
        answer = await on.ask(body)
    except EngineRefused as error:
        expect(400 <= error.status < 500, f"refused with status {error.status}: {error}")
    else:
        expect(answer.finish_reason, "no refusal, and no answer either")
        skip("the engine takes any model's name")


async def _expect_refused(on: Subject, body: dict[str, Any], what: str) -> None:
    try:
        await on.ask(body)
    except EngineRefused as error:
        expect(400 <= error.status < 500, f"refused with status {error.status}: {error}")
    else:
        expect(False, f"{what} were not refused")


@check()
async def closing_frees_the_engine(on: Subject) -> None:
    """Closing a stream early ends it on the engine, soon."""
    body = on.long_body()
    async with on.stream(body) as stream:
        pace_s = await read_some(stream)
        began = time.perf_counter()
        await asyncio.wait_for(stream.aclose(), CLOSE_LIMIT_S)
        took_s = time.perf_counter() - began
    expect(took_s < CLOSE_LIMIT_S, f"closing took {took_s:.1f} s")
    await expect_idle(on, within_s=_soon_s(pace_s, body))


def _soon_s(pace_s: float, body: dict[str, Any]) -> float:
    """Return well less time than a stream would take to its natural end."""
    return min(CLOSE_LIMIT_S, max(0.3, pace_s * int(body["max_tokens"]) / 3))


async def expect_idle(on: Subject, within_s: float) -> None:
    """Expect that nothing runs on the engine soon; without statistics, that it answers as fast as if idle."""
    began = time.perf_counter()
    if not ((await on.probe()).can(Capability.STATS) and isinstance(on.adapter, Observable)):
        await on.ask(on.body(on.prompt(4), max_tokens=1))
        waited = time.perf_counter() - began
        expect(waited < CLOSE_LIMIT_S + within_s, f"the next request waited {waited:.1f} s")
        return
    while True:
        running = (await on.adapter.stats()).running
        if not running or time.perf_counter() - began > within_s:
            break
        await asyncio.sleep(POLL_S)
    expect(not running, f"{running} requests still run {within_s:.1f} s later")


@check(Capability.ABORT)
async def abort_ends_a_call(on: Subject) -> None:
    """A running stream ends when its call is aborted by id, and an unknown id harms nobody."""
    adapter: Any = on.adapter
    call = on.unlike()
    body = on.long_body(told=Directions(call_id=call, workflow=on.unlike()))
    await adapter.abort("orla-no-such-call")
    async with on.stream(body) as stream:
        pace_s = await read_some(stream)
        expect(await adapter.abort(call), "abort said that the engine did not take it")
        try:
            async with asyncio.timeout(_soon_s(pace_s, body)):
                async for _ in stream:
                    pass
        except TimeoutError:
            expect(False, f"the stream still runs {_soon_s(pace_s, body):.1f} s after its abort")
        except Exception:  # noqa: BLE001 - a broken stream is an end too
            pass


@check(Capability.JSON_SCHEMA)
async def schema_is_obeyed(on: Subject) -> None:
    """An answer under a JSON schema parses and has the schema's keys and values."""
    form = {"type": "json_schema", "json_schema": {"name": "guess", "strict": True, "schema": SCHEMA}}
    answer = await on.ask(on.body(on.prompt(8, "Which colour?"), max_tokens=64, response_format=form))
    try:
        said = json.loads(answer.text)
    except json.JSONDecodeError:
        said = None
    good = isinstance(said, dict) and set(said) == {"colour", "sure"} and said["colour"] in ("red", "green")
    expect(good and isinstance(said["sure"], bool), f"the answer was {answer.text[:120]!r}")


@check(Capability.TOOLS)
async def tools_are_taken(on: Subject) -> None:
    """A request with a tool is accepted, and a call that comes back names it, with JSON arguments."""
    backend = on.backend or skip("the adapter has no `backend` to ask over HTTP")
    tool = {"type": "function", "function": {"name": "guess", "strict": True, "parameters": SCHEMA}}
    body = on.body(on.prompt(8, "Call guess."), max_tokens=96, tools=[tool], tool_choice="required")
    headers = {"Authorization": f"Bearer {backend.api_key or 'none'}"}
    async with httpx.AsyncClient(base_url=backend.url, timeout=TOOL_LIMIT_S, trust_env=False) as http:
        try:
            response = await http.post("chat/completions", json=body, headers=headers)
        except httpx.ConnectError:
            skip(f"nothing speaks HTTP at {backend.url}")
    expect(not response.is_error, f"status {response.status_code}: {response.text[:200]}")
    choice = response.json()["choices"][0]
    calls = choice["message"].get("tool_calls") or ()
    if not calls:
        skip("the model answered without a tool, so its calls were not seen")
    for call in calls:
        said = call["function"]
        expect(said["name"] == "guess", f"called {said['name']!r}, which nobody offered")
        try:
            arguments = json.loads(said["arguments"])
        except json.JSONDecodeError:
            arguments = None
        cut = choice["finish_reason"] == "length"
        expect(isinstance(arguments, dict) or cut, f"the arguments are no JSON object: {said['arguments'][:120]!r}")


CHECKS: tuple[Check, ...] = (
    tokens_come_one_by_one,
    usage_comes_at_the_end,
    streams_do_not_mix,
    too_long_is_refused,
    unknown_model_is_refused,
    closing_frees_the_engine,
    abort_ends_a_call,
    schema_is_obeyed,
    tools_are_taken,
)
