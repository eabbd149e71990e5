"""Policies, memory and mappers of the user's own, named in a configuration as ``"module:name"``.

The module is looked for beside the file first, then where Python looks. What the name means may be an object, or
a class or function that makes it without arguments. Within one configuration a name means one object, wherever it
stands, so that a policy that keeps account sees both levels.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, TypeVar

from orla_lg.errors import NAME_CHARS, ConfigError, did_you_mean, shown

T = TypeVar("T")


def is_object(name: str) -> bool:
    """Whether a name in a configuration is meant as ``"module:name"``."""
    return ":" in name


class Objects:
    """The objects that one configuration names.

    Args:
        folder: Where its file lies.
        faults: Takes what is wrong with any of them.
    """

    def __init__(self, folder: Path, faults: list[str]) -> None:
        self._folder = folder
        self._faults = faults
        self._made: dict[str, Any] = {}

    def named(self, where: str, said: str, check: Callable[[Any], T]) -> T | str:
        """Return the object that is named, or *said* if it is a name of ours; notes what is wrong with it.

        Args:
            where: The key, for a fault.
            said: What stands there.
            check: Raises ``ConfigError`` for an object of another kind, and returns it.
        """
        if not is_object(said):
            return said
        try:
            if said not in self._made:
                self._made[said] = _made(_found(said, self._folder))
            return check(self._made[said])
        except ConfigError as error:
            self._faults.append(f"{where} = {shown(said)}: {error}")
            return said

    def among(
        self, where: str, said: str | Mapping[str, str] | None, check: Callable[[Any], T]
    ) -> T | str | Mapping[str, T | str] | None:
        """Return the same for a name, or for each of a table."""
        if said is None or isinstance(said, str):
            return None if said is None else self.named(where, said, check)
        return {name: self.named(f"{where}.{name}", each, check) for name, each in said.items()}


def _found(said: str, folder: Path) -> Any:
    module_name, _, path = said.rpartition(":")
    parts = module_name.split(".")
    if not all(each.isidentifier() for each in (*parts, *path.split("."))):
        raise ConfigError('expected "module:name", as "policies:Mine" for Mine in policies.py beside this file')
    found: Any = _imported(module_name, folder)
    for name in path.split("."):
        if not hasattr(found, name):
            public = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
            raise ConfigError(f"{module_name} has no {name!r}{did_you_mean(name, public)}")
        found = getattr(found, name)
    return found


def _imported(name: str, folder: Path) -> ModuleType:
    folder = folder.resolve()
    first = name.split(".")[0]
    loaded = getattr(sys.modules.get(first), "__file__", None)
    beside = [each for each in (folder / f"{first}.py", folder / first / "__init__.py") if each.is_file()]
    if loaded is not None and beside and Path(loaded).resolve() not in beside:
        raise ConfigError(f"{beside[0]} cannot be imported: a module {first!r} is loaded already, from {loaded}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:  # the module is the user's code
        what = "cannot be imported" if isinstance(error, ModuleNotFoundError) else "failed when it was imported"
        raise ConfigError(f"{name} {what} ({folder}): {_said(error)}") from error


def _made(found: Any) -> Any:
    """Return an object; of a class, or of a function, what it makes."""
    if not isinstance(found, type | FunctionType):
        return found
    try:
        return found()
    except Exception as error:  # the same
        raise ConfigError(f"{found.__qualname__}() failed: {_said(error)}") from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:NAME_CHARS]
