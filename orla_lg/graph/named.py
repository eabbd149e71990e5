"""Graphs named on a command line, ``module:variable``, as ``langgraph.json`` names them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from orla_lg.core.serving import Serving
from orla_lg.errors import ConfigError, OrlaError, did_you_mean, shown
from orla_lg.graph.stage_names import undecided
from orla_lg.graph.structure import AnyPregel, stages_of
from orla_lg.graph.wrap import graph_in, is_graph
from orla_lg.mappers.stages import KnownStages

EXAMPLE = "app:graph for `graph` in app.py, or ./src/app.py:graph"


def graph_named(named: str) -> Any:
    """Return the graph, or the binding of one, that ``module:variable`` or ``file.py:variable`` means.

    A variable may lie in another (``app:desk.graph``), and be a function that makes the graph.

    Raises:
        ConfigError: There is no such module, variable or graph, or the module's own code fails.
    """
    module_name, separator, path = named.rpartition(":")
    if not (separator and module_name and path):
        raise ConfigError(f"graph {shown(named)}: expected MODULE:NAME, as {EXAMPLE}")
    found: Any = _imported(named, module_name)
    for name in path.split("."):
        if not hasattr(found, name):
            graphs = [each for each, value in getattr(found, "__dict__", {}).items() if is_graph(value)]
            raise ConfigError(f"graph {shown(named)}: {module_name} has no {name!r}{did_you_mean(name, graphs)}")
        found = getattr(found, name)
    try:
        made = found() if callable(found) and not is_graph(found) else found
        graph_in(made)
    except (OrlaError, TypeError) as error:
        raise ConfigError(f"graph {shown(named)}: {error}") from error
    return made


def _imported(named: str, module_name: str) -> ModuleType:
    here = Path.cwd()
    file = Path(module_name)
    folder = file.parent if module_name.endswith(".py") else here
    if str(folder.resolve()) not in sys.path:
        sys.path.insert(0, str(folder.resolve()))
    try:
        return importlib.import_module(file.stem if module_name.endswith(".py") else module_name)
    except Exception as error:  # the module is the user's code
        what = "cannot be imported from" if isinstance(error, ModuleNotFoundError) else "failed when imported from"
        fault = f"{type(error).__name__}: {error}"
        raise ConfigError(f"graph {shown(named)}: {module_name} {what} {folder.resolve()}: {fault}") from error


def misspelt(serving: Serving, graphs: Mapping[str, AnyPregel]) -> list[str]:
    """Return a fault for every stage that is named for all graphs and decides nothing in any of these."""
    each = [stages_of(graph_in(graph)) for graph in graphs.values()]
    together = KnownStages(
        tuple(dict.fromkeys(stage for stages in each for stage in stages.callers)),
        tuple(dict.fromkeys(stage for stages in each for stage in stages.groups)),
        tuple(dict.fromkeys(stage for stages in each for stage in stages.tool_nodes)),
    )
    return undecided(serving, together, of=" and ".join(graphs))
