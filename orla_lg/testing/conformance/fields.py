"""What an adapter adds to a request: only what its engine takes, and in the engine's own order."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Capability, Directions
from orla_lg.testing.conformance.subject import Subject, expect
from orla_lg.testing.conformance.suite import Check, check

CALLERS_OWN = {"model", "messages", "tools", "tool_choice", "response_format", "stream", "stream_options", "n"}
"""Fields that decide what the caller gets: not an adapter's."""

URGENCIES = (-100.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 100.0)

_ASK = Ask("any", [{"role": "user", "content": "hello"}])


def _many(slots: int | None) -> list[Directions]:
    slot = None if slots is None else slots - 1
    odd = "a thread/with odd: 'characters' é"
    return [
        Directions(),
        *(Directions(call_id="call-1", workflow="w-1", priority=how, slot=slot) for how in (-3.0, 0.0, 2.5, 1e6)),
        *(Directions(call_id="call-2", workflow="w-2", keep_s=keep_s, slot=slot) for keep_s in (0.0, 0.5, 1e9)),
        Directions(call_id="call-3", workflow=odd, stage=odd, slot=slot, fresh=True),
    ]


@check()
async def fields_are_json(on: Subject) -> None:
    """Extra fields are JSON, the same for the same directions, and leave the caller's own alone."""
    for told in _many((await on.probe()).slots):
        fields = on.adapter.request_fields(_ASK, told)
        try:
            json.dumps(fields, allow_nan=False)
        except (TypeError, ValueError) as error:
            expect(False, f"{told} gives what is no JSON: {error}")
        expect(fields == on.adapter.request_fields(_ASK, told), f"{told} gives different fields the second time")
        expect(not CALLERS_OWN & set(fields), f"{told} overrides {sorted(CALLERS_OWN & set(fields))}")


@check()
async def fields_are_accepted(on: Subject) -> None:
    """The engine answers requests with the fields of any directions: urgent, fractional, negative, fresh."""
    for told in _many((await on.probe()).slots):
        body = on.body(on.prompt(8), told=told, max_tokens=1)
        try:
            await on.ask(body)
        except Exception as error:  # noqa: BLE001 - any failure here is the fields'
            added = on.adapter.request_fields(_ASK, told)
            expect(False, f"with {added} the engine answered: {error}")


@check(Capability.PRIORITY)
async def priority_keeps_order(on: Subject) -> None:
    """A more urgent call never gets a less urgent number, and one of which nothing was said a neutral one."""
    each = [
        on.adapter.request_fields(_ASK, Directions(call_id="c", workflow="w", priority=urgency))
        for urgency in URGENCIES
    ]
    names = {name for fields in each for name in fields}
    moving = {name for name in names if len({repr(fields.get(name)) for fields in each}) > 1}
    expect(moving, "no field depends on the priority")
    for name in moving:
        _expect_ordered(name, [fields.get(name, 0) for fields in each])


def _expect_ordered(name: str, values: list[Any]) -> None:
    expect(all(isinstance(value, int | float) for value in values), f"{name} is no number: {values}")
    steps = [later - earlier for earlier, later in pairwise(values)]
    ordered = all(step >= 0 for step in steps) or all(step <= 0 for step in steps)
    expect(ordered, f"{name} for {URGENCIES}: {values}, not in order")
    by_urgency = dict(zip(URGENCIES, values, strict=True))
    expect(by_urgency[0.0] == 0, f"{name} is {by_urgency[0.0]} where nothing was said, which is not neutral")
    whole = [by_urgency[urgency] for urgency in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    expect(len(set(whole)) == len(whole), f"{name} is the same for different priorities: {whole}")


CHECKS: tuple[Check, ...] = (fields_are_json, fields_are_accepted, priority_keeps_order)
