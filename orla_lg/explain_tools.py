"""What ``orla-lg explain`` says of tools: which began early, what that hid or why in vain, and why others did not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from orla_lg import timeline
from orla_lg.core.boundary.plain import counted, shown

BEGAN, DID_NOT_BEGIN = "early_tool", "late_tool"
"""What lines of a records file have that are about tools."""

NOT_BEGUN = {
    "not_declared": "it is not declared safe (tools_safe)",
    "unseen": "no node was seen to run a tool of that name yet",
    "approved": "its calls are approved first",
    "needs_its_place": "it needs what is there in its place only",
    "unused": "it is left out, since no call asked for what its starts returned in three answers in a row",
    "failing": "it is left out, since its starts failed in three answers in a row",
    "several": "several tools have its name there",
    "arguments": "its arguments are not valid",
    "no_loop": "it is a coroutine only, and the model was called in a thread",
    "no_room": "too many run or wait already",
    "unheard": "its call was not heard before the answer ended",
    "pending": "whether the engine answers the same when it is streamed was not known yet",
    "different": "the engine answers otherwise when it is streamed, or called no tool when asked",
    "off": "the backend has early_tools=False",
    "not_assembled": "the backend has assemble=False, and the answer was asked for in one piece",
    "request": "the request asks for what a stream may not bring",
    "client": "its client asks for the answer in one piece",
}
"""Why a tool did not begin before its turn."""

DROPPED = {
    "changed": "the answer, once whole, did not hold the call",
    "next_call": "its node made its next call, and no call had taken the result",
    "run_ended": "the run ended, and no call had taken the result",
    "not_begun": "its turn came before it could begin",
    "cancelled": "what waited for the result was cancelled",
    "too_many": "64 starts of its run waited",
    "too_long": "it waited for five minutes",
    "closed": "the Orla was closed",
    "failed": "it failed there, or needs its place, and ran again when its turn came",
}
"""Why a start came to nothing."""


def is_of_tool(row: Mapping[str, Any]) -> bool:
    """Whether a line is about a tool."""
    return BEGAN in row or DID_NOT_BEGIN in row


def by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return what an explained call has of the tools that its answer called."""
    kinds = {
        "early_tools": [row for row in rows if BEGAN in row],
        "late_tools": [row for row in rows if BEGAN not in row],
    }
    return {name: found for name, found in kinds.items() if found}


def of_answer(row: Mapping[str, Any]) -> list[str]:
    """Return what became of the tools that an explained call's answer called."""
    return [_line(each) for name in ("early_tools", "late_tools") for each in row.get(name) or ()]


def _line(row: Mapping[str, Any]) -> str:
    if DID_NOT_BEGIN in row:
        return f"tool {row[DID_NOT_BEGIN]!r} did not begin early: {_why(NOT_BEGUN, row.get('why'))}"
    name = f"tool {row[BEGAN]!r}"
    if "dropped" in row:
        ran_s = timeline.tool_span(row).duration_s
        return f"{name} began early in vain, {ran_s:.3f} s of it: {_why(DROPPED, row['dropped'])}"
    (_, hidden_s), (_, waited_s) = timeline.tool_span(row).phases
    waited = f"; its turn still waited {waited_s:.3f} s for it" if waited_s else "; it had ended when its turn came"
    return f"{name} began while the answer came, which hid {hidden_s:.3f} s{waited}"


def _why(texts: Mapping[str, str], reason: Any) -> str:
    return texts.get(str(reason), shown(reason, 200))


def of_run(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a run's tools in numbers: those that hid something, those in vain, and those that did not begin."""
    began = [row for row in rows if BEGAN in row]
    used, dropped = [row for row in began if "dropped" not in row], [row for row in began if "dropped" in row]
    late = [row for row in rows if DID_NOT_BEGIN in row]
    lines = []
    if used:
        hidden_s = sum(timeline.tool_span(row).phases[0][1] for row in used)
        lines.append(f"{counted(len(used), 'tool')} began early, which hid {hidden_s:.2f} s")
    if dropped:
        lines.append(f"{counted(len(dropped), 'tool')} began early in vain: {_counted(DROPPED, dropped, 'dropped')}")
    if late:
        lines.append(f"{counted(len(late), 'tool')} did not begin early: {_counted(NOT_BEGUN, late, 'why')}")
    return lines


def _counted(texts: Mapping[str, str], rows: Sequence[Mapping[str, Any]], key: str) -> str:
    times = Counter(_why(texts, row.get(key)) for row in rows)
    return "; ".join(why if len(times) == 1 else f"{count} as {why}" for why, count in times.most_common())
