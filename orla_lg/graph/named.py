"""Graphs named on a command line, ``module:variable``, as ``langgraph.json`` names them."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from types import ModuleType

from orla_lg.core.identity import ANY_STAGE, NAMESPACE_SEPARATOR
from orla_lg.core.serving import Serving
from orla_lg.errors import ConfigError, OrlaError, did_you_mean, shown
from orla_lg.graph.stage_names import named_by
from orla_lg.graph.structure import AnyPregel, stages_of
from orla_lg.graph.wrap import graph_in

EXAMPLE = "app:graph for `graph` in app.py, or ./src/app.py:graph"


def graph_named(named: str) -> AnyPregel:
    """Return the graph that a name of the form ``module:variable`` or ``file.py:variable`` means.

    Raises:
        ConfigError: There is no such module, variable or graph, or the module's own code fails.
    """
    module_name, separator, variable = named.rpartition(":")
    if not (separator and module_name and variable):
        raise ConfigError(f"--graph {shown(named)}: expected MODULE:NAME, as {EXAMPLE}")
    module = _imported(named, module_name)
    if not hasattr(module, variable):
        graphs = [name for name, each in vars(module).items() if _is_graph(each)]
        raise ConfigError(
            f"--graph {shown(named)}: {module_name} has no {variable!r}{did_you_mean(variable, graphs)}"
        )
    found = getattr(module, variable)
    try:
        return graph_in(found() if callable(found) and not _is_graph(found) else found)
    except (OrlaError, TypeError) as error:
        raise ConfigError(f"--graph {shown(named)}: {error}") from error


def _is_graph(thing: object) -> bool:
    try:
        graph_in(thing)
    except OrlaError:
        return False
    return True


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
        raise ConfigError(f"--graph {shown(named)}: {module_name} {what} {folder.resolve()}: {fault}") from error


def names_in(graphs: Iterable[AnyPregel]) -> set[str]:
    """Return all names that a configuration may call the stages of graphs by: keys, nodes, and those around them."""
    parts = [stage.split(NAMESPACE_SEPARATOR) for graph in graphs for stage in stages_of(graph)]
    return {
        NAMESPACE_SEPARATOR.join(each[start:end])
        for each in parts
        for end in range(1, len(each) + 1)
        for start in range(end)
    }


def misspelt(serving: Serving, graphs: Mapping[str, AnyPregel]) -> list[str]:
    """Return a fault for every stage that is named for all graphs and is in none of these."""
    known: Set[str] = names_in(graphs.values())
    of = " and ".join(graphs)
    wrong = {(where, name): None for where, name in named_by(serving) if name != ANY_STAGE and name not in known}
    return [
        f"{where} names stage {shown(name)}, which {of} does not have{did_you_mean(name, known)}"
        for where, name in wrong
    ]
