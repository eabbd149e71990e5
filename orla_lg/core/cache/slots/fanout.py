"""Fan-out on slots: a branch waits for the slot that has its prefix, where that is sooner than prefilling it anew.

An engine with slots shares nothing between them: eight branches of a step in eight slots prefill eight times what
their prompts begin with; one after the other in one slot, they prefill it once. So a call that finds no idle slot
of its workflow with that prefix waits for a busy one, if

    what who sits there prefills beyond the prefix, and answers  <  the prefill of the prefix

in seconds, at the backend's pace. The left side is what one more in the line costs the step, the right side what one
more slot does: slots share the engine's speed, so prefills beside each other take as long as one after the other, and
everybody waits for them. So the length of the line does not matter, nor what is left of the sitter's own prefill.
Where answers are long and prefills fast nobody waits.

A sitter that takes far longer than expected (its reader may pause) is waited for no more, and nobody waits past a
deadline. Prompts are compared by whole messages: what branches share must be messages of their own, as a system
prompt is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from orla_lg.core.cache.gate import GATE_TOKENS, PATIENCE_S
from orla_lg.core.cache.prefix.nodes import in_common
from orla_lg.core.cache.slots.table import SlotLease, SlotTable
from orla_lg.core.call import CHARS_PER_TOKEN, Ask, Call
from orla_lg.core.engine.speed import DECODE_TOKENS_PER_S, PREFILL_TOKENS_PER_S, Speed
from orla_lg.core.queues import BackendQueue, Queued

OVERDUE = 3.0
"""A sitter is overdue after so many times what it should take; never before ``PATIENCE_S``: a machine may be slow,
and another prefill would make it slower."""


def better_waiting(
    table: SlotTable, sitting: Mapping[Queued, SlotLease], queue: BackendQueue, speed: Speed, now: float
) -> dict[Queued, float]:
    """Return the waiting calls that had better stay queued, each with when (monotonic) to look again.

    Args:
        table: The slots.
        sitting: The calls in them.
        queue: Whoever waits.
        speed: Of the backend.
        now: Monotonic seconds.
    """
    held: dict[Queued, float] = {}
    for workflow, due_s in _sitters(table, sitting, queue, speed, now).items():
        for queued in queue.waiting_of([workflow]):
            ask = queued.call.ask
            length = max(in_common(ask.prefix, sitter.call.ask.prefix) for sitter in due_s)
            saved = _tokens(ask, table.reusable(workflow, ask.prefix), length)
            if saved < GATE_TOKENS:
                continue
            prefix = ask.prefix[:length]
            there = [each for each in due_s if each.call.ask.prefix[:length] == prefix]
            wait_s = min(_service_s(each.call, length, speed) for each in there)
            until_s, deadline_s = min(due_s[each] for each in there), queued.call.deadline_at_s
            if wait_s < _prefill_s(saved, speed) and (deadline_s is None or until_s < deadline_s):
                held[queued] = until_s
    return held


def _sitters(
    table: SlotTable, sitting: Mapping[Queued, SlotLease], queue: BackendQueue, speed: Speed, now: float
) -> dict[str, dict[Queued, float]]:
    """Return, by workflow with waiting calls, who sits in a slot that may be waited for, and until when."""
    found: dict[str, dict[Queued, float]] = defaultdict(dict)
    for queued, seat in sitting.items():
        slot, workflow = table.slots[seat.slot], queued.call.identity.workflow
        due_s = slot.last_used_s + max(PATIENCE_S, OVERDUE * _service_s(queued.call, 0, speed))
        if workflow in queue.by_workflow and not slot.flush_when_idle and now < due_s:
            found[workflow][queued] = due_s
    return found


def resident_tokens(table: SlotTable, sitting: Iterable[Queued], workflow: str, ask: Ask) -> float:
    """Return how much of a prompt its workflow's slots hold, or will once who sits there is prefilled."""
    prefix = ask.prefix
    there = [each.call.ask.prefix for each in sitting if each.call.identity.workflow == workflow]
    length = max((in_common(prefix, each) for each in there), default=0)
    return _tokens(ask, 0, max(length, table.reusable(workflow, prefix)))


def _tokens(ask: Ask, start: int, end: int) -> float:
    """Return the tokens of some of a prompt's messages, by their length."""
    return sum(chars for _, chars in ask.pieces[start:end]) / CHARS_PER_TOKEN


def _prefill_s(tokens: float, speed: Speed) -> float:
    return tokens / (speed.prefill_tokens_per_s or PREFILL_TOKENS_PER_S)


def _service_s(call: Call, start: int, speed: Speed) -> float:
    """Return what a call takes that finds the messages before *start* in the cache."""
    own = _prefill_s(_tokens(call.ask, start, len(call.ask.pieces)), speed)
    return own + call.expected_answer_tokens / (speed.decode_tokens_per_s or DECODE_TOKENS_PER_S)
