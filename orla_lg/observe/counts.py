"""What no record tells of: changes by API, and what is asked of hooks elsewhere. One line where it happens."""

from __future__ import annotations

import threading
from collections import Counter

from orla_lg.observe.sums import BoundedNames

MOST_VALUES = 50
"""Of each label; these are names that code gives."""


class ControlCounts:
    """Counts by fixed names, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names = [BoundedNames(MOST_VALUES, "other", "other") for _ in range(4)]
        self._mutations = Counter[tuple[str, str, str]]()
        self._hooks = Counter[tuple[str, str]]()

    def mutation(self, resource: str, method: str, outcome: str) -> None:
        """Count a change by API: ``mutation("backends", "POST", "ok")``; else ``refused`` or ``error``."""
        resources, methods, outcomes, _ = self._names
        with self._lock:
            self._mutations[resources.of(resource), methods.of(method), outcomes.of(outcome)] += 1

    def hook(self, hook: str, outcome: str) -> None:
        """Count what a hook in another program said: ``hook("mapper", "applied")``, ``declined`` or ``failed``."""
        outcomes, hooks = self._names[2:]
        with self._lock:
            self._hooks[hooks.of(hook), outcomes.of(outcome)] += 1

    def mutations(self) -> dict[tuple[str, str, str], int]:
        """Return the changes by resource, method and outcome."""
        with self._lock:
            return dict(self._mutations)

    def hooks(self) -> dict[tuple[str, str], int]:
        """Return what hooks said, by hook and outcome."""
        with self._lock:
            return dict(self._hooks)
