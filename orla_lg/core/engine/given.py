"""Backends as users give them to ``Orla``: a list, one alone, a URL, or URLs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum

from orla_lg.core.engine.backend import Backend
from orla_lg.errors import ConfigError, shown

ONE_BY_URL = "default"
"""The name of a backend that is given as a URL alone, as ``ORLA_URL`` gives it."""


class NoBackends(Enum):
    """Stands for no backend at all, where an empty list is a mistake: a server gets them while it runs."""

    YET = "yet"


Backends = Backend | str | Sequence[Backend] | Mapping[str, str | Backend] | NoBackends
"""One backend, the URL of one, several, or URLs by the names that mappings use."""

RIGHT = 'give Backend(name, url) objects in a list, or {"light": "http://host:8001/v1"}: URLs by name'


def backends_of(given: object) -> tuple[Backend, ...]:
    """Return the backends that are meant.

    Raises:
        ConfigError: What stands there is none, or two of them have one name.
    """
    if isinstance(given, Backend):
        return (given,)
    if given is NoBackends.YET:
        return ()
    if isinstance(given, str):
        return (_by_url(given),)
    if isinstance(given, Mapping):
        backends = tuple(_named(name, each) for name, each in given.items())
    elif isinstance(given, Sequence) and not isinstance(given, bytes):
        backends = tuple(_listed(number, each) for number, each in enumerate(given))
    else:
        raise ConfigError(f"backends must be a list of Backend(...), got {shown(given)}; {RIGHT}")
    if not backends:
        raise ConfigError("an Orla needs at least one Backend")
    names = [backend.name for backend in backends]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two backends share the name {', '.join(map(repr, twice))}")
    return backends


def _by_url(url: str) -> Backend:
    if "://" in url:
        return Backend(ONE_BY_URL, url)
    if url.endswith(".toml"):
        raise ConfigError(f"backends: {shown(url)} is a file's name; Orla.from_config({shown(url)}) reads it")
    raise ConfigError(f"backends: {shown(url)} is no URL; {RIGHT}")


def _named(name: object, each: object) -> Backend:
    where = f"backends[{shown(name)}]"
    if isinstance(each, str) and isinstance(name, str):
        return Backend(name, each)
    if not isinstance(each, Backend):
        raise ConfigError(f"{where} must be a URL, got {shown(each)}; what else a backend has: {_example(name)}")
    if each.name != name:
        raise ConfigError(f"{where} is the Backend of another name, {shown(each.name)}")
    return each


def _example(name: object) -> str:
    return f'[Backend({shown(name)}, "http://host:8001/v1", engine="llamacpp", max_concurrency=4)]'


def _listed(number: int, each: object) -> Backend:
    if isinstance(each, Backend):
        return each
    where = f"backends[{number}]"
    if isinstance(each, str) and "://" in each:
        url = shown(each)
        raise ConfigError(
            f"{where} is a URL without a name, by which mappings and records know it; "
            f'give {{"light": {url}}}, or [Backend("light", {url})]'
        )
    raise ConfigError(f"{where} must be a Backend(...), got {shown(each)}; {RIGHT}")
