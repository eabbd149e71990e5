"""``orla-lg plan``: which stages a graph has, what lies inside what, and what decides each, before anything runs."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from orla_lg import config
from orla_lg.errors import OrlaError
from orla_lg.graph import wrap as wrapping
from orla_lg.graph.named import graph_named
from orla_lg.graph.stage_names import undecided
from orla_lg.graph.stage_tree import HEAD, LEGEND, StageTree, picture
from orla_lg.graph.structure import stages_of
from orla_lg.orla import Orla

EXAMPLES = """\
A stage is a node with code of its own, seen as a caller of models. Its name is its path: `support|model` is the node
`model` of the graph in the node `support`. What a mapping, a limit, a hint or a policy says of `support` holds for
all that runs inside it, unless a nearer name (`model`, `support|model`) says otherwise; `*` is for all the others.

examples:
  orla-lg plan app:graph                       app.py here, its variable `graph`, by the nearest orla.toml
  orla-lg plan app.desk:graph --config x.toml  another module, another file
  orla-lg plan app:graph --json | jq .         for machines
  orla-lg plan app:graph --svg stages.svg      as a picture too

A graph that its module wraps already is shown as its own Orla serves it; without a configuration only the stages are
shown. Nothing is asked of any engine, and no node runs; but the module is imported.

exit status: 0 shown, 2 there is no such graph, or the configuration is wrong
"""


UNCONFIGURED = "no orla.toml is here or above, so what decides each stage is not shown"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the top parser."""
    parser = subparsers.add_parser(
        "plan",
        help="show a graph's stages as a tree, and what decides where each runs",
        description="Show the stages of a graph as a tree, with the agents, graphs and tools they lie in, where each "
        "runs, and which entry decides that.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("graph", metavar="MODULE:GRAPH", help="where the graph is: a module, and a variable in it")
    parser.add_argument(
        "--config", metavar="FILE", help="the configuration file (default: ORLA_CONFIG, else the nearest orla.toml)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw the tree into this file too")
    parser.add_argument("--plain", action="store_true", help="print plain text, on a terminal too")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Show the tree, and return the exit status."""
    try:
        tree, notes = _read(graph_named(args.graph), args.config)
        if args.svg is not None:
            args.svg.write_text(picture(tree), encoding="utf-8")
    except (OrlaError, OSError) as error:
        print(f"orla-lg plan: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({**tree.as_dict(), "notes": notes}, indent=2))
    else:
        _print(tree, plain=args.plain)
        print("\n".join(["", *LEGEND, *(f"note: {note}" for note in notes)]))
    return 0


def _read(graph: Any, file: str | None) -> tuple[StageTree, list[str]]:
    """Return the tree of a graph, by its own ``Orla`` or the configuration's, and the names that decide nothing."""
    compiled = wrapping.graph_in(graph)
    if file is None and (core := wrapping.core_of(compiled)) is not None:
        return wrapping.tree_of(compiled, core), undecided(core.serving, stages_of(compiled))
    try:
        settings = config.load(file) if file else config.find()
    except config.NoConfiguration:
        return wrapping.tree_of(compiled, None), [UNCONFIGURED]
    with Orla.from_settings(replace(settings, control=False)) as orla:  # the socket is for the process that serves
        return orla.stages(graph), undecided(orla.core.serving, stages_of(compiled))


def _print(tree: StageTree, *, plain: bool) -> None:
    if plain or not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        print(tree)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = tree.rows()
    columns = [n for n, _ in enumerate(HEAD) if n < 2 or any(row[n] for row in rows)]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for n in columns:
        table.add_column(HEAD[n], style=("", "cyan", "green", "", "dim")[n], no_wrap=n < 2)
    for row in rows:
        table.add_row(*(Text(row[n]) for n in columns))
    Console().print(table)
