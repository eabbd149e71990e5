"""Loading the configuration again while calls run: first what would change, then all of it, or nothing.

A configuration is what the file says and what is posted (``serve.posted``), joined; the file wins. What two of them
say is compared as it is written in a file, with defaults for what is left out. A change is done, or it needs a
restart, and one of these refuses the whole: a server that does half of a file is configured by none. A backend that
is posted can become another one without a restart: it is replaced.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from orla_lg import config
from orla_lg.config_pools import moved_backends
from orla_lg.core.boundary.checked import dotted
from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.engine.registry import adapter_of
from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.mapping import Mapper
from orla_lg.core.operation.policy_choice import refined
from orla_lg.core.operation.steering import KEEP
from orla_lg.core.policies import (
    ANY_BACKEND,
    DEFAULT_REQUEST,
    DEFAULT_STAGE,
    RequestChoice,
    StageChoice,
    policies,
)
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import ConfigError, shown
from orla_lg.openai_api.client import EngineClients
from orla_lg.opening import elsewhere_in, mapper_of, own_policies
from orla_lg.orla import Orla
from orla_lg.serve.posted.allowed import Allowed
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.joining import JoinedSettings, joined
from orla_lg.serve.posted.outside import HookTies, StageHook, hook_of
from orla_lg.serve.posted.stages import PostedMapper, StageBook, variants_of

LIVE = {"max_concurrency", "capacity", "cost", "quality"}
"""Keys of a backend that change while it has calls; another URL or model is another backend."""

TABLES = ("mapping", "variants", "limits", "tags", "policies", "stages")
POLICIES = ("policy", "stage_policy", "request_policy")
GONE_POLL_S = 0.2
MOST_ASKED = 16
"""So many new backends are asked at once what they are."""


@dataclass(frozen=True, slots=True)
class Changes:
    """What loading a configuration again would do."""

    before: config.Settings
    after: config.Settings
    file: config.Settings | None = None
    """What the file says of what comes after; ``None``: all of it."""
    posted: JoinedSettings | None = None
    """What else comes after."""
    done: tuple[str, ...] = ()
    """A line for each change."""
    refused: tuple[str, ...] = ()
    """The same for those that need a restart."""
    added: tuple[Backend, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Backend, ...] = ()
    replaced: tuple[Backend, ...] = ()
    """Posted ones that become others under their names."""
    keys: frozenset[str] = field(default_factory=frozenset)
    """At the top of the file, other than ``backends``."""

    def text(self) -> str:
        """Return those that are done as lines."""
        return "\n".join(f"  {line}" for line in self.done) or "  nothing"

    def check(self, *, dry_run: bool = False) -> None:
        """Refuse what cannot be done while calls run.

        Raises:
            ConfigError: Naming file and keys.
        """
        if self.refused:
            why = "".join(f"\n  - {line}" for line in self.refused)
            fate = "would change nothing" if dry_run else "nothing was changed"
            raise ConfigError(f"{self.after.source}: {fate}; these need a restart:{why}")


def changes(before: config.Settings, after: config.Settings, posted: frozenset[str] = frozenset()) -> Changes:
    """Return what differs between two configurations; *posted* backends of both may be replaced."""
    done: list[str] = []
    refused: list[str] = []
    found = {each.name: each for each in before.backends}, {each.name: each for each in after.backends}
    added = tuple(each for name, each in found[1].items() if name not in found[0])
    removed = tuple(name for name in found[0] if name not in found[1])
    done += [f"backend {each.name!r} is added: {each.engine} at {each.url}" for each in added]
    done += [f"backend {name!r} is removed; calls that wait or run there go on" for name in removed]
    urls = {found[0][name].url.rstrip("/"): name for name in removed}
    refused += [
        f"backend {urls[each.url.rstrip('/')]!r} has another name, {each.name!r}: both would fill one engine"
        for each in added
        if each.url.rstrip("/") in urls
    ]
    changed, replaced = list[Backend](), list[Backend]()
    for name in (each for each in found[0] if each in found[1]):
        tables = _table(before, name), _table(after, name)
        differing = {key for key in tables[1] if tables[0].get(key) != tables[1][key]}
        for key in sorted(differing):
            said = f"{dotted('backends', name, key)}: {_shown(tables[0].get(key))} becomes {_shown(tables[1][key])}"
            (done if key in LIVE or name in posted else refused).append(said)
        if differing:
            (changed if differing <= LIVE else replaced).append(found[1][name])
    refused += moved_backends(before.pools, after.pools)
    keys = frozenset(key for key in after.written if key != "backends" and _said(before, key) != _said(after, key))
    for key in (each for each in after.written if each in keys):
        is_live = key in (*TABLES, *POLICIES, "load_aware", "pools")
        (done if is_live else refused).extend(_differing(key, _said(before, key), _said(after, key)))
    return Changes(
        before, after, done=tuple(done), refused=tuple(refused), added=added, removed=removed,
        changed=tuple(changed), replaced=tuple(replaced), keys=keys,
    )  # fmt: skip


def _table(settings: config.Settings, backend: str) -> Mapping[str, Any]:
    """Return what is written of a backend; nothing where no file says it (the demo, the environment)."""
    table: Mapping[str, Any] = settings.written.get("backends", {}).get(backend, {})
    return table


def _said(settings: config.Settings, key: str) -> Any:
    said = settings.written.get(key, config.DEFAULTS[key])
    return {policy["name"]: policy for policy in said} if key == "policies" else said


def _differing(key: str, before: Any, after: Any) -> Iterator[str]:
    """Yield a line for a key, or for each entry of its table, that differs."""
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        yield f"{key}: {_shown(before)} becomes {_shown(after)}"
        return
    for name in dict.fromkeys((*before, *after)):
        if name not in after:
            yield f"{dotted(key, name)}: {_shown(before[name])} is removed"
        elif name not in before:
            yield f"{dotted(key, name)}: {_shown(after[name])} is added"
        elif before[name] != after[name]:
            yield f"{dotted(key, name)}: {_shown(before[name])} becomes {_shown(after[name])}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and value.keys() >= {"action", "subjects", "resources"}:  # an access policy
        return f"{value['action']} {', '.join(value['resources'])} to {', '.join(value['subjects'])}"
    return "none" if value is None or value == {} else shown(value)


# Doing it


@dataclass(eq=False, slots=True)
class _Coming:
    """A backend on its way in: nothing of it is seen yet."""

    backend: Backend
    adapter: BackendAdapter
    clients: EngineClients


@dataclass(eq=False, slots=True)
class _Leaving:
    """A backend on its way out."""

    scheduler: BackendScheduler
    clients: EngineClients | None
    """Its own, where another one has its name; else they are found by that."""
    is_replaced: bool
    """Another one has its name."""

    @property
    def is_busy(self) -> bool:
        """Whether it has calls yet."""
        return bool(self.scheduler.queue.in_flight or self.scheduler.queue.waiting)

    def keeps_out(self, backend: Backend) -> bool:
        """Whether a backend must wait for its end: both would fill one engine."""
        mine = self.scheduler.backend
        is_same = (mine.name, mine.url.rstrip("/")) == (backend.name, backend.url.rstrip("/"))
        return is_same and self.is_busy


class Reloader:
    """Applies another configuration to a running core. Of the server's loop.

    Args:
        orla: The core.
        settings: What it was built from.
        check_backend: Refuses a backend that is none; raises ``ConfigError``.
        allowed: What may be posted.
    """

    def __init__(
        self,
        orla: Orla,
        settings: config.Settings,
        check_backend: Callable[[Backend], None],
        allowed: Allowed | None = None,
    ) -> None:
        self.settings = self.file = settings
        """With what is posted, and what the file says of it."""
        self.posted = JoinedSettings(settings, PostedItems(), frozenset(), {})
        """What is applied."""
        self.stages = StageBook(self.posted.items)
        self.hook: StageHook | None = None
        """The outside mapper in use."""
        self.ties = HookTies()
        """What it is told and counted by."""
        self._orla = orla
        self._check_backend = check_backend
        self._allowed = allowed or Allowed()
        self._shared = orla.core.serving.mappings.shared
        self._variants = dict(orla.core.serving.mappings.variants)
        """The file's."""
        self._leaving = list[_Leaving]()

    @property
    def leaving(self) -> set[str]:
        """Names of backends that were removed and still have calls."""
        return {each.scheduler.backend.name for each in self._leaving}

    def look(self, items: PostedItems | None = None) -> Changes:
        """Return what loading the file again would do, without doing it.

        Args:
            items: What is posted; ``None``: what is applied.

        Raises:
            ConfigError: There is no file, it is wrong, or a backend in it is none.
        """
        if not self.settings.source:
            raise ConfigError("there is no configuration to load again; the server was started without one")
        file = config.load(self.settings.source, pool=self.settings.pool)
        return self._changes(file, self.posted.items if items is None else items)

    def look_posted(self, items: PostedItems) -> Changes:
        """Return what applying *items* would do, beside the file as it was last loaded.

        Raises:
            ConfigError: A backend among them is none, or cannot come yet.
        """
        return self._changes(self.file, items)

    def _changes(self, file: config.Settings, items: PostedItems) -> Changes:
        both = joined(file, items, self._allowed)
        if refused := self._refused(self._compared(file, both)):
            of_posted = {name: fault for name, fault in refused.items() if name in both.posted}
            for name, fault in refused.items():
                if name not in of_posted:
                    raise ConfigError(fault)
            both = joined(file, items, self._allowed, of_posted)
        return self._compared(file, both)

    def _compared(self, file: config.Settings, both: JoinedSettings) -> Changes:
        found = changes(self.settings, both.settings, both.posted | self.posted.posted)
        return replace(found, file=file, posted=both)

    def _refused(self, found: Changes) -> dict[str, str]:
        """Return why backends cannot come, by name."""
        coming, refused = (*found.added, *found.replaced), dict[str, str]()

        def look_at(backend: Backend) -> None:
            try:
                if any(each.keeps_out(backend) for each in self._leaving):
                    raise ConfigError(
                        f"{found.after.source}: backends.{backend.name}: one of that name was removed, and has calls "
                        "yet; they end first"
                    )
                self._check_backend(backend)
            except ConfigError as error:
                refused[backend.name] = str(error)

        if coming:
            with ThreadPoolExecutor(min(len(coming), MOST_ASKED)) as asking:
                list(asking.map(look_at, coming))
        return refused

    def try_out(self, found: Changes) -> None:
        """Refuse what ``apply`` would refuse, without doing any of it.

        Raises:
            ConfigError, MappingError: As ``apply``; only what a policy of one's own makes of waiting calls is not
                found out.
        """
        found.check(dry_run=True)
        self._mappers(found)
        stages, requests = ordering(found.after)
        for backend in found.after.backends:
            policies(backend.name, stages, requests)

    def _mappers(self, found: Changes) -> tuple[Mapper | None, dict[str, Mapper]]:
        """Return the mapper and the variants that the file says; those in use where it says the same."""
        if found.file is self.file:
            return self._shared, self._variants
        shared, variants, _ = _planned(found.after)
        return shared, variants

    def apply(self, found: Changes, items: PostedItems | None = None) -> None:
        """Do all of it.

        Args:
            found: From ``look``.
            items: What is posted, as it is stored now; ``None``: as it was looked at.

        Raises:
            ConfigError, MappingError: Something cannot be done; nothing was changed.
        """
        found.check()
        after, serving = found.after, self._orla.core.serving
        (shared, variants), (stages, requests) = self._mappers(found), ordering(after)
        coming = [_coming(backend) for backend in (*found.added, *found.replaced)]
        schedulers = {
            each.backend.name: serving.scheduler_of(
                each.backend, each.adapter, policies(each.backend.name, stages, requests)
            )
            for each in coming
        }
        for backend in found.added:
            serving.schedulers[backend.name] = schedulers[backend.name]
        try:
            if not found.keys.isdisjoint(POLICIES):
                serving.steering.set_policy(stages, requests, None)
        except ConfigError:
            for backend in found.added:
                serving.schedulers.retire(backend.name)
                serving.schedulers.forget(backend.name)
            raise
        # From here on nothing fails.
        if after.pool and (elsewhere := serving.schedulers.elsewhere) is not None:
            elsewhere.configure(*elsewhere_in(after))
        for backend in found.replaced:
            self._retire(backend.name, is_replaced=True)
            serving.schedulers[backend.name] = schedulers[backend.name]
        self._take_names(found.added)
        for each in coming:
            self._orla.core.clients[each.backend.name] = each.clients
            serving.resources.enlist(each.backend, each.adapter)
            serving.resources.add(each.clients.close)
        for backend in found.changed:
            self._change(backend)
        for mapper in (shared, *variants.values()):
            serving.learners.enlist(mapper)
        self._shared, self._variants = shared, variants
        self.settings, self.file = after, found.file or after
        posted = found.posted or JoinedSettings(after, PostedItems(), frozenset(), {})
        self._place(posted if items is None else replace(posted, items=items))
        if "limits" in found.keys:
            serving.limits.shared = after.limits
        self._guard(found)
        for name in found.removed:
            self._retire(name, is_replaced=False)
        self._orla.core.stage_names.look(serving)

    def _place(self, posted: JoinedSettings) -> None:
        """Have calls go where the file and what is posted say."""
        mappings = self._orla.core.serving.mappings
        self.posted, self.stages = posted, StageBook(posted.items)
        self.hook = hook_of(posted.items, self._allowed, self.hook, self.ties)
        table = self.file.mapping if isinstance(self.file.mapping, Mapping) else None
        is_posted = bool(self.stages) or self.hook is not None
        mappings.shared = PostedMapper(self._shared, table, self.stages, self.hook) if is_posted else self._shared
        mappings.variants = variants_of(posted.items, self._variants, self.stages)

    def _retire(self, name: str, *, is_replaced: bool) -> None:
        core = self._orla.core
        clients = core.clients.pop(name, None) if is_replaced else None
        scheduler = core.serving.schedulers.retire(name)
        if scheduler.queue.paused:  # by its name it can be resumed no more
            with scheduler.changing():
                scheduler.queue.paused = False
        if (moves := core.serving.steering.moves) is not None:  # nor is one that comes by its name drained
            moves.resumed(name)
        self._leaving.append(_Leaving(scheduler, clients, is_replaced))

    def _take_names(self, added: Iterable[Backend]) -> None:
        """Have those that leave keep their clients by themselves, where others come by their names."""
        names = {backend.name for backend in added}
        for each in self._leaving:
            if each.scheduler.backend.name in names and not each.is_replaced:
                each.clients = self._orla.core.clients.pop(each.scheduler.backend.name, None)
                each.is_replaced = True

    def _guard(self, found: Changes) -> None:
        """Let access policies, tags and the labels of stages be what the file says of them."""
        guard = self._orla.core.serving.guard
        if "tags" in found.keys:
            guard.set_tags(found.after.tags)
        if "stages" in found.keys:
            guard.set_stage_labels(found.after.stages, "file")
        if found.before.policies != found.after.policies:
            guard.set_policies(found.after.policies, "file")

    def _change(self, backend: Backend) -> None:
        scheduler = self._orla.core.serving.schedulers[backend.name]
        scheduler.backend = replace(scheduler.backend, cost=backend.cost, quality=backend.quality)
        bounds = {
            name: getattr(backend, name) if getattr(backend, name) != getattr(scheduler.backend, name) else KEEP
            for name in ("max_concurrency", "capacity")
        }
        if set(bounds.values()) != {KEEP}:
            self._orla.core.serving.steering.set_limit(backend.name, **bounds)

    async def see_off(self, *, once: bool = False) -> None:
        """Close what belongs to removed backends, each when its last call has ended.

        Args:
            once: Return when none is left; else it goes on for those to come.
        """
        while self._leaving or not once:
            for each in list(self._leaving):
                await self._see_off(each)
            await asyncio.sleep(GONE_POLL_S)

    async def _see_off(self, leaving: _Leaving) -> None:
        serving, scheduler = self._orla.core.serving, leaving.scheduler
        if leaving.is_busy:
            return
        scheduler.turn_away()
        name = scheduler.backend.name
        if not any(each is not leaving and each.scheduler.backend.name == name for each in self._leaving):
            serving.schedulers.forget(name)
        clients = leaving.clients if leaving.is_replaced else self._orla.core.clients.pop(name, None)
        if clients is not None:
            clients.close()
        serving.resources.dismiss(scheduler.adapter)
        await asyncio.wrap_future(serving.background.submit(scheduler.adapter.aclose()))
        self._leaving.remove(leaving)


def _planned(
    after: config.Settings,
) -> tuple[Mapper | None, dict[str, Mapper], tuple[StageChoice, RequestChoice]]:
    """Return the mapper, the variants and the policies that a configuration says.

    Raises:
        ConfigError, MappingError: They do not fit its backends.
    """
    if faults := after.faults():
        raise type(faults[0])(f"{after.source}: {faults[0]}")
    shared = None if after.mapping == {} else mapper_of(after, after.mapping)
    return shared, {name: mapper_of(after, table) for name, table in after.variants.items()}, ordering(after)


def _coming(backend: Backend) -> _Coming:
    adapter = adapter_of(backend)
    return _Coming(backend, adapter, EngineClients(backend, keep_alive=adapter.keep_alive))


def ordering(settings: config.Settings) -> tuple[StageChoice, RequestChoice]:
    """Return the policies of both levels as a configuration says them, each for all that it does not name."""
    stages, requests = refined(settings.policy, own_policies(settings), settings.request_policy)
    if isinstance(stages, Mapping):
        stages = {ANY_BACKEND: DEFAULT_STAGE, **stages}
    if isinstance(requests, Mapping):
        requests = {ANY_STAGE: DEFAULT_REQUEST, **requests}
    return DEFAULT_STAGE if stages is None else stages, DEFAULT_REQUEST if requests is None else requests
