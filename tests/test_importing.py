"""What an import brings: the command line and the core start without LangChain, LangGraph and the OpenAI SDK."""

from __future__ import annotations

import argparse
import ast
import json
import os
import pickle
import subprocess
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import orla_lg
from orla_lg import cli, mappers

ROOT = Path(__file__).parents[1]

HEAVY = {"langchain_core", "langchain_openai", "langgraph", "langsmith", "openai", "httpx"}
LIGHT = {"pydantic", "asyncio"}
"""Of what the smallest commands do without; others read a configuration, or work with the core's values."""

COMMAND = (
    "from contextlib import suppress\nwith suppress(SystemExit):\n    from orla_lg.cli import main; main({argv!r})"
)


def imported_by(code: str, folder: Path) -> set[str]:
    """Return the packages that are imported in a process of its own once it has run *code*."""
    report = "\nimport sys, json\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", code + report],
        cwd=folder, env={"HOME": str(folder), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}"},
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("argv", "without"),
    [
        (["--help"], HEAVY | LIGHT),
        (["no-such-command"], HEAVY | LIGHT),
        (["keys", "list"], HEAVY | LIGHT),
        (["keys", "create", "--help"], HEAVY | LIGHT),
        (["serve", "--help"], HEAVY),
        (["reload", "--help"], HEAVY),
        (["top", "--help"], HEAVY),
        (["demo", "--help"], HEAVY),
    ],
)
def test_a_command_imports_what_it_needs(argv: list[str], without: set[str], tmp_path: Path) -> None:
    assert not imported_by(COMMAND.format(argv=argv), tmp_path) & without


@pytest.mark.parametrize(
    "code", ["import orla_lg", "from orla_lg import OrlaError, Backend, Hints", "from orla_lg.core import lifecycle"]
)
def test_the_package_and_the_core_need_neither_langchain_nor_http(code: str, tmp_path: Path) -> None:
    assert not imported_by(code, tmp_path) & (HEAVY | {"pydantic"})


# The names


def homes_read(package: str) -> Iterator[tuple[str, str]]:
    """Yield each name that type checkers find in a package, and the module they find it in."""
    source = import_module(package).__file__
    assert source is not None
    for node in ast.walk(ast.parse(Path(source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for each in node.body:
                assert isinstance(each, ast.ImportFrom)
                yield from ((alias.name, f"{each.module}") for alias in each.names)


@pytest.mark.parametrize("package", ["orla_lg", "orla_lg.mappers"])
def test_type_checkers_and_programs_find_the_same_names_in_the_same_places(package: str) -> None:
    module = import_module(package)
    found = {name: f"{package}.{home}" for home, names in module._HOMES.items() for name in names.split()}
    assert found == dict(homes_read(package))
    assert sorted(found) == sorted(module.__all__)
    assert set(module.__all__) <= set(dir(module))
    for name, home in found.items():
        assert getattr(module, name) is getattr(import_module(home), name)


def test_a_star_brings_every_public_name() -> None:
    names: dict[str, object] = {}
    exec("from orla_lg import *", names)
    assert set(orla_lg.__all__) <= set(names)


def test_a_name_that_is_not_there_is_none_of_ours() -> None:
    with pytest.raises(AttributeError, match=r"module 'orla_lg' has no attribute 'Orlo'"):
        orla_lg.Orlo  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Orlo' from 'orla_lg'"):
        exec("from orla_lg import Orlo")
    assert not hasattr(orla_lg, "_nothing") and not hasattr(mappers, "__wrapped__")


def test_modules_are_attributes_as_if_they_had_been_imported(tmp_path: Path) -> None:
    imported_by("import orla_lg\nassert orla_lg.mappers.table.StageTable and orla_lg.errors.OrlaError", tmp_path)


def test_public_classes_are_pickled_and_their_types_can_be_read() -> None:
    for name in orla_lg.__all__:
        thing = getattr(orla_lg, name)
        if isinstance(thing, type):
            assert pickle.loads(pickle.dumps(thing)) is thing, name
            typing.get_type_hints(thing)
            typing.get_type_hints(thing.__init__)


# The command line


def test_the_list_of_commands_is_what_their_modules_register() -> None:
    registered = {}
    for module in cli.COMMANDS:
        commands = argparse.ArgumentParser().add_subparsers()
        import_module(module).register(commands)
        registered[module] = {each.dest: each.help for each in commands._choices_actions}
    assert registered == cli.COMMANDS


def test_help_without_the_commands_is_help_with_them() -> None:
    assert cli.parser_for(["--help"]).format_help() == cli.parser().format_help()
    assert cli.parser_for(["serve", "--help"]).format_usage() == cli.parser().format_usage()


def test_a_command_that_is_not_there_is_answered_with_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serv"])
    said = capsys.readouterr().err
    assert "invalid choice: 'serv'" in said and all(name in said for each in cli.COMMANDS.values() for name in each)
