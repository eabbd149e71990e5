"""``Orla``, the face: configuration, ``wrap``, ``statistics``. It ties the graph side and the core together."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Self, TypeVar, cast, overload

from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.typing import ContextT, InputT, OutputT, StateT

from orla_lg import config
from orla_lg.core.backend import Backend, BackendAdapter
from orla_lg.core.journal import Journal
from orla_lg.core.mappers.load import LoadAware
from orla_lg.core.mappers.table import Entry, faults_of, stage_mapper
from orla_lg.core.mapping import Mapper
from orla_lg.core.memory import MemoryPolicy, memory_policy
from orla_lg.core.policies import RequestPolicy, StagePolicy, policy
from orla_lg.core.record import CallEvent, Happening, Listener, Record
from orla_lg.core.serving import Serving, Statistics
from orla_lg.errors import BackendUnavailable, ConfigError, MappingError, OrlaClosed, OrlaError, did_you_mean
from orla_lg.graph import wrap as wrapping
from orla_lg.graph.context import Core, HintsFunction, identify, origin
from orla_lg.graph.interception import uninstall
from orla_lg.graph.plan import Planned, plan
from orla_lg.graph.structure import AnyPregel
from orla_lg.openai_api.client import EngineClients

ENTRY_POINTS = "orla_lg.backends"
CONNECT_PATIENCE_S = 2.5

Graph = TypeVar("Graph", bound=AnyPregel)
MapperLike = Mapper | Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Current:
    """Who the running node is."""

    workflow: str
    run: str | None
    stage: str


class Orla:
    """Serving middleware for LangGraph: maps, queues and caches every model call of the graphs it wraps.

    Args:
        backends: The engines. The first is what ``"auto"`` means.
        mapper: Stage → backend, as a dict or a ``StageMapper``; ``"*"`` is any stage. Without a mapper the
            model named in the code decides.
        stage_policy: Which stage's sub-queue is served next: ``"fcfs"``, ``"priority"`` or an object.
        request_policy: Which call inside a sub-queue goes next.
        memory: What stays cached: ``"default"``, ``"flush_per_request"``, ``"release_only"`` or an object.
        keep_records: How many of the newest records ``records()`` keeps.
        records_file: A file that every record is appended to as a line of JSON, for ``orla-lg explain``.

    Raises:
        ConfigError: A name is unknown, or two backends share one.
        MappingError: The mapper names a backend that does not exist.
    """

    def __init__(
        self,
        backends: Sequence[Backend],
        mapper: MapperLike | None = None,
        *,
        stage_policy: str | StagePolicy = "fcfs",
        request_policy: str | RequestPolicy = "fcfs",
        memory: str | MemoryPolicy = "default",
        keep_records: int = 10_000,
        records_file: str | Path | None = None,
    ) -> None:
        adapters = {backend: _adapter(backend) for backend in _distinct(backends)}
        shared = stage_mapper(mapper)
        self._check_backends(shared, backends)
        serving = Serving(
            adapters,
            mapper=shared,
            stage_policy=policy(stage_policy),
            request_policy=policy(request_policy),
            memory=memory_policy(memory),
            keep_records=keep_records,
            journal=None if records_file is None else Journal(records_file),
        )
        clients = {
            backend.name: EngineClients(backend, keep_alive=adapter.keep_alive)
            for backend, adapter in adapters.items()
        }
        self.source = ""
        """The file that this was configured from, or ``the environment``; empty where code did it."""
        self.core = Core(serving, clients, disabled=config.disabled())
        self.signals = Signals(self.core)

    @staticmethod
    def _check_backends(mapper: Mapper | None, backends: Sequence[Backend]) -> None:
        names = [backend.name for backend in backends]
        if faults := faults_of(mapper, names):
            raise MappingError("; ".join(faults))

    @classmethod
    def from_config(cls, path: str | Path) -> Self:
        """Build from a TOML file.

        Raises:
            ConfigError: Naming file, key, what was found and what is allowed.
        """
        return cls._from_settings(config.load(path))

    @classmethod
    def from_env(cls) -> Self:
        """Build from ``ORLA_CONFIG``, the nearest ``orla.toml``, or ``ORLA_URL``.

        Raises:
            ConfigError: Nothing was found, or what was found is wrong.
        """
        return cls._from_settings(config.find())

    @classmethod
    def _from_settings(cls, settings: config.Settings) -> Self:
        def mapper(table: Mapping[str, Entry]) -> Mapper | None:
            made = stage_mapper(table)
            return LoadAware(made) if made is not None and settings.load_aware else made

        try:
            orla = cls(
                settings.backends,
                mapper(settings.mapping) if settings.mapping else None,
                stage_policy=settings.stage_policy,
                request_policy=settings.request_policy,
                memory=settings.memory,
                keep_records=settings.keep_records,
                records_file=settings.records_file,
            )
            for name, table in settings.variants.items():
                orla.variant(name, cast("Mapper", mapper(table)))
        except OrlaError as error:
            raise type(error)(f"{settings.source}: {error}") from error
        orla.source = settings.source
        return orla

    # The ways in

    @overload
    def wrap(
        self,
        graph: StateGraph[StateT, ContextT, InputT, OutputT],
        *,
        mapper: MapperLike | None = None,
        hints: HintsFunction | None = None,
    ) -> CompiledStateGraph[StateT, ContextT, InputT, OutputT]: ...

    @overload
    def wrap(
        self, graph: Graph, *, mapper: MapperLike | None = None, hints: HintsFunction | None = None
    ) -> Graph: ...

    def wrap(self, graph: Any, *, mapper: MapperLike | None = None, hints: HintsFunction | None = None) -> Any:
        """Return *graph*, compiled, with its model calls served from here; *graph* itself is untouched.

        Args:
            graph: A ``StateGraph`` or a compiled graph (``create_agent`` and ``@entrypoint`` make those).
            mapper: Asked before the shared mapper, for this graph only.
            hints: ``hints(stage, state) -> Hints``, called when a node starts; for this graph only.

        Raises:
            MappingError: The mapping cannot work; all faults that show now, at once.
            OrlaClosed: This ``Orla`` is closed.
        """
        if self.core.serving.closed:
            raise OrlaClosed("this Orla is closed; make a new one to wrap a graph")
        if not self.core.disabled:
            self.connect()
        narrowed = stage_mapper(mapper)
        self.core.serving.learners.enlist(narrowed)
        return wrapping.wrap(self.core, self.signals, graph, mapper=narrowed, hints=hints)

    def variant(self, name: str, mapper: MapperLike) -> None:
        """Name a sparse override of the mapping; a run chooses it by ``configurable={"orla": {"variant": name}}``.

        Stages that it does not name are mapped as ever, so two mappings are compared on the same traffic.
        Records carry the variant. The same name again replaces it.

        Raises:
            MappingError: It names a backend that does not exist.
        """
        override, serving = stage_mapper(mapper), self.core.serving
        assert override is not None, "a variant overrides something"
        try:
            self._check_backends(override, [desk.backend for desk in serving.desks.values()])
        except MappingError as error:
            raise MappingError(f"variant {name!r}: {error}") from error
        serving.learners.enlist(override)
        serving.variants = {**serving.variants, name: override}

    def connect(self, patience_s: float = CONNECT_PATIENCE_S) -> dict[str, BackendUnavailable | None]:
        """Let every backend say what it is, and return who could not, by name."""
        desks = self.core.serving.desks
        probing = [future for desk in desks.values() if (future := desk.connect()) is not None]
        concurrent.futures.wait(probing, timeout=patience_s)
        silent = "does not answer yet"
        return {
            name: None if desk.known else desk.fault or BackendUnavailable(f"backend {name!r} {silent}")
            for name, desk in desks.items()
        }

    # What is known

    def records(self) -> list[Record]:
        """Return the newest records, oldest first."""
        return self.core.serving.records.records()

    def statistics(self) -> Statistics:
        """Return the state now: queues, caches, runs, and what was spent."""
        return self.core.serving.statistics()

    def feedback(self, record_id: str, score: float) -> None:
        """Say how good the answer of a call was; mappers that learn take it in.

        Args:
            record_id: ``Record.id``; for ``ChatOrla`` it is in ``response_metadata["orla"]["id"]``.
            score: 0 (useless) to 1 (good).

        Raises:
            ValueError: The score does not lie in [0, 1].
            RecordUnknown: There is no such record, or it is no longer kept.
        """
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise ValueError(f"a score must be a number in [0, 1], got {score!r}")
        self.core.serving.feedback(record_id, float(score))

    def plan(self, graph: Any, *, mapper: MapperLike | None = None) -> list[Planned]:
        """Return where each stage of a graph goes, as far as that shows without a call; *mapper* as in ``wrap``."""
        compiled = wrapping.compiled(graph)
        return plan(self.core, compiled, stage_mapper(mapper) or wrapping.mapper_of(compiled, self.core))

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Tell *listener* every ``CallEvent`` as it happens; returns a function that ends that.

        Listeners run in the thread where the event happens and must be quick.
        """
        return self.core.serving.records.subscribe(listener)

    def current(self) -> Current | None:
        """Return the running node's workflow, run and stage; ``None`` outside any graph."""
        come_from = origin()
        if come_from is None:
            return None
        identity, _ = identify(come_from, self.core, "")
        return Current(identity.workflow, identity.run, identity.stage)

    def prioritize(self, run: str | None, priority: float) -> bool:
        """Give a run another priority (``None``: the running node's run), for calls waiting and to come.

        Returns whether the run is open. What a call itself says stays stronger.
        """
        if run is None:
            here = self.current()
            run = here.run if here is not None else None
        return run is not None and self.core.serving.prioritize(run, priority)

    # The end

    def close(self) -> None:
        """Refuse new calls, end waiting ones with ``OrlaClosed``, stop background work. Idempotent."""
        uninstall(self.core)
        self.core.serving.close()
        for clients in self.core.clients.values():
            clients.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        desks = self.core.serving.desks.values()
        return f"Orla({', '.join(f'{d.backend.name}={d.backend.url}' for d in desks)})"


class Signals:
    """What an ``OrlaSaver`` tells; nothing when orla_lg is disabled."""

    def __init__(self, core: Core) -> None:
        self._core = core

    def thread_deleted(self, thread_id: str) -> None:
        """Free what the thread kept in any cache."""
        if not self._core.disabled:
            self._core.serving.thread_deleted(thread_id)

    def stages_next(self, thread_id: str | None, checkpoint_ns: str, stages: Sequence[str]) -> None:
        """Tell listeners which stages come next."""
        records = self._core.serving.records
        if records.heard and not self._core.disabled:
            event = CallEvent(
                Happening.STAGES_NEXT,
                time.monotonic(),
                thread_id or "",
                stage=checkpoint_ns,
                detail=", ".join(stages),
            )
            records.tell(event)


def _distinct(backends: Sequence[Backend]) -> Sequence[Backend]:
    if not backends:
        raise ConfigError("an Orla needs at least one Backend")
    names = [backend.name for backend in backends]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two backends share the name {', '.join(map(repr, twice))}")
    return backends


def _adapter(backend: Backend) -> BackendAdapter:
    """Return the adapter that the backend's engine registered under ``orla_lg.backends``."""
    found = {entry.name: entry for entry in entry_points(group=ENTRY_POINTS)}
    if backend.engine not in found:
        raise ConfigError(
            f"backend {backend.name!r}: unknown engine {backend.engine!r}{did_you_mean(backend.engine, found)}"
        )
    return cast("BackendAdapter", found[backend.engine].load()(backend))
