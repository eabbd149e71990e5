"""An engine in numbers, found in the records of calls that it served beside one another.

First a least-squares fit: how long a call's tokens took, by what the engine did meanwhile for all calls. Then the
unchanged setting is simulated, and prefill and decode are scaled until their sums are those that were recorded: what
calls waited for inside the engine, which no record tells apart, is in those sums.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import exp, gcd, log
from statistics import fmean, median

from orla_lg.errors import ConfigError
from orla_lg.replay.simulation import Played, with_scaled
from orla_lg.replay.traffic import RecordedCall
from orla_lg_sim.fit import Sample, fit
from orla_lg_sim.parameters import EngineParameters

LEAST_CALLS = 8
"""Counted calls that a calibration needs."""

DECODE_TO_PREFILL = 30.0
"""So much longer a token of an answer usually takes than one of a prompt: a first guess of when the first token of a
call came that did not stream."""

MOST_CALLS = 1_500
"""Calls that the fit looks at, evenly taken; more say little more."""

MOST_BLOCKS = 1_000_000
LEAST_BLOCK_TOKENS, USUAL_BLOCK_TOKENS, MOST_BLOCK_TOKENS = 8, 16, 512
USUAL_RUNNING, USUAL_BATCH_TOKENS = 256, 8_192
"""vLLM's defaults, where nothing is said."""

ROUNDS = 8
CLOSE = 0.01
STEP = 0.8
"""Of what is missing in a round's logarithm, so much is made good: the load answers to the speed."""

FARTHEST = 3.0
"""Samples of the fit that are off by more than so many times the median are left out: calls that waited inside."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """An engine's numbers and how they came about."""

    parameters: EngineParameters
    calls: int
    """So many calls it was fitted to; 0: it was given."""
    streamed: bool = True
    """Whether they streamed, so that prefill and decode were told apart."""


def block_tokens_in(calls: Sequence[RecordedCall]) -> int:
    """Return the size of a cache's blocks: what all counts of cached tokens are multiples of."""
    found = reduce(gcd, {call.cached_tokens for call in calls if call.cached_tokens}, 0)
    return found if LEAST_BLOCK_TOKENS <= found <= MOST_BLOCK_TOKENS else USUAL_BLOCK_TOKENS


def pool(calls: Sequence[RecordedCall], kv_tokens: int | None, base: EngineParameters) -> EngineParameters:
    """Return an engine with a pool of so many tokens; ``None``: with one in which all the calls' tokens have room.

    No pool is larger than what all calls together could fill: what stands in a file must not size memory.
    """
    block = base.block_tokens
    needed = sum((call.prompt_tokens or 0) + (call.completion_tokens or 0) + block for call in calls) // block + 2
    wanted = needed if kv_tokens is None else kv_tokens // block
    longest = max(((call.prompt_tokens or 0) + (call.completion_tokens or 0) for call in calls), default=1)
    return replace(
        base, kv_blocks=max(1, min(wanted, needed, MOST_BLOCKS)), context_tokens=max(base.context_tokens, longest)
    )


def fitted(name: str, calls: Sequence[RecordedCall]) -> Calibrated:
    """Return the numbers that explain best how long these calls of a backend took.

    Where too few streamed, all are taken: how long each took as a whole, by lengths of prompts and answers.

    Raises:
        ConfigError: Too few of them were counted.
    """
    counted = [call for call in calls if call.is_counted]
    streamed = [call for call in counted if call.first_s is not None]
    did_stream = len(streamed) >= LEAST_CALLS
    taken = streamed if did_stream else counted
    if len(taken) < LEAST_CALLS:
        raise ConfigError(
            f"backend {name!r}: {len(taken)} of its calls were counted, at least {LEAST_CALLS} are needed to find "
            "out how fast its engine is; give --parameters FILE, by `orla-lg sim calibrate` of the live engine"
        )
    samples = _samples(taken)
    costs = fit(samples)
    off = median(abs(sample.error(costs)) for sample in samples)
    near = [sample for sample in samples if abs(sample.error(costs)) <= FARTHEST * max(off, 0.01)]
    if len(near) >= LEAST_CALLS:
        costs = fit(near)
    if not any(costs.get(each) for each in ("step_s", "decode_sequence_s")):
        costs["step_s"] = _pace_s(taken)
    if not costs.get("prefill_token_s"):
        costs["prefill_token_s"] = 1e-6
    usual = EngineParameters(
        block_tokens=block_tokens_in(taken), kv_blocks=1, context_tokens=1, max_running=USUAL_RUNNING,
        max_batch_tokens=USUAL_BATCH_TOKENS, priority=False, prefill_attention_s=0.0,
        step_s=costs.get("step_s", 0.0), decode_sequence_s=costs.get("decode_sequence_s", 0.0),
        decode_context_s=costs.get("decode_context_s", 0.0), request_s=costs.get("request_s", 0.0),
        prefill_token_s=costs["prefill_token_s"],
    )  # fmt: skip
    return Calibrated(usual, len(taken), did_stream)


def _first_s(call: RecordedCall) -> float:
    """Return when a call's first token came, or about when it may have come."""
    if call.first_s is not None:
        return call.first_s
    fresh, decoded = _fresh(call), DECODE_TO_PREFILL * (call.completion_tokens or 1)
    return call.dispatched_s + (call.ended_s - call.dispatched_s) * fresh / (fresh + decoded)


def _fresh(call: RecordedCall) -> int:
    return (call.prompt_tokens or 0) - (call.cached_tokens or 0)


def _pace_s(calls: Sequence[RecordedCall]) -> float:
    paces = [
        (call.ended_s - _first_s(call)) / (call.completion_tokens - 1)
        for call in calls
        if call.completion_tokens and call.completion_tokens > 1
    ]
    return median(paces) if paces else 0.01


class _Overlaps:
    """What an engine did for all calls between two moments, on the mean."""

    def __init__(self, calls: Sequence[RecordedCall]) -> None:
        self._calls = sorted(calls, key=lambda call: call.dispatched_s)
        self._begins = [call.dispatched_s for call in self._calls]
        self._longest_s = max(call.ended_s - call.dispatched_s for call in calls)

    def between(self, begin_s: float, end_s: float) -> tuple[float, float, float]:
        """Return the prefilled tokens, the mean number of decoding calls, and the mean of their contexts' sum."""
        prefilled = decoding = context = 0.0
        width_s = max(end_s - begin_s, 1e-9)
        at = bisect_left(self._begins, begin_s - self._longest_s)
        while at < len(self._calls) and self._begins[at] < end_s:
            call = self._calls[at]
            at += 1
            first_s = _first_s(call)
            took_s = first_s - call.dispatched_s
            if took_s > 0:
                prefilled += _fresh(call) * max(0.0, min(first_s, end_s) - max(call.dispatched_s, begin_s)) / took_s
            part = max(0.0, min(call.ended_s, end_s) - max(first_s, begin_s)) / width_s
            decoding += part
            context += part * ((call.prompt_tokens or 0) + (call.completion_tokens or 0) / 2)
        return prefilled, decoding, context


def _samples(calls: Sequence[RecordedCall]) -> list[Sample]:
    overlaps = _Overlaps(calls)
    every = max(1, len(calls) // MOST_CALLS)
    made = []
    for call in calls[::every]:
        first_s, answer = call.first_s, call.completion_tokens or 1
        if first_s is None:
            made.append(_whole_sample(call, overlaps))
            continue
        if (took_s := first_s - call.dispatched_s) > 1e-4:
            prefilled, decoding, _ = overlaps.between(call.dispatched_s, first_s)
            terms = {"request_s": 1.0, "step_s": 1.0, "prefill_token_s": max(1.0, prefilled),
                     "decode_sequence_s": decoding}  # fmt: skip
            made.append(Sample("first token", took_s, terms))
        if answer > 1 and (took_s := call.ended_s - first_s) > 1e-4:
            prefilled, decoding, context = overlaps.between(first_s, call.ended_s)
            steps = answer - 1.0
            terms = {"step_s": steps, "decode_sequence_s": steps * max(1.0, decoding),
                     "decode_context_s": steps * context, "prefill_token_s": prefilled}  # fmt: skip
            made.append(Sample("decode", took_s, terms))
    return made


def _whole_sample(call: RecordedCall, overlaps: _Overlaps) -> Sample:
    """Return how long a call took that did not stream, and what the engine did meanwhile."""
    prefilled, decoding, context = overlaps.between(call.dispatched_s, call.ended_s)
    steps = float(call.completion_tokens or 1)
    terms = {"request_s": 1.0, "step_s": steps, "decode_sequence_s": steps * max(1.0, decoding),
             "decode_context_s": steps * context, "prefill_token_s": max(1.0, prefilled)}  # fmt: skip
    return Sample("whole", max(call.ended_s - call.dispatched_s, 1e-4), terms)


def refined(
    calibrated: Mapping[str, Calibrated], play: Callable[[Mapping[str, EngineParameters]], Sequence[Played]]
) -> dict[str, Calibrated]:
    """Return the numbers with which the unchanged setting takes as long as was recorded, in prefill and in decode.

    Args:
        calibrated: By backend, a fit; one that was given stays as it is.
        play: Simulates the unchanged setting with these numbers.
    """
    now = {name: each.parameters for name, each in calibrated.items()}
    scales = {(name, part): _Scaling() for name, each in calibrated.items() if each.calls for part in _PARTS}
    best, least = now, float("inf")
    for _ in range(ROUNDS):
        by_backend = _by_backend(play(now), calibrated)
        missing = {
            (name, part): log(_ratio(by_backend[name], _PARTS[part] if calibrated[name].streamed else _whole))
            for name, part in scales
        }
        worst = max(map(abs, missing.values()), default=0.0)
        if worst < least:
            best, least = now, worst
        if worst <= CLOSE:
            break
        by = {which: scale.next(missing[which]) for which, scale in scales.items()}
        now = {
            name: with_scaled(each, prefill=by.get((name, "prefill"), 1.0), decode=by.get((name, "decode"), 1.0))
            for name, each in now.items()
        }
    return {name: replace(each, parameters=best[name]) for name, each in calibrated.items()}


@dataclass(slots=True)
class _Scaling:
    """By how much a cost is scaled next; where that went too far, half as much from then on."""

    step: float = STEP
    before: float = 0.0

    def next(self, missing: float) -> float:
        if missing * self.before < 0:
            self.step /= 2
        self.before = missing
        return exp(self.step * missing)


def _by_backend(
    played: Sequence[Played], calibrated: Mapping[str, Calibrated]
) -> dict[str, list[tuple[RecordedCall, Played]]]:
    found: dict[str, list[tuple[RecordedCall, Played]]] = {name: [] for name in calibrated}
    for each in played:
        seen, backend = each.call.seen, each.call.seen.backend or ""
        is_told_apart = seen.first_s is not None
        if each.first_s is not None and backend in found and (is_told_apart or not calibrated[backend].streamed):
            found[backend].append((seen, each))
    return found


def _ttft(first_s: float, begin_s: float, end_s: float) -> float:
    return first_s - begin_s


def _decode(first_s: float, begin_s: float, end_s: float) -> float:
    return end_s - first_s


def _whole(first_s: float, begin_s: float, end_s: float) -> float:
    return end_s - begin_s


_PARTS: Mapping[str, Callable[[float, float, float], float]] = {"prefill": _ttft, "decode": _decode}
"""What is scaled, and which part of a call's time on the engine it is scaled by."""


def _ratio(played: Sequence[tuple[RecordedCall, Played]], part: Callable[[float, float, float], float]) -> float:
    """Return by how much a part of these calls took longer on the engine than simulated, the queue left out."""
    if not played:
        return 1.0
    real, ours = [], []
    for seen, each in played:
        assert each.first_s is not None
        real.append(part(_first_s(seen), seen.dispatched_s, seen.ended_s))
        ours.append(part(each.first_s, each.dispatched_s, each.ended_s))
    return min(10.0, max(0.1, fmean(real) / fmean(ours))) if fmean(ours) > 0 and fmean(real) > 0 else 1.0
