"""Step 2, map: which backend and model a stage runs on, and whether that can work.

Who chooses, first answer wins: the run's variant, the mapping of the graph, the shared mapping, the model named
in the code (a backend's name or a model it serves), and for ``auto`` the first backend. What nobody places is
not ours: an intercepted call passes through, a ``ChatOrla`` call is a ``MappingError``.

A mapper is one small class with one method. Most answer at once (``map``); one that must wait for somebody
else's answer has ``amap``; one that asks a model of ours first is a generator of steps (``consult``), so that
its own call is queued, cached and recorded like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from orla_lg.core.background import Background
from orla_lg.core.call import Assignment, Call
from orla_lg.core.placement.view import BackendView, find, names, unfit, unserved
from orla_lg.core.steps import Await, Steps
from orla_lg.errors import MappingError, OrlaError, did_you_mean

AUTO = "auto"
BY_NAME = "explicit"
"""The mapper of an assignment whose backends stand in a table."""

MODEL_PATIENCE_S = 30.0
"""How long a model may take that is asked where a call runs; the call waits for it."""


class StageMapper(Protocol):
    """Chooses a backend for a call, or declines."""

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        """Return where *call* runs, or ``None`` to let the next mapper answer."""
        ...


class AsyncStageMapper(Protocol):
    """A mapper that must wait for its answer."""

    async def amap(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        """``map`` as a coroutine; runs in the caller's task, or on the background loop for a thread."""
        ...


class ConsultingMapper(Protocol):
    """A mapper that asks a model, or other mappers, before it answers."""

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:
        """``map`` as a generator of steps: ``answer = yield from ask.model("light", body, stage="judge")``."""
        ...


Mapper = StageMapper | AsyncStageMapper | ConsultingMapper


@dataclass(frozen=True, slots=True)
class Planned:
    """Where a stage of a graph goes, as far as that shows without a call."""

    stage: str
    backends: tuple[str, ...]
    """In order of preference; empty where each call decides."""
    by: str
    """Who says so; a stage that no mapping names goes by the model named in its code, if it calls one at all."""
    open: bool = False
    """Whether a mapper that is asked before may choose any other backend."""


def foretold(mapper: Mapper, stage: str) -> Planned | None:
    """Return what a mapper will say of a stage, as its ``foretell(stage)`` has it; ``None`` where it surely declines.

    Of one without that method nothing is known beforehand.
    """
    foretell: Callable[[str], Planned | None] | None = getattr(mapper, "foretell", None)
    return at_each_call(mapper, stage) if foretell is None else foretell(stage)


def at_each_call(mapper: object, stage: str, *among: str) -> Planned:
    """Return what is known of a mapper that decides at each call, *among* these backends if it names them."""
    return Planned(stage, among, f"{type(mapper).__name__}, at each call", open=not among)


def _weighs_all(mapper: Mapper, stage: str) -> bool:
    """Whether a mapper may choose any backend for a stage, and so should know what each of them is."""
    said = foretold(mapper, stage)
    return said is not None and (said.open or not said.backends)


class Consultation:
    """Whom a mapper may ask while it decides about *call*."""

    def __init__(self, background: Background, model: Callable[[str, Mapping[str, Any], str, float], Steps]) -> None:
        self._background = background
        self._model = model

    def model(
        self, backend: str, body: Mapping[str, Any], *, stage: str, timeout_s: float = MODEL_PATIENCE_S
    ) -> Steps:
        """Ask a chat completion of *backend*; returns the answer's text. It is recorded under *stage*.

        Raises:
            BackendUnavailable: It did not answer, or not within *timeout_s* seconds of its turn.
        """
        return self._model(backend, body, stage, timeout_s)

    def mapper(self, mapper: Mapper, call: Call, backends: Sequence[BackendView]) -> Steps:
        """Ask a mapper of whichever kind; returns its ``Assignment`` or ``None``.

        Raises:
            MappingError: It failed, or answered something else.
        """
        chosen: object
        try:
            if hasattr(mapper, "map"):
                chosen = mapper.map(call, backends)
            elif hasattr(mapper, "consult"):
                chosen = yield from mapper.consult(call, backends, self)
            else:
                chosen = yield Await(lambda: cast("Any", mapper).amap(call, backends), self._background)
        except OrlaError:
            raise
        except Exception as error:  # a mapper may be the user's code
            fault = f"{type(error).__name__}: {error}"
            raise MappingError(f"{_caller(call)}: mapper {type(mapper).__name__} failed: {fault}") from error
        if isinstance(chosen, Assignment | None):
            return chosen
        raise MappingError(
            f"stage {call.identity.stage!r}: mapper {type(mapper).__name__} answered {chosen!r}; "
            f"it must be an Assignment, or None to decline"
        )


class Candidates(Protocol):
    """The backends that a call may be mapped to, as they are seen now, and what it takes to see them better.

    The waits are bounded, and for backends whose probe is under way only; ``core.placement.candidates`` has them.
    """

    @property
    def views(self) -> Sequence[BackendView]:
        """Return how they are seen now."""
        ...

    @property
    def complete(self) -> bool:
        """Whether there is nothing to wait for."""
        ...

    def met(self, name: str | None = None) -> Steps:
        """Wait until backend *name*, or each of them, answered what it is."""
        ...

    def serving(self, model: str) -> Steps:
        """Wait until it shows which backend the name of a model means."""
        ...

    def again(self, backends: Iterable[str]) -> Steps:
        """Ask backends once more what they are, unless they were asked just now, and wait for that."""
        ...


def assign(call: Call, mappers: Sequence[Mapper], candidates: Candidates, ask: Consultation) -> Steps:
    """Return where *call* runs; ``None`` when nothing places it and it may pass.

    Args:
        call: The call.
        mappers: Asked in order; the first answer counts.
        candidates: The backends that it may be mapped to.
        ask: What mappers may ask while they decide.

    Raises:
        MappingError: The backend does not exist or cannot do what the call asks, or nothing places a call
            that may not pass.
    """
    chosen: Assignment | None = None
    for mapper in mappers:
        if not candidates.complete and _weighs_all(mapper, call.identity.stage):
            yield from candidates.met()
        chosen = yield from ask.mapper(mapper, call, candidates.views)
        if chosen is not None:
            break
    else:
        if not candidates.complete and not call.ask.embeds:
            yield from candidates.serving(call.ask.model)
        chosen = None if call.ask.embeds else named_in_code(call.ask.model, candidates.views)
    if chosen is None:
        if call.may_pass:
            return None
        known = {name for backend in candidates.views for name in backend.models}
        raise MappingError(
            f"{_caller(call)}: model {call.ask.model!r} is neither a backend nor served by one, "
            f"and no mapping names the stage{did_you_mean(call.ask.model, known)}"
        )
    if not candidates.complete:
        yield from candidates.met(chosen.backend)
    faults = _faults(call, candidates.views, chosen)
    if not any(faults.values()) and len(faults) == 1 + len(chosen.alternatives):  # none is named twice
        return chosen
    if all(faults.values()):  # it may have been started anew since it was asked, or have another model by now
        yield from candidates.again(faults)
        faults = _faults(call, candidates.views, chosen)
    return _able(call, candidates.views, chosen, faults)


def _caller(call: Call) -> str:
    return f"stage {call.identity.stage!r}" if call.identity.stage else "a call outside any graph"


def _faults(call: Call, backends: Sequence[BackendView], chosen: Assignment) -> dict[str, list[str]]:
    """Return why the call cannot run on what was chosen and on each alternative; nothing where it can.

    Raises:
        MappingError: One of them does not exist.
    """
    asked = call.ask.given(chosen.parameters) if chosen.parameters else call.ask
    faults: dict[str, list[str]] = {}
    for name in (chosen.backend, *chosen.alternatives):
        if (view := find(backends, name)) is None:
            role = "chose backend" if name == chosen.backend else "names alternative"
            raise MappingError(
                f"{_caller(call)}: mapper {chosen.mapper!r} {role} {name!r}, "
                f"which does not exist{did_you_mean(name, names(backends))}"
            )
        faults[name] = unfit(asked, view, chosen.model)
        if view.model is not None and chosen.model is None and chosen.mapper.endswith(BY_NAME):
            faults[name] += unserved(view.model, view.probe)  # as ``wrap`` does, where it could
    return faults


def _able(
    call: Call, backends: Sequence[BackendView], chosen: Assignment, faults: Mapping[str, Sequence[str]]
) -> Assignment:
    """Return *chosen* without the backends that cannot take the call; the first of its alternatives may step in."""
    first = chosen.backend
    able = [name for name, found in faults.items() if not found]
    if not able:
        said = ". ".join(f"{_caller(call)} on backend {name!r}: {'; '.join(found)}" for name, found in faults.items())
        asked = call.ask.given(chosen.parameters)
        others = [backend.name for backend in backends if not unfit(asked, backend, None)]
        raise MappingError(f"{said}. Backends that can: {', '.join(others) or 'none'}")
    to, *others = able
    if to == first and tuple(others) == chosen.alternatives:
        return chosen
    reason = chosen.reason if to == first else f"{chosen.reason}; {first!r} cannot: {'; '.join(faults[first])}"
    return replace(chosen, backend=to, alternatives=tuple(others), reason=reason)


def named_in_code(model: str, backends: Sequence[BackendView]) -> Assignment | None:
    """Return the backend that the code's model name means: by backend name first, then by model."""
    if model == AUTO and backends:
        return Assignment(backends[0].name, mapper="code", reason="'auto' takes the first backend")
    for backend in backends:
        if model == backend.name:
            return Assignment(backend.name, mapper="code", reason=f"the code names backend {model!r}")
    serving = [backend for backend in backends if model in backend.models]
    if not serving:
        return None
    # An engine that lists the name is asked for it; otherwise the name is ours, for the backend's own model.
    listed = _lists(serving[0], model)
    others = tuple(backend.name for backend in serving[1:] if _lists(backend, model) == listed)
    reason = f"the code names model {model!r}"
    return Assignment(serving[0].name, model if listed else None, "code", reason, others)


def _lists(backend: BackendView, model: str) -> bool:
    return backend.probe is not None and model in backend.probe.models


class Mappings:
    """The mappings that hold for all calls: the shared one, and its variants."""

    def __init__(self, shared: Mapper | None) -> None:
        self.shared = shared
        self.variants: dict[str, Mapper] = {}
        """Sparse overrides of the mapping, by name; replaced as a whole, never changed."""
        self.moving: Callable[[Sequence[Mapper]], Sequence[Mapper]] | None = None
        """Has what mappers say heed the moves of workflows (``placement.moves``); ``None`` while there are none."""

    def chain(self, own: Iterable[Mapper], variant: str | None) -> tuple[Mapper, ...]:
        """Return the mappers of a call in the order in which they are asked; *own* are those of its graph.

        Raises:
            MappingError: There is no such variant.
        """
        chain = (*own, self.shared) if self.shared is not None else tuple(own)
        if variant is None:
            return chain
        if variant not in self.variants:
            raise MappingError(f"variant {variant!r} does not exist{did_you_mean(variant, self.variants)}")
        return (self.variants[variant], *chain)


def parts_of(mapper: Mapper | None) -> Iterator[Mapper]:
    """Yield a mapper and all that it is composed of (its ``rules``, ``mappers`` and ``inner``)."""
    if mapper is None:
        return
    yield mapper
    inside = [rule.mapper for rule in getattr(mapper, "rules", {}).values()]
    for part in (*inside, *getattr(mapper, "mappers", ()), getattr(mapper, "inner", None)):
        yield from parts_of(part)
