"""Packages whose names are imported when they are asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def lazily(
    package: str, names: Sequence[str], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package that imports its names when they are asked for.

    Its own modules are there as attributes too, as if it had imported them.

    Args:
        package: Its name.
        names: Its ``__all__``.
        homes: By module, as seen from the package, the names that it makes, with spaces between.
    """
    where = {name: f"{package}.{home}" for home, made in homes.items() for name in made.split()}

    def asked_for(name: str) -> Any:
        if (home := where.get(name)) is not None:
            found = getattr(import_module(home), name)
        elif not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")  # the import itself sets it
        else:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        setattr(sys.modules[package], name, found)
        return found

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return asked_for, listed
