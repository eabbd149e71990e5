"""``orla-lg clients``: which clients' calls are served in this environment, and which pass by."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import textwrap
from collections.abc import Sequence
from importlib import metadata
from operator import attrgetter
from typing import Any

from orla_lg.clients.table import ENTRY_POINTS, PASSING, Client, Passing, clients

EXAMPLES = f"""\
A client is a package that sends requests to models. Inside a graph that `Orla.wrap` returned, the requests of these
are mapped, queued and recorded like those of ChatOpenAI, whichever of their classes a node uses: a LangChain model or
the SDK itself. Nothing needs to be set; a package that a node imports later is served as well.

examples:
  orla-lg clients                what is served here, with versions
  orla-lg clients --json | jq .  for machines

A wire is an API by which models are called: `chat` (OpenAI's chat completions), `responses`, `messages`
(Anthropic's), `ollama-chat` and so on. `orla-lg check` says which of them your engines speak; what is asked on
another one is translated. A package of your own is added by an entry point of the group {ENTRY_POINTS}
(docs/clients.md).

exit status: 0; 1 a package is there, but in a version whose calls cannot be served
"""

SERVED = "served inside wrapped graphs:"
PASSES = "passes by, recorded as external:"
MISSING = "not installed"
CELL_CHARS, LINE_CHARS = 30, 110


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the top parser."""
    parser = subparsers.add_parser(
        "clients",
        help="list the packages whose model calls are served in this environment",
        description="List the packages whose model calls are served in this environment, and those that pass by.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, and return the exit status."""
    rows = [_Row(client) for client in clients()]
    if args.json:
        found = {"served": [row.as_dict() for row in rows], "passing": [_passing(each) for each in PASSING]}
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_text(rows)))
    return 1 if any(row.fault for row in rows) else 0


def version_of(package: str) -> str | None:
    """Return the version of a package that is installed; ``None`` where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class _Row:
    """What is found of one client here."""

    def __init__(self, client: Client) -> None:
        self.client, self.version = client, version_of(client.package)
        self.fault = None if self.version is None else _fault(client)

    def as_dict(self) -> dict[str, Any]:
        client = self.client
        return {
            "client": client.package,
            "version": self.version,
            "served": self.version is not None and self.fault is None,
            "fault": self.fault,
            "module": client.module,
            "methods": list(client.methods),
            "kind": client.kind,
            "wires": list(client.wires),
            "forms": list(client.forms),
            "models": list(client.models),
        }

    @property
    def cells(self) -> tuple[str, ...]:
        client = self.client
        wires, forms, models = (", ".join(each) for each in (client.wires, client.forms, client.models))
        return (client.package, self.version or MISSING, wires, forms, models)


def _fault(client: Client) -> str | None:
    """Return why a client that is installed is not served: its methods are looked up, as for a graph's calls."""
    try:
        module = importlib.import_module(client.module)
    except Exception as error:  # noqa: BLE001 - another package's code may raise anything
        return f"{client.module} cannot be imported: {type(error).__name__}: {error}"
    missing = [method for method in client.methods if not _has(module, method)]
    return f"this version has no {' and no '.join(missing)} to take calls over at" if missing else None


def _has(module: Any, method: str) -> bool:
    try:
        return callable(attrgetter(method)(module))
    except AttributeError:
        return False


def _passing(each: Passing) -> dict[str, str | None]:
    return {
        "package": each.package, "version": version_of(each.package), "models": each.models, "why": each.why,
        "instead": each.instead,
    }  # fmt: skip


def _text(rows: Sequence[_Row]) -> list[str]:
    here = sorted(rows, key=lambda row: row.version is None)
    lines = [SERVED, *_table([("client", "version", "wires", "forms", "models"), *(row.cells for row in here)])]
    lines += [f"  FAULT {row.client.package}: {row.fault}" for row in rows if row.fault]
    if PASSING:
        lines += ["", PASSES]
    for each in PASSING:
        version = version_of(each.package) or f"({MISSING})"
        said = f"{each.package} {version}, {each.models}: {each.why}; {each.instead}"
        lines += textwrap.wrap(
            said, LINE_CHARS, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
    return lines


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines; a cell that is long goes on in the next line."""
    folded = [[textwrap.wrap(cell, CELL_CHARS, break_on_hyphens=False) or [""] for cell in row] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*folded, strict=True)]
    return [
        "  " + "  ".join(f"{part:<{width}}" for part, width in zip(parts, widths, strict=True)).rstrip()
        for row in folded
        for parts in itertools.zip_longest(*row, fillvalue="")
    ]
