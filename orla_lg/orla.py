"""``Orla``, the face: configuration, ``wrap``, ``statistics``. It ties the graph side and the core together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, overload

from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.typing import ContextT, InputT, OutputT, StateT

from orla_lg import config
from orla_lg.arguments import answer_wrong_arguments, belong_elsewhere
from orla_lg.clients.fitting import UNTRANSLATED, Untranslated
from orla_lg.config_faults import listed
from orla_lg.control.server import open_server
from orla_lg.core.boundary.checked import choice
from orla_lg.core.engine.given import Backends, NoBackends
from orla_lg.core.guard.guard import checked_policies
from orla_lg.core.guard.policies import AccessPolicy
from orla_lg.core.guard.subject import NOTHING as NO_TAGS
from orla_lg.core.guard.subject import checked_tags
from orla_lg.core.limits.limits import NO_LIMITS, Limits
from orla_lg.core.lookahead.forecast import Ahead, StageOutlook
from orla_lg.core.mapping import Planned
from orla_lg.core.memory.events import MemoryPolicy
from orla_lg.core.operation.policy_choice import PolicyChoice, refined
from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.operation.steering import KEEP, Keep
from orla_lg.core.placement.elsewhere import ElsewhereBackends
from orla_lg.core.policies import RequestChoice, StageChoice
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.record import Listener, Record
from orla_lg.core.steps import adrive, drive
from orla_lg.errors import BackendUnavailable, ConfigError, MappingError, OrlaClosed, shown
from orla_lg.graph import wrap as wrapping
from orla_lg.graph.context import Core, HintsFunction, identify, origin
from orla_lg.graph.interception import restore_unless_used, uninstall
from orla_lg.graph.plan import plan
from orla_lg.graph.signals import Signals
from orla_lg.graph.stage_tree import StageTree
from orla_lg.graph.structure import stages_of
from orla_lg.graph.tools.declared import DeclaredTools
from orla_lg.link.losses import OnCoreLost
from orla_lg.mappers.table import stage_mapper
from orla_lg.opening import (
    MapperLike,
    Opened,
    arguments_of,
    check_backends,
    elsewhere_in,
    mapper_of,
    own_core,
    replica,
)

CONNECT_PATIENCE_S = 2.5
"""How long ``wrap`` waits for backends to answer what they are, where no loop is running."""

NO_BACKENDS = "backends: missing; only `orla-lg serve` does without any [backends.NAME]"

Graph = TypeVar("Graph", bound=Runnable[Any, Any])
"""A compiled graph, or a binding of one (``graph.with_retry()``)."""


@dataclass(frozen=True, slots=True)
class Current:
    """Who the running node is."""

    workflow: str
    """The thread, else the run."""
    run: str | None
    stage: str
    tenant: str | None = None
    """The workflow's."""


class Orla:
    """Serving middleware for LangGraph: maps, queues and caches every model call of the graphs it wraps.

    Args:
        backends: The engines, the first of which is what ``"auto"`` means: a list of ``Backend``, or URLs by name
            where a URL is all there is to say.
        mapper: Stage → backend, as a dict or a ``StageMapper``; ``"*"`` is any stage. Without a mapper the
            model named in the code decides.
        policy: What orders calls, at both levels of the queues: a name (docs/policies.md) or an object.
        stage_policy: Which stage's sub-queue is served next, where that is another policy: the same, or a dict of
            these by backend.
        request_policy: Which call inside a sub-queue goes next: the same, a dict is by stage.
        memory: What stays cached: ``"default"``, ``"flush_at_boundary"`` (the paper's), ``"flush_per_request"``,
            ``"release_only"`` or an object (docs/memory.md).
        admission: Whether a call waits until its cache fits (docs/admission.md); ``False`` sends it at once.
        keep_records: How many of the newest records ``records()`` keeps.
        records_file: A file that every record is appended to as a line of JSON, for ``orla-lg explain``.
        limits: What each run, stages and tenants may use at most; a call beyond it ends with ``BudgetExceeded``.
        estimates_file: A file that keeps what is learned of graphs over restarts (docs/lookahead.md): read now,
            written at ``close`` and once a minute while there is something new. A broken one is renamed.
        control: A socket that ``orla-lg top`` and its likes reach this process by, in a folder of yours; without
            it, what ``ORLA_CONTROL`` names; ``False``: none (docs/live.md).
        warm_up: Whether prompts are prefilled before their calls come (docs/warm-up.md), and what that may take. For
            it the last prompt of each workflow is kept, in memory; with ``False`` none is.
        untranslatable: What becomes of a request that asks for what neither its backend's engine takes nor a
            translation can say (docs/clients.md): ``"external"`` lets it go where the code sends it, with a warning,
            ``"error"`` ends it with a ``MappingError``, so that limits hold for all that is answered.
        policies: Access policies (docs/access.md): which backends, tools and labelled data calls may use. Not to be
            mixed up with *policy*, which orders calls.
        tags: What access policies know the calls of this ``Orla`` by: ``{"team": "red"}``.

    Raises:
        ConfigError: A name is unknown, two backends share one, the estimates file cannot be read, or there can be no
            socket at *control*.
        MappingError: The mapper names a backend that does not exist.
    """

    @belong_elsewhere("it is the graph's; give it to `orla.wrap(graph, …)`", *config.OF_WRAP)
    def __init__(
        self,
        backends: Backends,
        mapper: MapperLike | None = None,
        *,
        policy: PolicyChoice | None = None,
        stage_policy: StageChoice | None = None,
        request_policy: RequestChoice | None = None,
        memory: str | MemoryPolicy = "default",
        admission: bool = True,
        keep_records: int = 10_000,
        records_file: str | Path | None = None,
        limits: Limits = NO_LIMITS,
        estimates_file: str | Path | None = None,
        control: str | Path | Literal[False] | None = None,
        warm_up: bool | WarmUp = True,
        untranslatable: Untranslated = "external",
        policies: Iterable[AccessPolicy] = (),
        tags: Mapping[str, str] = NO_TAGS,
    ) -> None:
        given, tags = checked_policies(policies), checked_tags("tags", tags)
        choice("untranslatable", untranslatable, UNTRANSLATED)
        path = config.control(control)
        self._begin(
            own_core(
                backends, mapper, policy=policy, stage_policy=stage_policy, request_policy=request_policy,
                memory=memory, admission=admission, keep_records=keep_records, records_file=records_file,
                limits=limits, estimates_file=estimates_file, warm_up=warm_up,
            ), path, untranslatable, tags, given,
        )  # fmt: skip

    def _begin(
        self, opened: Opened, control: Path | None, untranslatable: Untranslated, tags: Mapping[str, str],
        policies: Iterable[AccessPolicy] = (),
    ) -> None:  # fmt: skip
        serving, clients = opened
        serving.guard.set_tags(tags)
        serving.guard.set_policies(policies, "code")
        self.source = ""
        """The file that this was configured from, or ``the environment``; empty where code did it."""
        self.core = Core(serving, clients, disabled=config.disabled(), untranslatable=untranslatable)
        self.signals = Signals(self.core)
        self._steering = serving.steering
        for each in clients.values():
            serving.resources.add(each.close)
        serving.resources.add(restore_unless_used)
        # Last: no thread runs before, so that what raises up to here leaves nothing behind.
        self._control = None if control is None or self.core.disabled else open_server(control, serving)

    @classmethod
    @belong_elsewhere(
        "it holds for all replicas, and is in the configuration of `orla-lg serve`; an object of your own is named "
        'there as "module:name"',
        "backends", "mapper", "policy", "stage_policy", "request_policy", "memory", "admission", "limits",
        "estimates_file", "warm_up", "policies",
    )  # fmt: skip
    def remote(
        cls,
        url: str | None = None,
        *,
        key: str | None = None,
        on_core_lost: OnCoreLost = "wait",
        core_patience_s: float = 60.0,
        keep_records: int = 10_000,
        records_file: str | Path | None = None,
        control: str | Path | Literal[False] | None = None,
        untranslatable: Untranslated = "external",
        tags: Mapping[str, str] = NO_TAGS,
    ) -> Self:
        """Return an ``Orla`` whose core is another process, ``orla-lg serve``, which serves many of these.

        Backends, mapping, policies, memory and limits for all are the server's configuration. What is given to
        ``wrap`` (a mapper, hints, limits of one graph) stays here, and so do the engines' keys: each is read from the
        environment variable that the server's configuration names.

        Args:
            url: ``http://HOST:PORT``, ``https://…`` or ``unix:/PATH``, or the store in which cores are found,
                ``redis://HOST:PORT/DB`` or ``rediss://…``; several are separated by commas. Without it
                ``ORLA_SERVER`` says. A core that follows the one that is met is found by itself.
            key: Of scope ``link``; without it ``ORLA_SERVER_KEY`` says, unless ``ORLA_SERVER`` names another server
                than *url*. Loopback without keys needs none.
            on_core_lost: What becomes of calls without a core: ``"wait"``, ``"fail"`` at once, or ``"direct"``: they
                go on with this process's part of each bound. Calls at an engine go on in any case.
            core_patience_s: How long a call waits for a core. This method itself waits for so long at most, and for
                no more than 10 s, or 2 s with ``"fail"``.
            keep_records: As for ``Orla``, of this process's own calls.
            records_file: As for ``Orla``.
            control: As for ``Orla``.
            untranslatable: As for ``Orla``.
            tags: That this process claims, beside those of its key: they can narrow what its calls may do, and never
                widen it. A server without keys believes them.

        Raises:
            ConfigError: An argument is wrong, what answers is no orla_lg server, it does not take this process, or an
                engine's key is missing here.
            BackendUnavailable: No server answers.
        """
        choice("untranslatable", untranslatable, UNTRANSLATED)
        tags = checked_tags("tags", tags)
        path, orla = config.control(control), cls.__new__(cls)
        opened = replica(
            url, key, on_core_lost=on_core_lost, core_patience_s=core_patience_s, keep_records=keep_records,
            records_file=records_file,
        )  # fmt: skip
        with contextlib.ExitStack() as undo:
            undo.callback(opened.serving.close)
            orla._begin(opened, path, untranslatable, tags)
            undo.pop_all()
        orla.source = config.SERVER if url is None else ""
        return orla

    @classmethod
    def from_config(cls, path: str | Path) -> Self:
        """Build from a TOML file.

        Raises:
            ConfigError: Naming file, key, what was found and what is allowed.
        """
        return cls.from_settings(config.load(path))

    @classmethod
    def from_env(cls) -> Self:
        """Build from ``ORLA_SERVER``, ``ORLA_CONFIG``, the nearest ``orla.toml``, or ``ORLA_URL``.

        Raises:
            ConfigError: Nothing was found, or what was found is wrong.
            BackendUnavailable: ``ORLA_SERVER`` does not answer.
        """
        return cls.remote() if config.server() is not None else cls.from_settings(config.find())

    @classmethod
    def from_settings(cls, settings: config.Settings, *, may_be_empty: bool = False) -> Self:
        """Build from what a file or the environment said; ``from_config`` and ``from_env`` do this.

        Args:
            settings: What was said.
            may_be_empty: Whether there may be no backend yet, as in a server that gets them while it runs.

        Raises:
            ConfigError, MappingError: Naming the source, and what is wrong.
        """
        if not settings.backends and not may_be_empty:
            raise ConfigError(f"{settings.source}: {NO_BACKENDS}")

        if faults := settings.faults():
            kind = MappingError if all(isinstance(fault, MappingError) for fault in faults) else ConfigError
            raise kind(listed(settings.source, faults))
        try:
            mapper = None if settings.mapping == {} else mapper_of(settings, settings.mapping)
            in_pool = bool(settings.pool)
            orla = cls(settings.backends or NoBackends.YET, None if in_pool else mapper, **arguments_of(settings))
            if in_pool:  # it may name backends of other pools
                serving = orla.core.serving
                serving.schedulers.elsewhere = ElsewhereBackends(*elsewhere_in(settings))
                serving.mappings.shared = mapper
                serving.learners.enlist(mapper)
            guard = orla.core.serving.guard
            guard.set_policies(settings.policies, "file")
            guard.set_stage_labels(settings.stages, "file")
            with contextlib.ExitStack() as undo:
                undo.callback(orla.close)  # its control socket may be open
                for name, table in settings.variants.items():
                    orla.variant(name, mapper_of(settings, table))
                undo.pop_all()
        except (ConfigError, MappingError) as error:
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
        limits: Limits | None = None,
        tools_safe: Collection[str | BaseTool] | None = (),
        tools_safe_mcp: bool = False,
        split_prompts: bool = False,
    ) -> CompiledStateGraph[StateT, ContextT, InputT, OutputT]: ...

    @overload
    def wrap(
        self,
        graph: Graph,
        *,
        mapper: MapperLike | None = None,
        hints: HintsFunction | None = None,
        limits: Limits | None = None,
        tools_safe: Collection[str | BaseTool] | None = (),
        tools_safe_mcp: bool = False,
        split_prompts: bool = False,
    ) -> Graph: ...

    def wrap(
        self,
        graph: Any,
        *,
        mapper: MapperLike | None = None,
        hints: HintsFunction | None = None,
        limits: Limits | None = None,
        tools_safe: Collection[str | BaseTool] | None = (),
        tools_safe_mcp: bool = False,
        split_prompts: bool = False,
    ) -> Any:
        """Return *graph*, compiled, with its model calls served from here; *graph* itself is untouched.

        Args:
            graph: A ``StateGraph``, a compiled graph (``create_agent`` and ``@entrypoint`` make those), or what
                ``with_types``, ``bind``, ``with_retry``, ``with_listeners`` and ``with_fallbacks`` make of one.
            mapper: Asked before the shared mapper, for this graph only.
            hints: ``hints(stage, state)``, called when a node starts, says ``Hints``, a dict of them, or ``None``;
                for this graph only. What it says of a node holds for what runs inside, where that says nothing else.
            limits: For the calls made in this graph, beside those for all.
            tools_safe: Tools, or their names, that may start while the model still decodes: they are repeatable,
                have no outside effect, may run beside other tools, and may run twice for one call. A tool says the
                same itself by ``tool.metadata["orla"] = {"safe": True}``.
            tools_safe_mcp: Believe MCP servers that call a tool read-only (``readOnlyHint``).
            split_prompts: Prefill what is certain of the next prompt while slower tools still run.

        Raises:
            MappingError: The mapping cannot work; all faults that show now, at once.
            ConfigError: The limits name a stage that the graph does not have, *hints* is no function, or what is
                declared of tools means nothing.
            OrlaClosed: This ``Orla`` is closed.
        """
        if self.core.serving.services.closed:
            raise OrlaClosed("this Orla is closed; make a new one to wrap a graph")
        if not self.core.disabled:
            # A running loop must not wait. What is not learned in time is checked before a call is queued.
            probing = self._probe_all()
            if not _in_a_loop():
                concurrent.futures.wait(probing, timeout=CONNECT_PATIENCE_S)
        narrowed = stage_mapper(mapper)
        self.core.serving.learners.enlist(narrowed)
        said = DeclaredTools.of(tools_safe, believes_mcp=tools_safe_mcp, splits=split_prompts)
        return wrapping.wrap(self.core, self.signals, graph, mapper=narrowed, hints=hints, limits=limits, tools=said)

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
            check_backends(override, [view.name for view in serving.views()])
        except MappingError as error:
            raise MappingError(f"variant {shown(name)}: {error}") from error
        serving.variant(name, override)
        self.core.stage_names.look(serving)

    def connect(self, patience_s: float = CONNECT_PATIENCE_S) -> dict[str, BackendUnavailable | None]:
        """Let every backend say what it is, and return who could not, by name."""
        schedulers = self.core.serving.schedulers
        concurrent.futures.wait(self._probe_all(), timeout=patience_s)
        silent = "does not answer yet"
        return {
            name: None
            if scheduler.health.known
            else scheduler.health.fault or BackendUnavailable(f"backend {name!r} {silent}")
            for name, scheduler in schedulers.items()
        }

    def _probe_all(self) -> list[concurrent.futures.Future[None]]:
        """Ask every backend that is not known what it is; all at once, and in the background."""
        schedulers = self.core.serving.schedulers.values()
        return [probing for scheduler in schedulers if (probing := scheduler.health.connect()) is not None]

    @property
    def limits(self) -> Limits:
        """What runs, stages and tenants may use at most.

        Others may be set at any time: they hold for the calls to come, and what was spent stays spent.
        """
        return self.core.serving.limits.shared

    @limits.setter
    def limits(self, limits: Limits) -> None:
        self.core.serving.limits.shared = limits
        self.core.stage_names.look(self.core.serving)

    @property
    def policies(self) -> tuple[AccessPolicy, ...]:
        """The access policies that hold now, those of a configuration first.

        Others may be set at any time in the place of those that code gave: they hold for the calls to come.
        """
        return self.core.serving.guard.policies

    @policies.setter
    def policies(self, policies: Iterable[AccessPolicy]) -> None:
        self.core.serving.guard.set_policies(policies, "code")

    # What is known

    def records(self) -> list[Record]:
        """Return the newest records, oldest first."""
        return self.core.serving.records.records()

    def statistics(self) -> Statistics:
        """Return the state now: queues, caches, runs, and what was spent."""
        core = self.core
        early, split = core.early.statistics(), core.next_prompts.statistics()
        return replace(core.serving.statistics(), early_tools=early, split_prompts=split)

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
        compiled = wrapping.graph_in(graph)
        own = stage_mapper(mapper) or wrapping.mapper_of(compiled, self.core)
        return plan(self.core, stages_of(compiled), own)

    def stages(self, graph: Any, *, mapper: MapperLike | None = None) -> StageTree:
        """Return a graph's stages as a tree, each with the entry that decides it; *mapper* as in ``wrap``."""
        return wrapping.tree_of(wrapping.graph_in(graph), self.core, stage_mapper(mapper))

    def outlook(self, graph: Any) -> list[StageOutlook]:
        """Return what lies behind each stage of a graph: its structure, and what was learned of it so far."""
        compiled = wrapping.graph_in(graph)
        return wrapping.forecast_of(compiled, self.core, wrapping.mapper_of(compiled, self.core)).stages()

    def ahead(self, run: str | None = None) -> Ahead | None:
        """Return what is expected of a run from where it is (``None``: the running node's run).

        ``None`` if the run is not open. A graph that never ran has its structure only: all that it may do next is
        then equally likely.
        """
        run = self._running() if run is None else run
        return None if run is None else self.core.serving.progress.ahead(run)

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
        return Current(identity.name, identity.run, identity.stage, identity.tenant or None)

    def prioritize(self, run: str | None, priority: float, *, tenant: str | None = None) -> bool:
        """Give a run another priority, for calls waiting and to come. What a call itself says stays stronger.

        Args:
            run: Its id; a thread's id means all runs that are open on it; ``None``: the running node's run.
            priority: Higher is more urgent.
            tenant: Whose thread it is. A run's id needs none; with one it must be that tenant's run.

        Returns whether such a run is open.
        """
        run = self._running() if run is None else run
        return run is not None and self._steering.prioritize(run, priority, tenant)

    def move(self, workflow: str | None, backend: str | None, *, tenant: str | None = None) -> bool:
        """Have the next calls of a workflow go to another backend, and take its cache along (docs/move.md).

        What would go to a backend that serves the same model goes there instead; stages mapped to other models stay
        where they are. Calls at an engine end there. It holds until the workflow ends or is moved again, and nothing
        waits for it here: the cache follows in the background.

        Args:
            workflow: A thread's id, or a run's; ``None``: the running node's run.
            backend: Where to; ``None``: where its mapping says, again.
            tenant: Whose thread it is.

        Returns whether such a workflow is known: it runs, or is an idle thread.

        Raises:
            ConfigError: There is no such backend.
        """
        workflow = self._running() if workflow is None else workflow
        return workflow is not None and self._steering.move(workflow, backend, tenant)

    def _running(self) -> str | None:
        here = self.current()
        return None if here is None else here.run

    # What may be changed while it runs (docs/live.md)

    def pause(self, backend: str) -> None:
        """Let no more calls go to a backend: those in flight go on, those that come wait, and deadlines count.

        A call made while its caller still reads an answer from there goes on too: it could not end otherwise.

        Raises:
            ConfigError: There is no such backend.
        """
        self._steering.pause(backend)

    def drain(self, backend: str, timeout_s: float | None = None) -> bool:
        """Pause a backend and wait until nothing is in flight there; returns whether that is so.

        Its workflows, and the calls that wait for it, go to other backends that serve its model, where there are any.
        False means that *timeout_s* seconds passed (it stays paused), or that somebody resumed it.

        Raises:
            ConfigError: There is no such backend.
            OrlaClosed: ``close`` was called meanwhile.
        """
        return bool(drive(self._steering.drain(backend, timeout_s)))

    async def adrain(self, backend: str, timeout_s: float | None = None) -> bool:
        """``drain`` for a running loop."""
        return bool(await adrive(self._steering.drain(backend, timeout_s)))

    def resume(self, backend: str) -> None:
        """Let calls go to a backend again; those that waited go in order.

        Raises:
            ConfigError: There is no such backend.
        """
        self._steering.resume(backend)

    def set_policy(
        self,
        *,
        policy: PolicyChoice | None = None,
        stage_policy: StageChoice | None = None,
        request_policy: RequestChoice | None = None,
        backend: str | None = None,
    ) -> None:
        """Order calls by other policies from now on, those that wait as well; each keeps its arrival number.

        Args:
            policy: As for ``Orla``, for both levels of the queues.
            stage_policy: As for ``Orla``; what a dict does not name stays as it is, or is *policy*.
            request_policy: The same.
            backend: On this one only; ``None``: on all.

        Raises:
            ConfigError: A name is unknown, or a policy cannot order the calls that wait; nothing is changed then.
        """
        self._steering.set_policy(*refined(policy, stage_policy, request_policy), backend)
        self.core.stage_names.look(self.core.serving)

    def set_limit(
        self, backend: str, *, max_concurrency: int | Keep | None = KEEP, capacity: int | Keep = KEEP
    ) -> None:
        """Bound a backend's calls in flight (``None``: as its engine does), and how many may wait, from now on.

        A bound below what is in flight, or waits, ends nothing: it counts for those that come.

        Raises:
            ConfigError: There is no such backend, or a limit is out of its range; nothing is changed then.
        """
        self._steering.set_limit(backend, max_concurrency, capacity)

    # The end

    def close(self) -> None:
        """Refuse new calls, end waiting ones with ``OrlaClosed``, stop background work. Idempotent."""
        if self._control is not None:
            self._control.close()
        uninstall(self.core)
        self.core.early.close()
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
        schedulers = self.core.serving.schedulers.values()
        return f"Orla({', '.join(f'{d.backend.name}={d.backend.url}' for d in schedulers)})"


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


answer_wrong_arguments(Orla, methods=True)
