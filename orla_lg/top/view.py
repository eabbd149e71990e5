"""What ``orla-lg top`` draws: backends and their queues, what each call waits for, where workflows' caches are."""

from __future__ import annotations

import io
import re
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orla_lg.control.state import BackendState, Holder, Occupancy, ProcessState
from orla_lg.core.boundary.plain import counted, shown
from orla_lg.core.cache.verification import VerificationCounts
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.memory.events import Doing
from orla_lg.core.operation.statistics import Waiting, WaitsFor

RATE_WINDOW_S = 10.0
"""Rates are means over so long."""

BAR = 12
PIPE_WIDTH = 120
"""Columns where there is no terminal to ask."""

ALL_ROWS = 1_000

PICTURE_WIDTH = 132

_STATE_STYLES = {
    "open": "green",
    "paused": "bold yellow",
    "drained": "bold yellow",
    "gone": "bold red",
    "?": "bright_black",
}
_ACTIVITY_STYLES = {
    Doing.GENERATING: "bright_cyan",
    Doing.TOOL: "magenta",
    Doing.HUMAN: "yellow",
    Doing.IDLE: "bright_black",
}
_WAITS = {
    WaitsFor.PLACE: "a place",
    WaitsFor.SLOT: "a cache slot",
    WaitsFor.CACHE: "its cache to fit ({tokens} tokens)",
    WaitsFor.PREFIX: "its prefix (another branch prefills it)",
    WaitsFor.PAUSED: "paused",
    WaitsFor.CIRCUIT: "circuit (another call tries the engine)",
}


class History:
    """The states of the last seconds; what grew between them is a rate."""

    def __init__(self) -> None:
        self._states: deque[ProcessState] = deque()

    def add(self, state: ProcessState) -> None:
        """Take in a state, and forget those that are too old."""
        self._states.append(state)
        while len(self._states) > 2 and state.at_s - self._states[1].at_s >= RATE_WINDOW_S:
            self._states.popleft()

    def rates(self, backend: str) -> tuple[float, float] | None:
        """Return ended calls and answered tokens per second; ``None`` while there is one state only."""
        first, last = self._states[0], self._states[-1]
        if backend not in first.backends or last.at_s <= first.at_s:
            return None
        before, after, seconds = first.backends[backend].spent, last.backends[backend].spent, last.at_s - first.at_s
        tokens = after.completion_tokens - before.completion_tokens
        return (after.calls - before.calls) / seconds, tokens / seconds


def frame(state: ProcessState, history: History, *, rows: int) -> RenderableType:
    """Return the whole view; the two lists have *rows* rows together at most."""
    title = Text("orla-lg top", style="bold", no_wrap=True, overflow="ellipsis")
    runs, threads, calls = counted(state.runs, "run"), counted(state.idle, "thread"), counted(state.calls, "call")
    title.append(f"   process {state.pid}   {runs} open, {threads} idle   {calls} ended", "bright_black")
    waits = [(name, each) for name, backend in state.backends.items() for each in backend.waits]
    waiting = sum(backend.waiting for backend in state.backends.values())
    for_waits = min(len(waits), max(rows // 2, rows - sum(len(b.kv.workflows) for b in state.backends.values())))
    blank = Text("")
    return Group(
        title, blank, _backends(state, history), blank, _orders(state), blank,
        _waits(waits[:for_waits], waiting), blank, _resident(state, rows - for_waits),
    )  # fmt: skip


# Backends


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black", expand=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in _NUMBERS else "left", no_wrap=True)
    return table


_NUMBERS = frozenset({
    "in flight", "waiting", "calls/s", "tok/s", "cached", "kept", "turn", "priority", "last call", "waited", "tokens",
})  # fmt: skip
"""Headings of columns with numbers."""


def _titled(title: str, table: Table, *below: Text) -> RenderableType:
    return Group(Text(title, style="bold"), table, *below)


def _backends(state: ProcessState, history: History) -> Table:
    table = _table(
        "backend",
        "engine",
        "state",
        "in flight",
        "waiting",
        "calls/s",
        "tok/s",
        "cached",
        "kept",
        "KV cache",
        "queue by stage",
    )
    for name, backend in state.backends.items():
        rates = history.rates(name)
        calls, tokens = ("–", "–") if rates is None else (f"{rates[0]:.1f}", f"{rates[1]:.0f}")
        shown_as = condition(backend)
        table.add_row(
            Text(name, style="bold"),
            backend.engine,
            Text(shown_as, style=_STATE_STYLES.get(shown_as, "bold red")),
            f"{backend.in_flight}/{backend.max_concurrency or '∞'}",
            Text(str(backend.waiting), style="yellow" if backend.waiting else "bright_black"),
            calls,
            tokens,
            _cached(backend),
            _kept(backend),
            _kv(backend.kv),
            _stages(backend),
        )
    return table


def condition(backend: BackendState) -> str:
    """Return a backend's state in a word or two."""
    if backend.paused:
        return "paused" if backend.in_flight else "drained"
    if backend.circuit is not Circuit.CLOSED:
        return f"circuit {backend.circuit}"
    return {True: "open", False: "gone", None: "?"}[backend.reachable]


def _cached(backend: BackendState) -> str:
    prompt = backend.spent.prompt_tokens
    return f"{100 * backend.spent.cached_tokens / prompt:.0f} %" if prompt else "–"


def _kept(backend: BackendState) -> str:
    """Return how much of what was expected to be cached was still there."""
    truth = backend.truth
    return f"{100 * truth.verified_tokens / truth.claimed_tokens:.0f} %" if truth.claimed_tokens else "–"


def _kv(kv: Occupancy) -> Text:
    if not kv.capacity_tokens:
        said = "1 token" if kv.resident_tokens == 1 else f"{short(kv.resident_tokens)} tokens"
        return Text(said, style="bright_black")
    part = (kv.resident_tokens + kv.promised_tokens) / kv.capacity_tokens
    filled = min(BAR, round(BAR * part))
    text = Text("█" * filled, style="green" if part < 0.9 else "yellow")
    text.append("░" * (BAR - filled), "bright_black")
    return text.append(f" {short(kv.resident_tokens)} of {short(kv.capacity_tokens)}", "default")


def _stages(backend: BackendState) -> str:
    most = sorted(backend.waiting_by_stage.items(), key=lambda each: -each[1])
    return " · ".join(f"{_brief(stage) or '(no graph)'} {count}" for stage, count in most[:6]) + (
        " …" if len(most) > 6 else ""
    )


def short(tokens: int) -> str:
    """Return a count of tokens in five characters or so."""
    if tokens < 10_000:
        return str(tokens)
    return f"{tokens / 1e3:.0f}k" if tokens < 10_000_000 else f"{tokens / 1e6:.0f}M"


# What was asked of caches


def _orders(state: ProcessState) -> RenderableType:
    asked = {name: backend for name, backend in state.backends.items() if backend.cache_effects}
    if not asked:
        return Text("no cache was given an order", style="bright_black")
    table = _table("backend", "order, and how often what came of it", "what the workflow's next call found")
    for name, backend in asked.items():
        table.add_row(name, _effects(backend.cache_effects), _verdicts(backend.truth))
    return _titled("orders to caches", table)


def _effects(counts: Mapping[str, int]) -> str:
    """Return what came of orders, by order: ``flush: 40 freed, 2 deferred``."""
    most = sorted(counts.items(), key=lambda each: -each[1])
    by_order: dict[str, list[str]] = {}
    for each, count in most[:6]:
        order, _, effect = each.partition(":")
        by_order.setdefault(order, []).append(f"{count} {effect}")
    return " · ".join(f"{order}: {', '.join(came)}" for order, came in by_order.items()) + " …" * (len(most) > 6)


def _verdicts(truth: VerificationCounts) -> Text:
    borne_out, refuted = sum(truth.borne_out.values()), sum(truth.refuted.values())
    if not borne_out + refuted:
        return Text("–", style="bright_black")
    return Text(f"{borne_out} of {borne_out + refuted} as ordered", style="yellow" if refuted else "green")


# Waiting calls, and workflows in the cache


def _waits(waits: list[tuple[str, Waiting]], waiting: int) -> RenderableType:
    if not waiting:
        return Text("no call waits", style="bright_black")
    tenants, odds = (any(getattr(each, name) for _, each in waits) for name in ("tenant", "final_odds"))
    table = _table(
        "turn", "backend", *(("tenant",) if tenants else ()), "workflow", "stage", "priority",
        *(("last call",) if odds else ()), "waited", "waits for",
    )  # fmt: skip
    for nth, (backend, each) in enumerate(waits, start=1):
        table.add_row(
            str(nth), backend, *_tenant(each, shown=tenants), _brief(each.workflow),
            shown(each.stage, 60) or "(no graph)", f"{each.priority:g}",
            *((f"{each.final_odds or 0:.0%}",) if odds else ()), f"{each.waited_s:.1f} s", waits_for(each),
        )  # fmt: skip
    return _titled("calls that wait", table, *_more(waiting - len(waits), "wait"))


def waits_for(each: Waiting) -> str:
    """Return in words what a call waits for."""
    return _WAITS[each.waits_for].format(tokens=each.expected_tokens)


def _resident(state: ProcessState, rows: int) -> RenderableType:
    held = [(name, each) for name, backend in state.backends.items() for each in backend.kv.workflows]
    activities = list(Doing)  # the busy ones first
    held.sort(
        key=lambda each: (activities.index(each[1].state), -each[1].tokens, each[1].workflow, each[1].tenant or "")
    )
    if not held:
        return Text("no workflow is known to hold KV cache", style="bright_black")
    tenants = any(each.tenant for _, each in held[:rows])
    table = _table("workflow", *(("tenant",) if tenants else ()), "backend", "tokens", "now")
    for backend, each in held[:rows]:
        table.add_row(
            _brief(each.workflow),
            *_tenant(each, shown=tenants),
            backend,
            short(each.tokens),
            Text(each.state, style=_ACTIVITY_STYLES[each.state]),
        )
    holders = sum(backend.kv.holders for backend in state.backends.values())
    return _titled("workflows whose KV cache is held", table, *_more(holders - min(len(held), rows), "hold cache"))


def _brief(text: str) -> str:
    """Return a text of the application's in a column's width."""
    return shown(text, 24)


def _tenant(each: Waiting | Holder, *, shown: bool) -> tuple[str, ...]:
    return (_brief(each.tenant or ""),) if shown else ()


def _more(count: int, what: str) -> list[Text]:
    verb = {"wait": "waits", "hold cache": "holds cache"}[what] if count == 1 else what
    return [Text(f"and {count} more {verb}", style="bright_black")] if count > 0 else []


# On a terminal, and once


def print_once(states: Iterable[ProcessState]) -> None:
    """Print each state, one below the other, with all that was sent."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False, markup=False)
    for state in states:
        history = History()
        history.add(state)
        console.print(frame(state, history, rows=ALL_ROWS))


def live(states: Iterable[ProcessState]) -> None:
    """Draw each state over the one before; the terminal is as it was afterwards."""
    console, history = Console(highlight=False, markup=False), History()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as shown:
        for state in states:
            history.add(state)
            rows = max(4, console.height - 2 * len(state.backends) - 15)
            shown.update(frame(state, history, rows=rows), refresh=True)


def save_svg(drawn: RenderableType, path: Path) -> None:
    """Write a picture of a view, without reference to fonts elsewhere."""
    console = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(drawn, markup=False)
    picture = console.export_svg(title="orla-lg top")
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")
