"""Faults of a configuration, each found by itself, so that one message names all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from orla_lg.core.boundary.checked import dotted
from orla_lg.core.engine.backend import Backend
from orla_lg.core.engine.registry import check_engine
from orla_lg.core.guard.flow import StageLabels
from orla_lg.core.guard.guard import checked_policies
from orla_lg.core.guard.labels import stage_labels
from orla_lg.core.guard.policies import AccessPolicy
from orla_lg.core.limits.limits import NO_LIMITS, Limits
from orla_lg.core.mapping import Mapper
from orla_lg.core.policies import ANY_BACKEND
from orla_lg.errors import ConfigError, MappingError, did_you_mean, shown
from orla_lg.mappers.table import Entry, faults_of, stage_mapper

T = TypeVar("T")

COMPLETIONS = "/chat/completions"

MOST_FAULTS = 50
"""So many stand in one message."""


def listed(source: str, faults: Sequence[object]) -> str:
    """Return faults as one message: a line for each, or all in one line if there is but one."""
    if len(faults) == 1:
        return f"{source}: {faults[0]}"
    lines = "".join(f"\n  - {fault}" for fault in faults[:MOST_FAULTS])
    more = len(faults) - MOST_FAULTS
    return f"{source}:{lines}" + (f"\n  and {more} more" if more > 0 else "")


def found(faults: list[str], read: Callable[[], T]) -> T | None:
    """Return what *read* returns, or note in *faults* what is wrong with it."""
    try:
        return read()
    except ConfigError as error:
        faults.append(str(error))
        return None


def collected(faults: list[str], reads: Iterable[Callable[[], T]]) -> list[T]:
    """Return what can be read, and note in *faults* what is wrong with the rest."""
    return [made for read in reads if (made := found(faults, read)) is not None]


def check_entries(
    faults: list[str], mapping: Mapping[str, Any] | str, variants: Mapping[str, Mapping[str, Any] | str]
) -> None:
    """Read each entry of a mapping and of its variants as it will be read, for its faults; one named is no table."""
    for where, table in (
        ("", mapping),
        *((f"{dotted('variants', name)}: ", each) for name, each in variants.items()),
    ):
        inside: list[str] = []
        if isinstance(table, Mapping):
            collected(inside, (partial(stage_mapper, {stage: entry}) for stage, entry in table.items()))
        faults += [where + fault for fault in inside]


def limits_in(faults: list[str], table: Mapping[str, Any]) -> Limits:
    """Return the limits in a table; where some are wrong, note each of these."""
    wrong: list[str] = []
    for kind, each in table.items():
        entries = each.items() if kind != "run" and isinstance(each, Mapping) and each else ()
        parts = [{kind: {name: limit}} for name, limit in entries] or [{kind: each}]
        collected(wrong, (partial(Limits.of, part) for part in parts))
    faults += wrong
    return NO_LIMITS if wrong or not table else found(faults, partial(Limits.of, table)) or NO_LIMITS


def policies_in(faults: list[str], tables: Sequence[Mapping[str, Any]]) -> tuple[AccessPolicy, ...]:
    """Return the access policies in tables; note what is wrong with some."""
    given = collected(faults, (partial(_access_policy, number, table) for number, table in enumerate(tables)))
    return found(faults, partial(checked_policies, given)) or ()


def _access_policy(number: int, table: Mapping[str, Any]) -> AccessPolicy:
    try:
        return AccessPolicy(**table)
    except ConfigError as error:
        raise ConfigError(f"{dotted('policies', number)}: {error}") from None


def stages_in(faults: list[str], tables: Mapping[str, Mapping[str, Any]]) -> dict[str, StageLabels]:
    """Return the labels of stages in tables; note what is wrong with some."""
    reads = (partial(_stage_labels, name, table) for name, table in tables.items())
    return dict(collected(faults, reads))


def _stage_labels(name: str, table: Mapping[str, Any]) -> tuple[str, StageLabels]:
    return name, stage_labels(dotted("stages", name), table)


# Between its parts


def faults_of_backends(backends: Iterable[Backend]) -> list[ConfigError]:
    """Return a fault for each URL that no HTTP client takes, and for each engine without an adapter."""
    wrong: list[ConfigError] = []
    for backend in backends:
        for check in (check_url, check_engine):
            try:
                check(backend)
            except ConfigError as error:
                wrong.append(error)
    return wrong


def check_url(backend: Backend) -> None:
    """Refuse a URL that no HTTP client takes: it knows more rules than ``Backend``."""
    import httpx  # takes 0.1 s, and most commands look at no backend

    try:
        httpx.URL(backend.url)
    except httpx.InvalidURL as error:
        raise ConfigError(
            f"backend {shown(backend.name)}: url {shown(backend.url)} cannot be opened: {error}"
        ) from error
    if backend.url.rstrip("/").endswith(COMPLETIONS):
        base = backend.url.rstrip("/").removesuffix(COMPLETIONS)
        raise ConfigError(f"backend {shown(backend.name)}: url is the base of all paths, here {shown(base)}")


def faults_of_policies(stage_policy: object, backends: Iterable[str]) -> list[str]:
    """Return a fault for each backend in stage policies that is not there; stages come with each graph."""
    known = list(backends)
    return [
        f"stage_policy: backend {shown(name)} does not exist{did_you_mean(name, known)}"
        for name in (stage_policy if isinstance(stage_policy, Mapping) else ())
        if name != ANY_BACKEND and name not in known
    ]


def faults_of_tables(
    mapping: Mapping[str, Entry] | Mapper,
    variants: Mapping[str, Mapping[str, Entry] | Mapper],
    backends: Iterable[str],
) -> list[MappingError]:
    """Return a fault for each backend in a mapping or a variant of it that is not there."""
    known, wrong = list(backends), list[MappingError]()
    for where, table in (("", mapping), *((f"variant {shown(name)}: ", each) for name, each in variants.items())):
        parts = [{stage: each} for stage, each in table.items()] if isinstance(table, Mapping) else [table]
        for part in parts:
            try:
                wrong += [MappingError(where + fault) for fault in faults_of(stage_mapper(part), known)]
            except ConfigError:
                continue  # noted where the entry is read
    return wrong


def one_server_twice(backends: Iterable[Backend]) -> list[str]:
    """Return what is to be said of backends with slots that are one and the same server."""
    at: dict[str, list[str]] = {}
    for backend in backends:
        if backend.engine == "llamacpp":
            at.setdefault(backend.url.rstrip("/"), []).append(backend.name)
    return [
        f"backends {', '.join(map(repr, names))} are one llama.cpp at {url}: each takes its slots for its own, and "
        "their workflows lose their caches to one another; give one backend the names of the others as aliases"
        for url, names in at.items()
        if len(names) > 1
    ]
