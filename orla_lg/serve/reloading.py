"""Loading the configuration again while calls run: first what would change, then all of it, or nothing.

What two files say is compared as it is written there, with defaults for what is left out. A change is
done, or it needs a restart, and one of these refuses the whole: a server that does half of a file is configured
by none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orla_lg import config
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
from orla_lg.errors import ConfigError, shown
from orla_lg.openai_api.client import EngineClients
from orla_lg.opening import mapper_of
from orla_lg.orla import Orla

LIVE = {"max_concurrency", "capacity", "cost", "quality"}
"""Keys of a backend that change while it has calls; another URL or model is another backend."""

TABLES = ("mapping", "variants", "limits", "tags", "policies", "stages")
POLICIES = ("policy", "stage_policy", "request_policy")
GONE_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Changes:
    """What loading a configuration again would do."""

    before: config.Settings
    after: config.Settings
    done: tuple[str, ...] = ()
    """A line for each change."""
    refused: tuple[str, ...] = ()
    """The same for those that need a restart."""
    added: tuple[Backend, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[Backend, ...] = ()
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


def changes(before: config.Settings, after: config.Settings) -> Changes:
    """Return what differs between two configurations."""
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
    changed = []
    for name in (each for each in found[0] if each in found[1]):
        tables = before.written["backends"][name], after.written["backends"][name]
        differing = {key for key in tables[1] if tables[0][key] != tables[1][key]}
        for key in sorted(differing):
            said = f"{dotted('backends', name, key)}: {_shown(tables[0][key])} becomes {_shown(tables[1][key])}"
            (done if key in LIVE else refused).append(said)
        if differing and differing <= LIVE:
            changed.append(found[1][name])
    keys = frozenset(key for key in after.written if key != "backends" and _said(before, key) != _said(after, key))
    for key in (each for each in after.written if each in keys):
        is_live = key in (*TABLES, *POLICIES, "load_aware")
        (done if is_live else refused).extend(_differing(key, _said(before, key), _said(after, key)))
    return Changes(before, after, tuple(done), tuple(refused), added, removed, tuple(changed), keys)


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
    return "none" if value is None or value == {} else shown(value)


# Doing it


@dataclass(eq=False, slots=True)
class _Coming:
    """A backend on its way in: nothing of it is seen yet."""

    backend: Backend
    adapter: BackendAdapter
    clients: EngineClients


class Reloader:
    """Applies another configuration to a running core. Of the server's loop.

    Args:
        orla: The core.
        settings: What it was built from.
        check_backend: Refuses a backend that is none; raises ``ConfigError``.
    """

    def __init__(self, orla: Orla, settings: config.Settings, check_backend: Callable[[Backend], None]) -> None:
        self.settings = settings
        self._orla = orla
        self._check_backend = check_backend
        self.leaving = set[str]()
        """Backends that were removed and still have calls."""

    def look(self) -> Changes:
        """Return what loading the file again would do, without doing it.

        Raises:
            ConfigError: There is no file, it is wrong, or a backend in it is none.
        """
        if not self.settings.source:
            raise ConfigError("there is no configuration to load again; the server was started without one")
        found = changes(self.settings, config.load(self.settings.source))
        for backend in found.added:
            if backend.name in self.leaving:
                raise ConfigError(
                    f"{found.after.source}: backends.{backend.name}: one of that name was removed, and has calls "
                    "yet; they end first"
                )
            self._check_backend(backend)
        return found

    def try_out(self, found: Changes) -> None:
        """Refuse what ``apply`` would refuse, without doing any of it.

        Raises:
            ConfigError, MappingError: As ``apply``; only what a policy of one's own makes of waiting calls is not
                found out.
        """
        found.check(dry_run=True)
        _, _, (stages, requests) = _planned(found.after)
        for backend in found.after.backends:
            policies(backend.name, stages, requests)

    def apply(self, found: Changes) -> None:
        """Do all of it.

        Raises:
            ConfigError, MappingError: Something cannot be done; nothing was changed.
        """
        found.check()
        after, serving = found.after, self._orla.core.serving
        shared, variants, (stages, requests) = _planned(after)
        coming = [_coming(backend) for backend in found.added]
        for each in coming:
            ordered_by = policies(each.backend.name, stages, requests)
            serving.schedulers[each.backend.name] = serving.scheduler_of(each.backend, each.adapter, ordered_by)
        try:
            if not found.keys.isdisjoint(POLICIES):
                serving.steering.set_policy(stages, requests, None)
        except ConfigError:
            for each in coming:
                serving.schedulers.retire(each.backend.name)
                serving.schedulers.forget(each.backend.name)
            raise
        # From here on nothing fails.
        for each in coming:
            self._orla.core.clients[each.backend.name] = each.clients
            serving.resources.enlist(each.backend, each.adapter)
            serving.resources.add(each.clients.close)
        for backend in found.changed:
            self._change(backend)
        for mapper in (shared, *variants.values()):
            serving.learners.enlist(mapper)
        serving.mappings.shared = shared
        serving.mappings.variants = {**variants}
        if "limits" in found.keys:
            serving.limits.shared = after.limits
        self._guard(found)
        self.leaving |= set(found.removed)
        for name in found.removed:
            serving.schedulers.retire(name)
        self._orla.core.stage_names.look(serving)
        self.settings = after

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
        while self.leaving or not once:
            for name in list(self.leaving):
                await self._see_off(name)
            await asyncio.sleep(GONE_POLL_S)

    async def _see_off(self, name: str) -> None:
        core = self._orla.core
        serving, scheduler = core.serving, core.serving.schedulers[name]
        if scheduler.queue.in_flight or scheduler.queue.waiting:
            return
        scheduler.turn_away()
        serving.schedulers.forget(name)
        if (clients := core.clients.pop(name, None)) is not None:
            clients.close()
        serving.resources.dismiss(scheduler.adapter)
        await asyncio.wrap_future(serving.background.submit(scheduler.adapter.aclose()))
        self.leaving.discard(name)


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
    stages, requests = refined(settings.policy, settings.stage_policy, settings.request_policy)
    if isinstance(stages, Mapping):
        stages = {ANY_BACKEND: DEFAULT_STAGE, **stages}
    if isinstance(requests, Mapping):
        requests = {ANY_STAGE: DEFAULT_REQUEST, **requests}
    return DEFAULT_STAGE if stages is None else stages, DEFAULT_REQUEST if requests is None else requests
