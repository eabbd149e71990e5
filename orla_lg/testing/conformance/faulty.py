"""An engine that breaks: whatever it does, an adapter says so by name.

These checks put the adapter before a ``FaultEngine``, so they only apply to those who speak OpenAI's wire.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing

from orla_lg.core.engine.backend import BackendAdapter
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.testing.conformance.subject import Subject, expect, skip
from orla_lg.testing.conformance.suite import Check, check
from orla_lg.testing.faults import MODEL, Fault, FaultEngine
from orla_lg.testing.faults.reply import STATUS

PATIENCE_S = 10.0

BREAKING = (
    Fault.RESET,
    Fault.DEAD_BEFORE_HEADERS,
    Fault.DEAD_IN_PREFILL,
    Fault.DEAD_MID_STREAM,
    Fault.NO_DONE,
    Fault.TRUNCATED_JSON,
)
NONSENSE = (Fault.GARBAGE, Fault.HTML_PAGE, Fault.BINARY)
LYING = (Fault.NO_USAGE, Fault.CACHED_ABOVE_PROMPT, Fault.NEGATIVE_TOKENS, Fault.WRONG_TYPE)


async def _outcome(adapter: BackendAdapter) -> Exception | None:
    """Return what a short request raises."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Say a few words, please."}], "max_tokens": 8}
    try:
        async with asyncio.timeout(PATIENCE_S), aclosing(adapter.generate(body)) as chunks:
            async for _ in chunks:
                pass
    except Exception as error:  # noqa: BLE001 - which one is the question
        return error
    return None


async def _expect_raised(on: Subject, faults: Iterable[Fault], kinds: tuple[type[Exception], ...]) -> None:
    names = " or ".join(kind.__name__ for kind in kinds)
    with FaultEngine() as engine:
        adapter = on.another(engine.url)
        if await _outcome(adapter) is not None:
            skip("the adapter does not speak OpenAI's wire")
        for fault in faults:
            engine.script.append(fault)
            error = await _outcome(adapter)
            told = "nothing" if error is None else f"{type(error).__name__}: {error}"
            expect(isinstance(error, kinds), f"an engine that fails by {fault.name} raised {told}, not {names}")
            if isinstance(error, EngineRefused) and fault in STATUS:
                expect(error.status == STATUS[fault], f"{fault.name} was told as status {error.status}")
        expect(await _outcome(adapter) is None, "after all that, a healthy engine is not served any more")
        await adapter.aclose()


@check(unprobed=True)
async def broken_streams_raise(on: Subject) -> None:
    """A stream that breaks anywhere raises BackendUnavailable, and never ends as if it were whole."""
    await _expect_raised(on, BREAKING, (BackendUnavailable,))


@check(unprobed=True)
async def nonsense_raises(on: Subject) -> None:
    """An answer that is no event stream raises BackendUnavailable."""
    await _expect_raised(on, NONSENSE, (BackendUnavailable,))


@check(unprobed=True)
async def refusals_keep_their_status(on: Subject) -> None:
    """An error status raises EngineRefused with that status, an error inside a stream raises too."""
    await _expect_raised(on, STATUS, (EngineRefused,))
    await _expect_raised(on, (Fault.ERROR_EVENT,), (EngineRefused, BackendUnavailable))


@check(unprobed=True)
async def false_counts_do_no_harm(on: Subject) -> None:
    """An answer with impossible token counts, or none, or another label, still arrives."""
    with FaultEngine() as engine:
        adapter = on.another(engine.url)
        if await _outcome(adapter) is not None:
            skip("the adapter does not speak OpenAI's wire")
        for fault in LYING:
            engine.script.append(fault)
            error = await _outcome(adapter)
            expect(error is None, f"an engine that fails by {fault.name} made generate raise {error!r}")


@check(unprobed=True)
async def probe_of_nonsense_raises(on: Subject) -> None:
    """Probing what is no engine, or one that refuses everything, raises BackendUnavailable."""
    with FaultEngine() as engine:
        if await _outcome(on.another(engine.url)) is not None:
            skip("the adapter does not speak OpenAI's wire")
    for fault in (*NONSENSE, Fault.RESET, Fault.BROKEN, Fault.UNAUTHORIZED):
        with FaultEngine(chances={fault: 1.0}, every_path=True) as engine:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await on.another(engine.url).probe()
            except BackendUnavailable:
                continue
            except Exception as error:  # noqa: BLE001 - which one is the question
                expect(False, f"{fault.name} made the probe raise {type(error).__name__}: {error}")
            expect(False, f"a probe answered by {fault.name} succeeded")


CHECKS: tuple[Check, ...] = (
    broken_streams_raise,
    nonsense_raises,
    refusals_keep_their_status,
    false_counts_do_no_harm,
    probe_of_nonsense_raises,
)
