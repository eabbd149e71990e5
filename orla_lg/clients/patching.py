"""The methods of models' clients, replaced for as long as a core is open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from orla_lg.clients import plain, stainless
from orla_lg.clients.importing import ImportHook
from orla_lg.clients.table import Client, by_module, clients

OPENAI = "openai"
"""Its SDK has a faster way in of its own (``graph.interception``)."""

_lock = threading.RLock()
"""Not held while anything is imported."""

_ours: dict[tuple[Any, str], tuple[Callable[..., Any], Callable[..., Any], bool]] = {}
"""By class and method, what stands there, what stood there, and whether that was the class's own."""


def patch(client: Client, module: ModuleType) -> None:
    """Let the requests of *client*, whose *module* is imported, be told from others. Idempotent."""
    wrapped = stainless.wrapped if client.kind == "stainless" else plain.wrapped
    with _lock:
        for kind, name in _methods(client, module):
            if (kind, name) not in _ours:
                original = getattr(kind, name)
                ours = wrapped(original)
                _ours[kind, name] = ours, original, name in vars(kind)
                setattr(kind, name, ours)


def restore(client: Client, module: ModuleType) -> None:
    """Restore the methods of *client*, except those that another package wrapped after us."""
    for kind, name in _methods(client, module):
        _restore(kind, name)


def _restore(kind: Any, name: str) -> None:
    with _lock:
        ours, original, own = _ours.get((kind, name), (None, None, False))
        if ours is None or vars(kind).get(name) is not ours:
            return
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


@cache
def _rows() -> Mapping[str, tuple[Client, ...]]:
    return by_module(clients())


_hook: ImportHook | None = None


def install() -> None:
    """Replace the methods of all clients, once they are imported. Idempotent."""
    global _hook
    if _hook is None:
        rows = _rows()

        def imported(module: ModuleType) -> None:
            for client in rows.get(module.__name__, ()):
                if client.package != OPENAI:
                    patch(client, module)

        _hook = ImportHook(rows, imported)
    _hook.install()


def uninstall() -> None:
    """Restore what was replaced, and replace nothing any more."""
    global _hook
    if _hook is not None:
        _hook.remove()
        _hook = None
    for kind, name in list(_ours):
        _restore(kind, name)
