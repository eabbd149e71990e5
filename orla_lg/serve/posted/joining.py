"""What the file says and what is posted, as one configuration: the file wins wherever both name a thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from orla_lg import config
from orla_lg.config_faults import check_url
from orla_lg.config_tables import BackendTable
from orla_lg.core.engine.backend import Backend, Cost
from orla_lg.core.engine.registry import check_engine
from orla_lg.errors import ConfigError, shown
from orla_lg.serve.posted.allowed import Allowed
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.items import PostedBackend, PostedItem, PostedKind, PostedMapping, PostedPolicy, PostedStage

ENGINES = ("openai", "sglang", "vllm", "llamacpp", "ollama")
"""Before the colon of a ``model_id``, they are no part of the model's name."""


_NONE: Mapping[str, str] = MappingProxyType({})


class NamedByFile(ConfigError):
    """A thing cannot be changed by API: the configuration file names it."""


@dataclass(frozen=True, slots=True)
class JoinedSettings:
    """A configuration of both."""

    settings: config.Settings
    """The file's, with the posted backends."""
    items: PostedItems
    posted: frozenset[str]
    """Backends that are not the file's."""
    faults: Mapping[str, str]
    """Why posted backends are left out, by name."""


def joined(
    file: config.Settings, items: PostedItems, allowed: Allowed, refused: Mapping[str, str] = _NONE
) -> JoinedSettings:
    """Return the file's settings and all that is posted as one.

    Args:
        file: What the file says.
        items: What is posted.
        allowed: What may be.
        refused: Why further backends are left out, by name.
    """
    backends, tables, faults = list(file.backends), dict(file.written.get("backends", {})), dict(refused)
    named = {backend.name for backend in file.backends}
    for name, stored in items.of(PostedBackend).items():
        if stored.item.kind == "tool" or name in refused:
            continue
        try:
            check_free(file, stored.item)
            made, table = backend_of(stored.item, allowed)
        except ConfigError as error:
            faults[name] = str(error)
            continue
        backends.append(made)
        tables[name] = table
    written = {**file.written, "backends": tables}
    settings = replace(file, backends=tuple(backends), written=written)
    return JoinedSettings(settings, items, frozenset(tables) - named, faults)


def where(file: config.Settings) -> str:
    """Return how messages name the file."""
    return file.source or "the configuration"


def check_free(file: config.Settings, item: PostedItem) -> None:
    """Refuse an item that the configuration file names.

    Raises:
        NamedByFile: It does.
    """
    if found := named_by(file, item.kind_, item.key):
        if isinstance(item, PostedStage) and not item.backend:
            return  # the file says where its calls go, and nothing else of it
        raise NamedByFile(found)


def named_by(file: config.Settings, kind: PostedKind, name: str) -> str | None:
    """Return what to say of an item that the configuration file names; ``None`` where it does not."""
    table: Any = {
        PostedBackend.kind_: {backend.name for backend in (*file.backends, *file.elsewhere)},
        PostedStage.kind_: file.mapping if isinstance(file.mapping, Mapping) else {},
        PostedMapping.kind_: file.variants,
        PostedPolicy.kind_: {policy.name for policy in file.policies},
    }.get(kind, ())
    if name not in table:
        return None
    place = {PostedKind.STAGE: "mapping", PostedKind.MAPPING: "variants"}.get(kind, kind.value)
    return f"{where(file)}: {place} names {shown(name)}, which is changed there and not by API"


def backend_of(posted: PostedBackend, allowed: Allowed) -> tuple[Backend, dict[str, Any]]:
    """Return a posted backend as the core takes it, and as it would stand in a file.

    Raises:
        ConfigError: It cannot be, or its host or its key's variable must not be named.
    """
    allowed.check_url("endpoint", posted.endpoint)
    key, variable = None, posted.api_key_env_var or None
    if variable is not None:
        allowed.check_key(variable, posted.endpoint)
        if not (key := config.key_in(variable)):
            raise ConfigError(f"api_key_env_var: the environment variable {shown(variable)} is not set")
    said = {
        "url": posted.endpoint, "model": model_of(posted.model_id), "engine": posted.type or "openai",
        "max_concurrency": posted.max_concurrency, "quality": posted.quality,
        "cost": {
            "input_per_mtoken": posted.input_cost_per_mtoken or 0.0,
            "output_per_mtoken": posted.output_cost_per_mtoken or 0.0,
            "cached_input_per_mtoken": posted.cache_read_cost_per_mtoken,
        },
    }  # fmt: skip
    if posted.queue_capacity is not None:
        said["capacity"] = posted.queue_capacity
    table = BackendTable.model_validate({**said, "api_key_env": variable})
    given = table.model_dump(exclude={"api_key_env", "admin_key_env", "cost"})
    made = Backend(name=posted.name, api_key=key, cost=Cost(**table.cost.model_dump()), **given)
    check_engine(made)
    check_url(made)
    return made, table.model_dump()


def model_of(model_id: str) -> str | None:
    """Return the model that a ``model_id`` names: what follows its engine's name and a colon."""
    engine, colon, model = model_id.partition(":")
    return (model if colon and engine in ENGINES else model_id) or None
