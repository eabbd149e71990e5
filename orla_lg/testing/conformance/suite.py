"""A check, and how checks are run."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from orla_lg.core.engine.backend import BackendAdapter, Capability
from orla_lg.core.engine.capabilities import (
    Abortable,
    KVControl,
    Observable,
    Sleepable,
    SlotStore,
    Tokenizing,
    Warmable,
)
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.testing.conformance.report import NonConforming, NotApplicable, Report, Result, Status
from orla_lg.testing.conformance.subject import LIMIT_S, PROMPT_WORDS, AdapterAt, Subject

FACES: dict[Capability, type] = {
    Capability.WARM: Warmable,
    Capability.PIN: KVControl,
    Capability.RELEASE: KVControl,
    Capability.FLUSH_WORKFLOW: KVControl,
    Capability.FLUSH_PREFIX: KVControl,
    Capability.FLUSH_ALL: KVControl,
    Capability.SAVE_RESTORE: SlotStore,
    Capability.STATS: Observable,
    Capability.TOKENIZE: Tokenizing,
    Capability.ABORT: Abortable,
    Capability.SLEEP: Sleepable,
}
"""The Protocol that an adapter must have for each capability that needs more than ``BackendAdapter``."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of an adapter."""

    name: str
    asserts: str
    """What is checked, in one sentence."""
    body: Callable[[Subject], Awaitable[None]]
    needs: tuple[Capability, ...] = ()
    """Skipped unless the probe says that all of these are usable, and the adapter has their methods."""
    unprobed: bool = False
    """Runs even on an engine that does not answer its probe."""

    def __str__(self) -> str:
        return self.name

    async def verify(self, subject: Subject) -> None:
        """Check, for test runners.

        Raises:
            NonConforming: The adapter does not do what it must.
            NotApplicable: The check does not apply to this adapter, or this engine as it was started.
        """
        try:
            async with asyncio.timeout(subject.limit_s):
                await self._applies(subject)
                await self.body(subject)
        except TimeoutError as error:
            raise NonConforming(f"{self.name}: no end after {subject.limit_s:g} s") from error

    async def run(self, subject: Subject) -> Result:
        """Check, for reports."""
        began = time.perf_counter()
        status, message = Status.PASSED, ""
        try:
            await self.verify(subject)
        except NotApplicable as reason:
            status, message = Status.SKIPPED, str(reason)
        except NonConforming as failure:
            status, message = Status.FAILED, str(failure)
        except Exception as error:  # noqa: BLE001 - whatever an adapter raises here, it must not
            status, message = Status.FAILED, f"raised {type(error).__name__}: {error}"
        return Result(self.name, self.asserts, status, time.perf_counter() - began, " ".join(message.split())[:400])

    async def _applies(self, subject: Subject) -> None:
        if self.unprobed:
            return
        try:
            probe = await subject.probe()
        except (BackendUnavailable, EngineRefused) as error:
            raise NotApplicable("the engine does not answer its probe") from error
        for capability in self.needs:
            if not probe.can(capability):
                raise NotApplicable(f"the probe says {capability}: {probe.capabilities[capability]}")
            face = FACES.get(capability)
            if face is not None and not isinstance(subject.adapter, face):
                raise NotApplicable(f"the adapter has no methods for {capability}")


def check(*needs: Capability, unprobed: bool = False) -> Callable[[Callable[[Subject], Awaitable[None]]], Check]:
    """Make a ``Check`` of a coroutine function: its name, and its docstring's first line."""

    def made(body: Callable[[Subject], Awaitable[None]]) -> Check:
        asserts = (inspect.getdoc(body) or "").partition("\n")[0]
        return Check(getattr(body, "__name__", "?"), asserts, body, needs, unprobed)

    return made


class Conform(Protocol):
    """Run the suite on an adapter."""

    async def __call__(
        self,
        adapter: BackendAdapter,
        *,
        model: str | None = None,
        adapter_at: AdapterAt | None = None,
        only: Collection[str] | None = None,
        disruptive: bool = False,
        limit_s: float = LIMIT_S,
        prompt_words: int = PROMPT_WORDS,
        progress: Callable[[Result], None] | None = None,
    ) -> Report:
        """Check *adapter* against the engine it was built for, which should have nothing else to do.

        Args:
            adapter: The adapter; it is not closed.
            model: The model to ask for; the backend's own, else the first that the engine serves.
            adapter_at: Builds another adapter of the kind for a URL; by default the adapter's class is
                called with its ``backend``, if it has one.
            only: Names of the checks to run; all by default.
            disruptive: Also run what interrupts others who use the engine (sleep, wake).
            limit_s: A check that takes longer, in seconds, has failed.
            prompt_words: Of a long prompt; fewer take less time on a slow engine.
            progress: Told each result as it comes.
        """
        ...


def conform_to(checks: Sequence[Check]) -> Conform:
    """Return a function that runs *checks*, one after the other."""

    async def conform(
        adapter: BackendAdapter,
        *,
        model: str | None = None,
        adapter_at: AdapterAt | None = None,
        only: Collection[str] | None = None,
        disruptive: bool = False,
        limit_s: float = LIMIT_S,
        prompt_words: int = PROMPT_WORDS,
        progress: Callable[[Result], None] | None = None,
    ) -> Report:
        subject = Subject(adapter, model, adapter_at, disruptive, limit_s, prompt_words)
        results = []
        for each in checks:
            if only is None or each.name in only:
                results.append(await each.run(subject))
                if progress is not None:
                    progress(results[-1])
        return Report(type(adapter).__name__, subject.where, tuple(results))

    return conform
