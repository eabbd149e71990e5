"""Measures a live engine through its public API, until the simulation can stand for it.

Made-up prompts only. What is asked of the engine, and what it tells:

    identity      /v1/models and /metrics         context, block size, blocks
    seats         a burst of short calls          how many run at once
    chunks        a long prompt beside a stream   how many tokens a step takes
    prefill       cold prompts of many lengths    seconds for a token, and for a token's look at earlier ones
    cached        known prefixes, new ends        the same at greater depth; what a request costs at least
    beside        a prompt beside a stream        the step alone, without what a request costs around it
    decode        streams together                seconds for a sequence, and for the tokens in its context
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count, pairwise
from random import Random
from statistics import median

from orla_lg.errors import EngineError
from orla_lg.openai_api.metrics import sample, samples
from orla_lg_sim.client import Timed, TimingClient
from orla_lg_sim.fit import Sample, errors, fit
from orla_lg_sim.parameters import EngineParameters, parameters_of
from orla_lg_sim.text import prose

Progress = Callable[[str, int, int], None]
"""Told what is measured, how many measurements are done, and how many there are."""

_PREFIXES = ("vllm:", "sim:")
_CHUNKS = tuple(2**power for power in range(8, 16))
_POLL_S = 0.02
_STREAM_TOKENS = 48
_BESIDE_STREAM_TOKENS = 24
_CHUNKED_STREAM_TOKENS = 100
_BEGUN_PIECES = 6
"""A stream that has brought so many runs steadily."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    repeats: int = 3
    decode_repeats: int = 2
    prefill_tokens: tuple[int, ...] = (40, 70, 110, 180, 280, 450, 700, 1050, 1500, 2000)
    cached_tokens: tuple[int, ...] = (1000, 2000, 3000)
    end_tokens: tuple[int, ...] = (10, 60, 150, 400)
    streams: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (60, 1000, 2500)
    sharing: tuple[int, ...] = (8, 16)
    """Streams that have the longest of these contexts in common."""


QUICK = Effort(2, 1, (40, 110, 280, 700, 1500), (1500,), (10, 150), (1, 4, 8), (60, 1500), (8,))


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """What came of it."""

    parameters: EngineParameters
    model: str
    samples: tuple[Sample, ...]
    errors: dict[str, float]
    """By kind of measurement, the median relative error of the fitted model."""
    notes: tuple[str, ...]
    """What could not be measured, and what was taken instead."""


class Calibrator:
    """Measures one engine, which should have nothing else to do meanwhile."""

    def __init__(self, client: TimingClient, effort: Effort, progress: Progress = lambda *_: None) -> None:
        self._client = client
        self._effort = effort
        self._progress = progress
        self._random = Random()  # other prompts each time: what an earlier run left in the cache must not be found
        self._done = count(1)
        self._extra_tokens = 0
        self._total = 0
        self._samples: list[Sample] = []
        self._notes: list[str] = []

    async def run(self, base: EngineParameters) -> CalibrationResult:
        """Measure everything; *base* has what cannot be measured.

        Raises:
            BackendUnavailable: The engine does not answer.
            EngineRefused: It refused a request.
            EngineError: Its answers make no sense.
        """
        try:
            return await self._run(base)
        except ExceptionGroup as failures:  # of calls that were sent together: each tells the same
            raise failures.exceptions[0] from None

    async def _run(self, base: EngineParameters) -> CalibrationResult:
        parameters = await self._identify(base)
        effort = self._fitting(parameters)
        self._total = self._count(effort)
        await self._learn_template()
        parameters = await self._seats(parameters)
        parameters = await self._chunks(parameters)
        for tokens in effort.prefill_tokens:
            await self._prefill(tokens, parameters)
        for known in effort.cached_tokens:
            await self._cached(known, effort, parameters)
        for tokens in effort.prefill_tokens[::2]:
            await self._beside(tokens, parameters)
        for context in effort.contexts:
            prefixes = [self._words(context) for _ in range(max(effort.streams))]
            for streams in effort.streams:
                await self._decode(prefixes[:streams], context, parameters)
        for context in effort.contexts[-1:]:
            shared = self._words(context)
            for streams in effort.sharing:
                await self._decode([shared] * streams, context, parameters)
        return self._result(parameters)

    def _result(self, parameters: EngineParameters) -> CalibrationResult:
        costs = fit(self._samples)
        fitted = parameters_of({**asdict(parameters), **costs})
        return CalibrationResult(
            fitted, self._client.model or "", tuple(self._samples), errors(self._samples, costs), tuple(self._notes)
        )

    # What the engine says of itself

    async def _identify(self, base: EngineParameters) -> EngineParameters:
        said = await self._client.served()
        found = replace(base, context_tokens=int(said.get("max_model_len") or base.context_tokens))
        text = await self._client.metrics()
        for prefix in _PREFIXES:
            for labels, _ in samples(text, f"{prefix}cache_config_info"):
                blocks = int(labels["num_gpu_blocks"]) - (prefix == "vllm:")  # vLLM's block 0 is never used
                return replace(found, block_tokens=int(labels["block_size"]), kv_blocks=blocks)
        self._notes.append("no metrics: block size and number of blocks were not measured")
        return found

    def _fitting(self, parameters: EngineParameters) -> Effort:
        """Return the effort without what the engine has no room for."""
        effort, longest = self._effort, parameters.longest_tokens - _STREAM_TOKENS - 64
        return replace(
            effort,
            prefill_tokens=tuple(tokens for tokens in effort.prefill_tokens if tokens < longest),
            cached_tokens=tuple(
                tokens for tokens in effort.cached_tokens if tokens + effort.end_tokens[-1] < longest
            ),
            contexts=tuple(tokens for tokens in effort.contexts if tokens < longest),
        )

    def _count(self, effort: Effort) -> int:
        prompts = len(effort.prefill_tokens) + len(effort.cached_tokens) * len(effort.end_tokens)
        beside = len(effort.prefill_tokens[::2])
        streams = (len(effort.contexts) * len(effort.streams) + len(effort.sharing)) * effort.decode_repeats
        return (prompts + beside) * effort.repeats + streams + 2

    async def _learn_template(self) -> None:
        """See how many tokens a prompt has besides its words, and let the engine warm up."""
        for _ in range(3):
            timed = await self._client.ask(self._body(["the"], 4))
        self._extra_tokens = timed.usage.prompt_tokens - 1

    # Limits

    async def _seats(self, parameters: EngineParameters) -> EngineParameters:
        """Send more calls than may run at once, and look how many do."""
        most = 0
        for burst in (24, 72, 300):
            running, waiting = await self._burst(burst)
            most = max(most, running)
            if waiting:
                self._tell("seats")
                return replace(parameters, max_running=max(1, most))
            if not running:
                self._notes.append("no metrics: how many sequences run at once was not measured")
                return parameters
        self._notes.append(f"{most} sequences ran at once and none waited: there may be more seats")
        return replace(parameters, max_running=max(parameters.max_running, most))

    async def _burst(self, calls: int) -> tuple[int, int]:
        """Return how many ran while others waited (or at most), and how many waited then."""
        seen: list[tuple[int, int]] = []

        async def watch() -> None:
            while True:
                text = await self._client.metrics()
                seen.extend(
                    (int(running), int(sample(text, f"{prefix}num_requests_waiting") or 0))
                    for prefix in _PREFIXES
                    if (running := sample(text, f"{prefix}num_requests_running")) is not None
                )
                await asyncio.sleep(_POLL_S)

        async with asyncio.TaskGroup() as group:
            watcher = group.create_task(watch())
            try:
                await self._together([self._body(self._words(4), 24) for _ in range(calls)])
            finally:
                watcher.cancel()
        full = [(running, waiting) for running, waiting in seen if waiting]
        return max(full or seen, default=(0, 0))

    async def _chunks(self, parameters: EngineParameters) -> EngineParameters:
        """Count the steps of a long prefill by the tokens that a stream gets meanwhile."""
        tokens = min(parameters.longest_tokens - 100, 12_000)
        stream, prompt = await self._stream_beside(tokens, _CHUNKED_STREAM_TOKENS)
        gaps = _gaps(stream, prompt.sent_s)
        steps = sum(gap > max(gaps) / 4 for gap in gaps)
        fitting = [size for size in _CHUNKS if -(-tokens // (size - 1)) == steps]
        self._tell("chunks")
        if steps == 1 or not fitting:
            self._notes.append(f"a prompt of {tokens} tokens took {steps} step(s): the chunk size was not measured")
            return parameters
        return replace(parameters, max_batch_tokens=fitting[0])

    # Times

    async def _prefill(self, tokens: int, parameters: EngineParameters) -> None:
        async def once() -> Sample:
            timed = await self._client.ask(self._body(self._words(tokens), 1))
            return Sample("prefill", timed.ttft_s, self._whole_request(timed, parameters))

        await self._repeat(f"prefill of {tokens} tokens", once)

    async def _cached(self, known: int, effort: Effort, parameters: EngineParameters) -> None:
        prefix = self._words(known)
        await self._client.ask(self._body(prefix, 1))
        for end in effort.end_tokens:

            async def once(end: int = end) -> Sample:
                timed = await self._client.ask(self._body([*prefix, *self._words(end)], 1))
                return Sample("cached", timed.ttft_s, self._whole_request(timed, parameters))

            await self._repeat(f"{end} tokens after {known} known ones", once)

    async def _beside(self, tokens: int, parameters: EngineParameters) -> None:
        """The longest gap in a stream is the step that prefills the other prompt."""

        async def once() -> Sample | None:
            stream, prompt = await self._stream_beside(tokens, _BESIDE_STREAM_TOKENS)
            gaps, prefilled = _gaps(stream, prompt.sent_s), prompt.usage.prompt_tokens
            terms = {"step_s": 1.0, "decode_sequence_s": 1.0, "decode_context_s": float(stream.usage.prompt_tokens)}
            whole = gaps and prefilled < parameters.max_batch_tokens
            return Sample("beside", max(gaps), terms | _chunk(0, prefilled)) if whole else None

        await self._repeat(f"prefill of {tokens} tokens beside a stream", once)

    async def _repeat(self, what: str, once: Callable[[], Awaitable[Sample | None]]) -> None:
        """Keep the measurement in the middle: the machine may have had something else to do."""
        found = []
        for _ in range(self._effort.repeats):
            self._tell(what)
            if (one := await once()) is not None:
                found.append(one)
        self._add_middle(found)

    def _add_middle(self, found: list[Sample]) -> None:
        if not found:
            return
        middle = sorted(found, key=lambda one: one.measured_s)[len(found) // 2]
        if middle.measured_s <= 0:
            raise EngineError(f"the engine answered in no time ({middle.what}); is it one that streams?")
        self._samples.append(middle)

    async def _decode(self, prefixes: Sequence[Sequence[str]], context: int, parameters: EngineParameters) -> None:
        """Time the tokens of streams while all of them run; their contexts may be one or many."""
        streams, seen = len(prefixes), []
        different = len({id(prefix) for prefix in prefixes})
        room = parameters.kv_tokens - streams * 2 * _STREAM_TOKENS - different * context
        for _ in range(self._effort.decode_repeats):
            self._tell(f"{streams} streams of {context} tokens")
            if streams <= parameters.max_running and room >= 0 and (one := await self._streams(prefixes, different)):
                seen.append(one)
        self._add_middle(seen)

    async def _streams(self, prefixes: Sequence[Sequence[str]], different: int) -> Sample | None:
        for prefix in {id(prefix): prefix for prefix in prefixes}.values():
            await self._client.ask(self._body(prefix, 1))
        timed = await self._together([self._body([*one, *self._words(2)], _STREAM_TOKENS) for one in prefixes])
        begin_s, end_s = max(one.tokens_s[0] for one in timed), min(one.tokens_s[-1] for one in timed)
        steps = median(sum(begin_s < at_s <= end_s for at_s in one.tokens_s) for one in timed)
        if steps < _STREAM_TOKENS / 4:  # they did not run together long enough
            return None
        streams, prompt = len(prefixes), timed[0].usage.prompt_tokens
        terms = {
            "step_s": 1.0,
            "decode_sequence_s": float(streams),
            "decode_context_s": streams * (prompt + _STREAM_TOKENS / 2),
            "held_token_s": different * prompt + streams * _STREAM_TOKENS / 2,
        }
        return Sample("decode", (end_s - begin_s) / steps, terms)

    # Inside

    async def _stream_beside(self, tokens: int, stream_tokens: int) -> tuple[Timed, Timed]:
        """Return a stream, and a cold prompt that was sent when it had begun."""
        begun = asyncio.Event()

        async def later() -> Timed:
            await begun.wait()
            return await self._client.ask(self._body(self._words(tokens), 1))

        def heard(pieces: int) -> None:
            if pieces == _BEGUN_PIECES:
                begun.set()

        async with asyncio.TaskGroup() as group:
            first = group.create_task(self._client.ask(self._body(self._words(4), stream_tokens), heard))
            second = group.create_task(later())
        return first.result(), second.result()

    async def _together(self, bodies: Sequence[dict[str, object]]) -> list[Timed]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._client.ask(body)) for body in bodies]
        return [task.result() for task in tasks]

    def _words(self, tokens: int) -> list[str]:
        return prose(self._random, max(1, tokens - self._extra_tokens))

    def _body(self, words: Sequence[str], answer_tokens: int) -> dict[str, object]:
        text = "".join(word if word.startswith(" ") else f" {word}" for word in words)
        return {
            "messages": [{"role": "user", "content": text.strip()}],
            "max_tokens": answer_tokens,
            "ignore_eos": True,
        }

    def _whole_request(self, timed: Timed, parameters: EngineParameters) -> dict[str, float]:
        """Return the terms of a prompt that had the engine to itself."""
        terms = {"request_s": 1.0, "request_token_s": float(timed.usage.prompt_tokens), "step_s": 0.0}
        computed, end = timed.usage.cached_tokens or 0, timed.usage.prompt_tokens
        while computed < end:
            tokens = min(end - computed, parameters.max_batch_tokens)
            for name, times in _chunk(computed, tokens).items():
                terms[name] = terms.get(name, 0.0) + times
            terms["step_s"] += 1
            computed += tokens
        return terms

    def _tell(self, what: str) -> None:
        self._progress(what, min(next(self._done), self._total), self._total)


def _chunk(start: int, tokens: int) -> dict[str, float]:
    """Return the terms of prefilling *tokens* tokens after *start* others."""
    pairs = tokens * (start + (tokens + 1) / 2)
    costs = {"prefill_s": 1.0, "prefill_token_s": float(tokens), "prefill_attention_s": pairs}
    return costs | {"held_token_s": float(start + tokens)}


def _gaps(stream: Timed, since_s: float) -> list[float]:
    """Return the times between a stream's tokens that ended after *since_s*."""
    return [after - before for before, after in pairwise(stream.tokens_s) if after > since_s]
