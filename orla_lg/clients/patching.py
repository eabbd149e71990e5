"""The methods of models' clients, replaced for as long as a core is open."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from orla_lg.clients import plain, stainless
from orla_lg.clients.table import CLIENTS, Client

_ours: dict[tuple[Any, str], tuple[Callable[..., Any], Callable[..., Any], bool]] = {}
"""By class and method, what stands there, what stood there, and whether that was the class's own."""


def patch(client: Client, module: ModuleType) -> None:
    """Let the requests of *client*, whose *module* is imported, be told from others. Idempotent."""
    for kind, name in _methods(client, module):
        if (kind, name) in _ours:
            continue
        original = getattr(kind, name)
        if client.kind == "stainless":
            ours = stainless.wrapped(client.package, original)
        else:
            ours = plain.wrapped(client.package, original)
        _ours[kind, name] = ours, original, name in vars(kind)
        setattr(kind, name, ours)


def restore(client: Client, module: ModuleType) -> None:
    """Restore the methods of *client*, except those that another package wrapped after us."""
    for kind, name in _methods(client, module):
        ours, original, own = _ours.get((kind, name), (None, None, False))
        if ours is None or vars(kind).get(name) is not ours:
            continue
        if own:
            setattr(kind, name, original)
        else:
            delattr(kind, name)
        del _ours[kind, name]


def _methods(client: Client, module: ModuleType) -> list[tuple[Any, str]]:
    """Return the classes and methods that *client* names, as far as its version has them."""
    found = []
    for dotted in client.methods:
        path, _, name = dotted.rpartition(".")
        kind: Any = module
        for part in path.split("."):
            kind = getattr(kind, part, None)
        if hasattr(kind, name):
            found.append((kind, name))
    return found


def install() -> None:
    """Replace the methods of all clients that are imported. Idempotent."""
    for client in CLIENTS:
        if (module := sys.modules.get(client.module)) is not None:
            patch(client, module)


def uninstall() -> None:
    """Restore what ``install`` replaced."""
    for client in CLIENTS:
        if (module := sys.modules.get(client.module)) is not None:
            restore(client, module)
