"""What is done right after a module's import, whenever that is and in whichever thread; from the standard library.

A finder in front of ``sys.meta_path`` lets the finders behind it find a module, and has its loader report when the
module's code has run. All else about the module, its spec and its loader is as without us by the time its code runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
import types
from collections.abc import Callable, Collection, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

log = logging.getLogger("orla_lg")

_LAZY: type = getattr(importlib.util, "_LazyModule", type(None))
"""Of a module whose code runs at the first use of it (``importlib.util.LazyLoader``)."""


class ImportHook(MetaPathFinder):
    """Reports each of some modules once its code has run; those that are imported already, at once.

    Args:
        names: The modules, with the packages they are in: ``anthropic``, ``cerebras.cloud.sdk``.
        imported: What is called with the module, in the thread that imports it, which holds the module's import lock.
            It may be called again: after ``importlib.reload``, and by two threads of which one installs the hook
            while the other imports. What it raises is logged, and fails no import.
    """

    def __init__(self, names: Collection[str], imported: Callable[[types.ModuleType], None]) -> None:
        self._names = frozenset(names)
        self._imported = imported
        self._asked = threading.local()

    def install(self) -> None:
        """Report from now on. Nothing that ``imported`` takes may be held here: an import elsewhere is waited for."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        for name in self._names:
            self._report_present(name)

    def remove(self) -> None:
        """Report nothing any more."""
        while self in sys.meta_path:
            sys.meta_path.remove(self)

    def _report_present(self, name: str) -> None:
        module = sys.modules.get(name)
        if not isinstance(module, types.ModuleType):
            return
        spec = object.__getattribute__(module, "__dict__").get("__spec__")
        if isinstance(spec, ModuleSpec) and object.__getattribute__(module, "__class__") is _LAZY:
            spec.loader = self._reporting(spec.loader)
            return
        if getattr(spec, "_initializing", False):  # by another thread, whose import began before we came
            try:
                module = importlib.import_module(name)
            except Exception:  # noqa: BLE001 - its code may raise anything; the thread that imports it gets that
                return
        self.report(module)

    def report(self, module: types.ModuleType) -> None:
        """Say that a module's code has run."""
        if self not in sys.meta_path:
            return
        try:
            self._imported(module)
        except Exception:  # an import must not fail through us, whatever the module's version looks like
            log.warning("orla_lg could not look into the module %s", module.__name__, exc_info=True)

    # MetaPathFinder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return what the other finders find for one of our modules, with a loader that reports."""
        if fullname not in self._names or fullname in (asked := self._names_asked()):
            return None
        asked.add(fullname)  # a finder behind us may ask all finders again, as other import hooks do
        try:
            spec = self._found(fullname, path, target)
        finally:
            asked.discard(fullname)
        if spec is not None:
            spec.loader = self._reporting(spec.loader)
        return spec

    def _names_asked(self) -> set[str]:
        names: set[str] = self._asked.__dict__.setdefault("names", set())
        return names

    def _found(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None) -> ModuleSpec | None:
        for finder in list(sys.meta_path):
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(fullname, path, target)
            if spec is not None:
                return spec
        return None

    def _reporting(self, loader: Any) -> Any:
        """Return a loader that reports; one that runs no code (a namespace's) or is ours already stays as it is."""
        runs_code = hasattr(loader, "exec_module") and not isinstance(loader, _ReportingLoader)
        return _ReportingLoader(loader, self) if runs_code else loader


class _ReportingLoader(Loader):
    """A module's own loader, which reports when the module's code has run."""

    def __init__(self, loader: Any, hook: ImportHook) -> None:
        self._loader, self._hook = loader, hook

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":  # of one that is being copied, before it has anything
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        """Return what the module's own loader makes."""
        create = getattr(self._loader, "create_module", None)
        made: types.ModuleType | None = None if create is None else create(spec)
        return made

    def exec_module(self, module: types.ModuleType) -> None:
        """Run the module's code under its own loader, then report."""
        if module.__spec__ is not None and module.__spec__.loader is self:
            module.__spec__.loader = self._loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._hook.report(sys.modules.get(module.__name__, module))
