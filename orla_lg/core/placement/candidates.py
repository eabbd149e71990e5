"""The backends that one call may be mapped to, and how long it waits for those that have not answered yet.

All of them are asked at once and in the background. A call waits for the ones that its mapping may choose, all at
once too, and for none longer than ``PROBE_PATIENCE_S`` after it was asked: a backend that hangs delays only the calls
of those first seconds.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from orla_lg.core.call import Call
from orla_lg.core.mapping import AUTO
from orla_lg.core.operation.backends import Schedulers
from orla_lg.core.placement.view import BackendView, view_of
from orla_lg.core.services import Services
from orla_lg.core.steps import Steps, Wait

PROBE_PATIENCE_S = 3.0
"""How long a first call waits for its backend to answer what it is."""

OTHERS_PATIENCE_S = 0.25
"""How long a call whose model one backend is known to serve waits for those before it, which may serve it too."""

MANY_MODELS = 100
"""So many are warned of."""

log = logging.getLogger("orla_lg")

Clock = Callable[[], float]


class BackendCandidates:
    """``mapping.Candidates`` of one call; makes every backend that is not known be asked.

    Args:
        schedulers: The backends, in the order of the configuration.
        call: The call that is to be mapped.
        clock: Monotonic seconds.
    """

    __slots__ = ("_call", "_clock", "_probing", "_schedulers", "complete", "views")

    def __init__(self, schedulers: Schedulers, call: Call, clock: Clock) -> None:
        self._schedulers = schedulers
        self._call = call
        self._clock = clock
        self._probing: dict[str, Future[None]] = {}
        views = []
        for name, scheduler in schedulers.items():
            # One whose last probe failed is not waited for: the attempt itself tells more.
            if (probing := scheduler.health.connect()) is not None and scheduler.health.fault is None:
                self._probing[name] = probing
            views.append(view_of(scheduler, call))
        self.complete = not self._probing
        self.views: Sequence[BackendView] = (
            views if schedulers.elsewhere is None else schedulers.elsewhere.joined(views)
        )

    def met(self, name: str | None = None) -> Steps:  # noqa: D102
        waited_for = self._under_way() if name is None else [each for each in self._under_way() if each == name]
        if waited_for:
            yield from self._wait(_all_of([self._probing[each] for each in waited_for]), self._left_s(waited_for))

    def serving(self, model: str) -> Steps:  # noqa: D102
        found_s: float | None = None
        while (unknown := self._under_way()) and not self._is_ours(model):
            found = next((view.name for view in self.views if model in view.models), None)
            if found is None:
                patience_s = self._left_s(unknown)
            else:
                order = [view.name for view in self.views]
                unknown = [name for name in unknown if order.index(name) < order.index(found)]
                now = self._clock()
                found_s = now if found_s is None else found_s
                patience_s = min(self._left_s(unknown), OTHERS_PATIENCE_S - (now - found_s))
            if not unknown or patience_s <= 0:
                return
            if not (yield from self._wait(_first_of([self._probing[name] for name in unknown]), patience_s)):
                return

    def again(self, backends: Iterable[str]) -> Steps:  # noqa: D102
        asked = {
            name: probing
            for name in backends
            if name in self._schedulers and (probing := self._schedulers[name].health.ask_again()) is not None
        }
        self._probing |= asked
        self.complete = not self._probing
        if asked:
            yield from self._wait(_all_of(list(asked.values())), self._left_s(asked))

    def _is_ours(self, model: str) -> bool:
        """Whether a model's name in code means a backend, whatever engines serve."""
        elsewhere = self._schedulers.elsewhere
        return model == AUTO or model in self._schedulers or (elsewhere is not None and model in elsewhere)

    def _under_way(self) -> list[str]:
        """Return the backends that are worth waiting for."""
        return [name for name, probing in self._probing.items() if not probing.done() and self._left_s([name]) > 0]

    def _left_s(self, names: Iterable[str]) -> float:
        """Return for how long at least one of these backends is waited for, within the call's deadline."""
        left_s = max((PROBE_PATIENCE_S - self._schedulers[name].health.asked_for_s for name in names), default=0.0)
        deadline_s = self._call.deadline_at_s
        return left_s if deadline_s is None else min(left_s, deadline_s - self._clock())

    def _wait(self, probed: Future[None], patience_s: float) -> Steps:
        """Wait, and return whether it ended in time; what was seen before is seen anew."""
        try:
            yield Wait(probed, patience_s)
        except TimeoutError:  # the attempt itself tells more
            return False
        else:
            return True
        finally:
            self.views = self._schedulers.views(self._call)


@dataclass(frozen=True, slots=True)
class SettledCandidates:
    """Candidates that are known as well as they ever will be."""

    views: Sequence[BackendView]
    complete: bool = True

    def met(self, name: str | None = None) -> Steps:  # noqa: D102
        yield from ()

    def serving(self, model: str) -> Steps:  # noqa: D102
        yield from ()

    def again(self, backends: Iterable[str]) -> Steps:  # noqa: D102
        yield from ()


def _all_of(futures: Sequence[Future[None]]) -> Future[None]:
    return _after(len(futures), futures)


def _first_of(futures: Sequence[Future[None]]) -> Future[None]:
    return _after(1, futures)


def _after(ends: int, futures: Sequence[Future[None]]) -> Future[None]:
    """Return a future that ends when so many of *futures* have ended; cancelling it cancels none of them."""
    ended: Future[None] = Future()
    ended.set_running_or_notify_cancel()
    lock, left = threading.Lock(), ends

    def one_ended(_: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            ended.set_result(None)

    for future in futures:
        future.add_done_callback(one_ended)
    return ended


def unplaced(services: Services, call: Call) -> str:
    """Return why nothing places *call*; warn once for each model that it passes by, which may not be meant."""
    model, stage, known = call.ask.model, call.identity.stage, services.unplaced
    why = "no mapping names its stage" if call.ask.embeds else "no mapping names its stage, and no backend its model"
    if model in known or len(known) >= MANY_MODELS:
        return why
    known.add(model)
    backend = next(iter(services.schedulers), "BACKEND")
    if call.ask.embeds:
        log.warning(
            "stage %r embeds by model %r, and no mapping names it: such calls go where their code says, past queues "
            "and limits; mapper={%r: %r} would serve them here ('*' does not stand for embeddings)",
            stage, model, stage or "*:embeddings", backend,
        )  # fmt: skip
    else:
        log.warning(
            "stage %r calls model %r, which is no backend of ours, and no mapping names the stage: such calls go "
            "where their code says, past queues and limits; mapper={'*': %r} would serve them here",
            stage, model, backend,
        )  # fmt: skip
    return why
