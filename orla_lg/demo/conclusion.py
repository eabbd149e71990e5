"""How the demo ends: what wrapping changed, and the plumbing where it is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from orla_lg import timeline
from orla_lg.demo import compare, report
from orla_lg.demo.compare import BARE, WRAPPED
from orla_lg.demo.run import SLOTS, ArmResult, DemoResult, Plan
from orla_lg.timeline import Line


def load(plan: Plan) -> str:
    """Return what the arms are put to, and on what."""
    tickets, slots = len(plan.letters), SLOTS["heavy"]
    files = ", each with its customer's file" if plan.files else ""
    crowd = f", for an engine with slots for {slots}" if tickets > slots and not plan.url else ""
    return f"{tickets} tickets at once{files}{crowd}" if tickets > 1 else f"one ticket{files}"


def engines(plan: Plan) -> str:
    """Return what serves the arms, and in which state each arm finds it."""
    several = len(plan.arms) > 1
    if plan.url:
        return plan.url + ("; the prompts of each arm are new to its cache" if several else "")
    return f"two llama.cpp without a RAM cache beside their slots{', fresh for each arm' if several else ''}"


def of_many(result: DemoResult, plan: Plan, *, details: bool) -> list[Line]:
    """Return how a run with many tickets ended."""
    lines: list[Line] = []
    bare, wrapped = result.arm(BARE), result.arm(WRAPPED)
    if bare is not None and wrapped is not None and result.complete:
        lines += [((compare.sentence(bare.figures, wrapped.figures), "bold"),), ()]
        lines += [*compare.bars(bare.figures, wrapped.figures), ()]
    if calls := [(arm.arm, arm.calls) for arm in result.arms if arm.calls]:
        lines += [*compare.table(calls), ()]
    lines += [_pair("load", load(plan)), _pair("engines", engines(plan))]
    if len(plan.arms) > 1:
        lines += [_pair("arms", "bare is the graph with plain ChatOpenAI, wrapped is orla.wrap(graph)")]
    if result.interrupted:
        lines += [_pair("stopped", "by Ctrl-C, so there is nothing to compare; the engines are stopped, too")]
    lines += [_pair("letters", "; ".join(map(_letters, result.arms)))]
    lines += [_pair("answers", _replaced(result.arms, details=details))]
    return lines + _told(result, plan, details=details)


def of_one(result: DemoResult, plan: Plan, *, width: int, details: bool) -> list[Line]:
    """Return how a run with one ticket ended: its calls as lines of time, and what they add up to."""
    arm = result.arms[-1]
    figures = arm.figures
    lines: list[Line] = []
    if arm.spans:
        lines += [*timeline.chart(arm.spans, width), ()]
    known = figures.computed_tokens is not None
    cached = figures.prompt_tokens - (figures.computed_tokens or 0)
    found = f", {cached:,} of {figures.prompt_tokens:,} prompt tokens found in the cache" if known else ""
    lines += [_pair("calls", f"{figures.calls} in {figures.whole_s:.1f} s{found}")]
    lines += [_pair("answers", _replaced(result.arms, details=details))]
    return lines + _told(result, plan, details=details)


def _told(result: DemoResult, plan: Plan, *, details: bool) -> list[Line]:
    lines = [_pair("outbox", str(plan.outbox))] if plan.outbox is not None else []
    if plan.records is not None and result.arm(WRAPPED) is not None:
        lines.append(_pair("records", f"{plan.records}   (orla-lg explain --run {plan.records})"))
    if not details:
        return lines
    for arm in result.arms:
        lines += [(), ((f"{arm.arm}", "bold"),)]
        lines += [((line, ""),) for line in report.as_text(arm.board).splitlines()]
        lines += [((line, ""),) for line in _counted(arm)]
    return lines


def _counted(arm: ArmResult) -> list[str]:
    """Return the engines' own count beside that of their answers: it holds what orla_lg prefilled, too."""
    if arm.counted_tokens is None:
        return []
    return [f"{'counter':<10} {arm.counted_tokens:,} prompt tokens computed, as the engines' own counters say"]


def _letters(arm: ArmResult) -> str:
    failed = f", {arm.board.failed} failed" if arm.board.failed else ""
    name = f"{arm.arm}: " if arm.arm in (BARE, WRAPPED) else ""
    return f"{name}{arm.board.done} of {arm.board.tickets} answered in {arm.whole_s:.1f} s{failed}"


def _replaced(arms: Sequence[ArmResult], *, details: bool) -> str:
    """Return how many answers of the model were of no use: a tiny model's often are not."""
    calls = sum(call.ended_s is not None and not call.error for arm in arms for call in arm.calls)
    replaced = sum(arm.board.fallbacks.total() for arm in arms)
    if not calls:
        return "none"
    if not replaced:
        return f"all {calls} answers of the model could be used"
    more = "" if details else "; --details counts them by stage"
    return f"{replaced} of the model's {calls} could not be used; rules and a template stood in{more}"


def _pair(heading: str, text: str) -> Line:
    return ((f"{heading:<10} ", "dim"), (text, ""))
