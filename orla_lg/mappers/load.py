"""Load-aware: keeps a stage where it was mapped, unless another backend would be done sooner.

What a call is expected to take on a backend is what it waits in our queue and in the engine's, the prefill of
those tokens of its prompt that are not in the KV cache there, nor on their way into it, and the decoding of its
answer. So a workflow that moves pays for its cache: it stays where a short queue costs less than a long prefill
elsewhere, and the branches of a step stay together where one of them already prefills what all begin with.

Backends are weighed only where home is saturated, or where an alternative has much more of the prompt in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from orla_lg.arguments import answering
from orla_lg.core.boundary import checked
from orla_lg.core.cache.gate import GATE_TOKENS
from orla_lg.core.call import CHARS_PER_TOKEN, Ask, Assignment, Call, Considered
from orla_lg.core.engine.speed import USUAL
from orla_lg.core.mapping import Consultation, Mapper, Planned, foretold
from orla_lg.core.placement.view import BackendView, find, unfit
from orla_lg.core.steps import Steps
from orla_lg.errors import ConfigError
from orla_lg.mappers.table import Entry, part_of


@dataclass(frozen=True, slots=True)
class Expected:
    """What a call is expected to take on one backend, in seconds."""

    wait_s: float
    prefill_s: float
    decode_s: float

    @property
    def total_s(self) -> float:
        """From now to the last token; infinite behind an open circuit, or while it is paused."""
        return self.wait_s + self.prefill_s + self.decode_s


@answering
class LoadAware:
    """Asks *inner*, and moves a call to one of its alternatives where that is clearly sooner.

    Args:
        inner: Says the home of a stage and its alternatives; without alternatives nothing ever moves.
        margin: A call moves if it is expected to take less than this part of the time it takes at home.

    Raises:
        ConfigError: The margin is not in (0, 1].
    """

    def __init__(self, inner: Mapper | Mapping[str, Entry], margin: float = 0.9) -> None:
        if not 0 < checked.number("the margin", margin) <= 1:
            raise ConfigError(f"the margin must lie in (0, 1], got {margin}")
        self.inner = part_of(inner)
        self.margin = margin

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:  # noqa: D102
        chosen: Assignment | None = yield from ask.mapper(self.inner, call, backends)
        if chosen is None or not chosen.alternatives:
            return chosen
        home = find(backends, chosen.backend)
        if home is None:
            return chosen
        others = [view for name in chosen.alternatives if (view := find(backends, name)) not in (None, home)]
        if not (saturated(home) or _has_more(home, others)):
            return chosen
        return self._weighed(call, chosen, [home, *others])

    def foretell(self, stage: str) -> Planned | None:
        """Return what *inner* will say of a stage."""
        home = foretold(self.inner, stage)
        return home and replace(home, by=f"{home.by}, by load")

    def _weighed(self, call: Call, chosen: Assignment, views: Sequence[BackendView]) -> Assignment:
        home, asked = views[0], call.ask.given(chosen.parameters)
        faults = {view.name: unfit(asked, view, chosen.model) for view in views}
        expected = {view.name: expect(asked, view, views) for view in views if not faults[view.name]}
        at_home = expected[home.name].total_s if home.name in expected else math.inf
        best = min(expected, key=lambda name: expected[name].total_s, default=home.name)
        soonest = expected[best].total_s if best in expected else math.inf
        to = best if soonest < self.margin * at_home else home.name
        return replace(
            chosen,
            backend=to,
            mapper=f"load+{chosen.mapper}",
            reason=f"{chosen.reason}; {_why(home.name, to, at_home, soonest)}",
            alternatives=tuple(n for n in dict.fromkeys((home.name, *chosen.alternatives)) if n != to),
            considered=tuple(
                Considered(v.name, numbers(v, expected.get(v.name)), _verdict(v, faults[v.name], home.name, to))
                for v in views
            ),
        )


def saturated(view: BackendView) -> bool:
    """Whether a call for this backend would have to wait, as far as we know."""
    full = view.max_concurrency is not None and view.in_flight >= view.max_concurrency
    engine_waits = view.load is not None and bool(view.load.waiting)
    return view.shut or _waiting(view) > 0 or full or engine_waits


def _waiting(view: BackendView) -> int:
    """Return how many calls wait for a place; those that wait for a prefix will not take one from others."""
    return max(0, view.waiting - view.waiting_for_prefix)


def _has_more(home: BackendView, others: Sequence[BackendView]) -> bool:
    """Whether another backend has so much more of the prompt in its cache that going there may be worth it."""
    most = max((view.resident_tokens for view in others), default=0)
    return most >= GATE_TOKENS and most - home.resident_tokens >= GATE_TOKENS


def expect(ask: Ask, view: BackendView, among: Sequence[BackendView]) -> Expected:
    """Return what *ask* is expected to take on *view*; a figure not measured yet is taken from *among*."""
    answer = _figure("completion_tokens", among[0], among)  # as long as at home, wherever it is made
    if ask.max_tokens is not None:
        answer = min(answer, ask.max_tokens)
    prompt = ask.prompt_chars / CHARS_PER_TOKEN
    return Expected(
        wait_s=_wait_s(view, _figure("service_s", view, among)),
        prefill_s=max(0.0, prompt - view.resident_tokens) / _figure("prefill_tokens_per_s", view, among),
        decode_s=answer / _figure("decode_tokens_per_s", view, among),
    )


def _wait_s(view: BackendView, service_s: float) -> float:
    """Return what a call waits in our queue and in the engine's, in seconds."""
    if view.shut:
        return math.inf
    wait_s = 0.0
    places = view.max_concurrency or max(view.in_flight, 1)
    if _waiting(view) or (view.max_concurrency is not None and view.in_flight >= view.max_concurrency):
        wait_s += (_waiting(view) + 1) * service_s / places
    if view.load is not None and view.load.waiting:
        wait_s += view.load.waiting * service_s / max(view.load.running or 1, 1)
    return wait_s


def _figure(name: str, view: BackendView, among: Sequence[BackendView]) -> float:
    """Return a figure of a backend's speed; the mean of the others' where it was not measured yet."""
    own: float | None = getattr(view.speed, name)
    if own:
        return own
    known = [figure for each in among if (figure := getattr(each.speed, name))]
    usual: float = getattr(USUAL, name)
    return sum(known) / len(known) if known else usual


def numbers(view: BackendView, expected: Expected | None) -> dict[str, float]:
    """Return what was seen of a backend, for the record; an infinite time is left out."""
    seen: dict[str, float] = {
        "waiting": view.waiting,
        "in_flight": view.in_flight,
        "resident_tokens": view.resident_tokens,
    }
    if view.load is not None and view.load.waiting is not None:
        seen["engine_waiting"] = view.load.waiting
    if expected is None or expected.total_s == math.inf:
        return seen
    parts = {"wait_s": expected.wait_s, "prefill_s": expected.prefill_s, "decode_s": expected.decode_s}
    return {
        "expected_s": round(expected.total_s, 6),
        **{name: round(value, 6) for name, value in parts.items()},
        **seen,
    }


def _why(home: str, to: str, at_home: float, soonest: float) -> str:
    if to != home:
        there = f"expected {at_home:.2f} s" if at_home < math.inf else "not to be had"
        return f"{home!r} {there}, {to!r} {soonest:.2f} s"
    return f"nothing is clearly sooner than {home!r}"


def _verdict(view: BackendView, faults: Sequence[str], home: str, to: str) -> str:
    if faults:
        return "; ".join(faults)
    if view.shut:
        return "paused" if view.paused else "circuit open"
    if view.name == to:
        return "chosen"
    return "home" if view.name == home else "alternative"
