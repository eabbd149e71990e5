"""Imports point one way: cli → workflow → orla → graph → clients → openai_api, adapters → wires → core → errors.

Beside them stand ``engines``, which only the command line and the demo know, and ``testing``, which only the
command line does. Inside the core the rooms stand in an order of their own, behind the files of the spine. An import
for types counts like any other: code that names a type is read with it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "orla_lg").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]
LIBRARY = (
    "importing", "errors", "arguments", "core", "virtual", "control", "mappers", "wires", "openai_api", "testing",
    "adapters", "link", "clients", "graph", "config_file", "config_faults", "config_objects", "config_tables",
    "config_pools", "config", "opening", "orla", "workflow",
)  # fmt: skip
LAYERS = (
    *LIBRARY, "__init__", "observe", "engines", "check", "timeline", "explain_tools", "explain", "plan", "top",
    "replay", "demo", "serve", "cli",
)  # fmt: skip
OURS = ("orla_lg", "orla_lg_")
BELOW_THE_CORE = ("orla_lg.core", "orla_lg.errors", "orla_lg.arguments")
"""What the core may import beside the standard library: itself, and what stands on that library alone."""


def name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "adapters" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(file): file for file in SOURCES}


def layer(module: str) -> int:
    if not module.startswith("orla_lg."):
        return LAYERS.index("__init__" if module == "orla_lg" else "adapters")
    part = module.split(".")[1].strip("_")
    return LAYERS.index("cli" if part == "main" else part) if part in (*LAYERS, "main") else len(LAYERS)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imports(file: Path, *, runtime: bool) -> frozenset[str]:
    """Return the modules that *file* imports; with *runtime*, only those imported when it is imported."""
    found, todo = set[str](), list[ast.AST](parsed(file).body)
    while todo:
        node = todo.pop()
        if runtime and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if runtime and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & set(MODULES) or {node.module}
        todo += ast.iter_child_nodes(node)
    return frozenset(found)


def test_imports_point_downwards() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, file in MODULES.items()
        for other in imports(file, runtime=False)
        if other in MODULES and layer(other) > layer(module)
    ]
    assert not wrong


def test_the_core_stands_on_the_standard_library() -> None:
    for module, file in MODULES.items():
        if module.startswith("orla_lg.core"):
            for other in imports(file, runtime=False):
                known = other.split(".")[0] in sys.stdlib_module_names
                assert known or other.startswith(("orla_lg.core", "orla_lg.errors", "orla_lg.arguments")), (
                    f"{module} imports {other}"
                )


def test_engines_stand_beside_the_library() -> None:
    known = (
        "orla_lg.engines",
        "orla_lg.errors",
        "orla_lg.arguments",
        "orla_lg_llamacpp.embedded",
        "orla_lg_llamacpp.model",
    )
    for module, file in MODULES.items():
        ours = {other for other in imports(file, runtime=False) if other.startswith(OURS)}
        if module.startswith("orla_lg.engines"):
            assert all(other.startswith(known) for other in ours), f"{module} imports {ours}"
        elif layer(module) != LAYERS.index("cli") and layer(module) != LAYERS.index("demo"):
            assert not any(other.startswith("orla_lg.engines") for other in ours), f"{module} imports {ours}"


def test_nothing_of_the_library_needs_what_tests_it() -> None:
    for module, file in MODULES.items():
        if not module.startswith("orla_lg.testing") and layer(module) != LAYERS.index("cli"):
            ours = {other for other in imports(file, runtime=False) if other.startswith("orla_lg.testing")}
            assert not ours, f"{module} imports {ours}"


def test_what_is_shipped_for_tests_needs_no_test_runner() -> None:
    for module, file in MODULES.items():
        if module.startswith("orla_lg.testing"):
            assert "pytest" not in imports(file, runtime=True), module


def test_what_runs_in_an_engines_environment_needs_nothing_of_ours() -> None:
    assert not any(other.startswith(OURS) for other in imports(MODULES["orla_lg.engines.convert"], runtime=False))


TYPES_ONLY = {
    "orla_lg": "a package whose names are imported when they are asked for",
    "orla_lg.mappers": "the same",
    "orla_lg.observe": "its two halves need packages of different extras",
    "orla_lg.demo.command": "the command line starts without what the demo needs",
    "orla_lg_sim.commands": "the command line starts without the simulator",
    "orla_lg_sim": "a package whose names are imported when they are asked for",
    "orla_lg_vllm": "a package that an engine's environment imports, without the adapter",
}
"""Modules with imports that only type checkers see, and why; elsewhere a plain import does."""

CIRCLES_LEFT: set[tuple[str, str]] = set()
"""Imports that close a circle. The list only shrinks: one that closes none any more fails the test."""


def graph_of(without: set[tuple[str, str]]) -> dict[str, set[str]]:
    return {
        module: {
            other
            for other in imports(file, runtime=False) & set(MODULES)
            if other != module and (module, other) not in without
        }
        for module, file in MODULES.items()
    }


def test_no_circles() -> None:
    TopologicalSorter(graph_of(CIRCLES_LEFT)).prepare()


def test_circles_that_are_left_still_are() -> None:
    whole = graph_of(set())
    for one, other in CIRCLES_LEFT:
        assert other in whole[one], f"{one} imports {other} no more: take it off the list"
        with pytest.raises(CycleError):
            TopologicalSorter(graph_of(CIRCLES_LEFT - {(one, other)})).prepare()


def test_types_are_imported_plainly() -> None:
    found = set()
    for module, file in MODULES.items():
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                within = [each for inner in node.body for each in ast.walk(inner)]
                if any(isinstance(each, ast.Import | ast.ImportFrom) for each in within):
                    found.add(module)
    assert found == set(TYPES_ONLY), "either import it plainly, or say why not"


# Rooms of the core

ROOMS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("boundary",), "checks and cleans what comes from outside: settings, keys, files; knows no call"),
    (("engine",), "one engine as it is seen from here: its backend, abilities, health, speed, load"),
    (("lookahead",), "structure, trace and estimates of graphs; admission reads the estimates"),
    (("guard",), "access policies and data labels; labels flow along the structure of graphs"),
    (("memory",), "what may happen to a workflow's cache, what may be asked for, and the policies between"),
    (("limits",), "bounds on runs, stages and tenants, and their usage"),
    (("cache",), "the wall, and what both kinds of cache share: orders, verification, isolation"),
    (("cache.prefix", "cache.slots"), "the two kinds behind the wall; neither knows of the other"),
    (("prefetch",), "asks the cache through the wall whether a prefetch is worth it, and sends it"),
)
"""From below: a room imports the rows above its own in this table and values of the spine; of its own row nothing."""

BESIDE = {
    "placement": "which backends a call may be mapped to: asks their schedulers",
    "accounting": "what follows a record: sums costs, reads the journal, teaches mappers",
    "operation": "changes, shows and ends a running core",
}
"""Rooms that work on the spine instead of for it, and why: they import all of it, and no room above imports them."""

ALL_ROOMS = [*(room for row, _ in ROOMS for room in row), *BESIDE]

VALUES = {
    "background": "the thread and the clock that rooms are given",
    "call": "one call, its prompt, its usage",
    "identity": "names of workflows, stages and tenants",
    "queues": "the calls that wait, and which of them may go",
    "record": "what is written of a call",
    "steps": "how a call waits",
    "workflow": "a run's state",
}
"""Files of the spine that rooms may import; the others are its machinery, which no room and no value imports."""

CORE = "orla_lg.core."

WALLED = ("cache.prefix", "cache.slots")
CHOOSES = "cache.caches"
"""The one file that knows both kinds of cache, since it chooses between them."""

RE_EXPORTS = {"backend": "engine.backend", "control": "engine.capabilities"}
"""Documented import paths of the core, for code elsewhere; ours imports the module itself."""

MISPLACED = {
    ("inflight", "cache.slots.table"): "its lease of a slot",
    ("cache.parts", "prefetch.book"): "the settings of prefetches that backends share",
    ("limits.patience", "inflight"): "how long a call still waits",
    ("limits.patience", "scheduler"): "names what it waited for",
    ("memory.manager", "scheduler"): "has its orders carried out",
    ("memory.progress", "accounting.updates"): "reports runs that end",
    ("queues", "cache.slots.table"): "the lease that comes with a grant",
}
"""Imports of the core that the rooms do not allow, and what for. The list only shrinks."""


def room_of(module: str) -> str:
    """Return the room of a module of the core (named without ``orla_lg.core``); empty for the spine."""
    rooms = [room for room in ALL_ROOMS if module == room or module.startswith(f"{room}.")]
    return max(rooms, key=len, default="")


def level(room: str) -> int:
    return next(number for number, (row, _) in enumerate(ROOMS) if room in row)


def core_edges() -> Iterator[tuple[str, str]]:
    for module, file in MODULES.items():
        if module.startswith(CORE):
            for other in imports(file, runtime=False):
                if other in MODULES and other.startswith(CORE):
                    yield module.removeprefix(CORE), other.removeprefix(CORE)


def is_allowed(module: str, other: str) -> bool:
    mine, its = room_of(module), room_of(other)
    if its in WALLED and mine != its:
        return module == CHOOSES
    if mine in BESIDE:
        return True
    if its in BESIDE:
        return not (mine or module in VALUES)
    if not its:
        return other in VALUES or not (mine or module in VALUES)
    return not mine or its == mine or level(its) < level(mine)


def test_rooms_import_what_is_below_them_and_values() -> None:
    circles = {(one.removeprefix(CORE), other.removeprefix(CORE)) for one, other in CIRCLES_LEFT}
    wrong = {edge for edge in core_edges() if not is_allowed(*edge)} - circles
    assert wrong == set(MISPLACED), "a room imports what is below it and the values of the spine"


def test_the_table_of_rooms_names_what_there_is() -> None:
    core = {module.removeprefix(CORE) for module in MODULES if module.startswith(CORE)}
    packages = {module for module in core if MODULES[f"{CORE}{module}"].name == "__init__.py"}
    assert packages == {*ALL_ROOMS}
    assert core >= {*VALUES, CHOOSES, *RE_EXPORTS, *RE_EXPORTS.values()}


def test_the_page_on_architecture_shows_the_rooms_in_their_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| \[`core/([\w/]+)`\]", page, re.M)
    assert [room.replace("/", ".") for room in shown] == ALL_ROOMS


def test_the_core_says_which_rooms_it_has() -> None:
    read = ast.get_docstring(parsed(MODULES["orla_lg.core"])) or ""
    assert all(f"``{room.rpartition('.')[2]}``" in read for room in ALL_ROOMS)


def test_the_core_says_which_files_its_spine_has() -> None:
    read = ast.get_docstring(parsed(MODULES["orla_lg.core"])) or ""
    core = {module.removeprefix(CORE) for module in MODULES if module.startswith(CORE)}
    assert {*re.findall(r"``(\w+)``", read)} - {"__init__"} == (
        {module for module in core if not room_of(module)} | {room.rpartition(".")[2] for room in ALL_ROOMS}
    )


def test_our_own_code_imports_no_re_export() -> None:
    paths = {f"{CORE}{name}" for name in RE_EXPORTS}
    for module, file in MODULES.items():
        assert not imports(file, runtime=False) & paths, f"{module}: import the module itself"


def test_no_class_name_stands_in_two_modules() -> None:
    where: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, set()).add(module)
    assert not {each: sorted(modules) for each, modules in where.items() if len(modules) > 1}
