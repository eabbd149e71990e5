"""Imports point one way: cli → workflow → orla → graph, openai_api, adapters → core → errors; no circles.

Beside them stand ``engines``, which only the command line and the demo know, and ``testing``, which only the
command line does.
"""

from __future__ import annotations

import ast
import functools
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "orla_lg").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]
LIBRARY = (
    "errors", "core", "control", "mappers", "openai_api", "testing", "adapters", "graph", "config", "orla",
    "workflow",
)  # fmt: skip
LAYERS = (*LIBRARY, "__init__", "engines", "check", "explain", "top", "demo", "cli")
OURS = ("orla_lg", "orla_lg_")


def name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "adapters" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(file): file for file in SOURCES}


@functools.cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def layer(module: str) -> int:
    if not module.startswith("orla_lg."):
        return LAYERS.index("__init__" if module == "orla_lg" else "adapters")
    part = module.split(".")[1].strip("_")
    return LAYERS.index("cli" if part == "main" else part) if part in (*LAYERS, "main") else len(LAYERS)


def imports(file: Path, *, runtime: bool) -> set[str]:
    """Return the modules that *file* imports; with *runtime*, only those imported when it is imported."""
    found, todo = set(), list(parsed(file).body)
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
    return found


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
                assert known or other.startswith(("orla_lg.core", "orla_lg.errors")), f"{module} imports {other}"


def test_engines_stand_beside_the_library() -> None:
    known = ("orla_lg.engines", "orla_lg.errors", "orla_lg_llamacpp.embedded", "orla_lg_llamacpp.model")
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


def test_no_circles() -> None:
    graph = {module: imports(file, runtime=True) & set(MODULES) for module, file in MODULES.items()}
    TopologicalSorter(graph).prepare()


def test_no_class_name_stands_in_two_modules() -> None:
    where: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, set()).add(module)
    assert not {each: sorted(modules) for each, modules in where.items() if len(modules) > 1}
