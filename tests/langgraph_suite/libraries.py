"""Whose tests are run: where a library's tests are had, what they need, and what is left out."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build"

NOT_NEEDED = re.compile(r"(fastmcp|langgraph-cli|py-spy|pyperf|pytest-codspeed|pytest-cov|pytest-watcher)\b")
"""What libraries list for their tests and these runs do without: servers, profilers."""


class CannotRun(Exception):
    """The tests could not be had, or did not run."""


@dataclass(frozen=True)
class Library:
    """One library's own tests."""

    title: str
    package: str
    """Its distribution: the tests are of the version that is installed in .venv."""
    folder: str
    """Where it lies in a checkout of its repository."""
    variable: str
    """The environment variable that names a checkout."""
    short: tuple[str, ...]
    """Tests of each kind, for a run under a minute."""
    tests: tuple[str, ...] = ("tests",)
    marks: str = "tests/conftest.py"
    """A file that is in a checkout."""
    also: tuple[str, ...] = ()
    """What the tests need and the library does not list."""
    by_design: Mapping[str, str] = field(default_factory=dict)
    """Tests that fail wrapped and are meant to: a pattern of their names, and the cause."""
    by_design_early: Mapping[str, str] = field(default_factory=dict)
    """The same where all tools start early."""

    @property
    def version(self) -> str:
        """Return the version that is installed here."""
        return importlib.metadata.version(self.package)

    @property
    def build(self) -> Path:
        """Return the folder of its tests, its environment and its logs."""
        return BUILD / f"{self.package}-suite"


LANGGRAPH = Library(
    "LangGraph", "langgraph", "libs/langgraph", "LANGGRAPH_SRC",
    # Savers that delegate and old checkpoints; interrupts, sync and async; subgraphs: the kinds that broke before.
    short=("tests/test_checkpoint_migration.py", "tests/test_interruption.py", "tests/test_subgraph_persistence.py"),
    also=("psycopg-pool",),
)  # fmt: skip

TOOL_NODE = Library(
    "LangGraph's ToolNode", "langgraph-prebuilt", "libs/prebuilt", "LANGGRAPH_SRC",
    short=("tests/test_on_tool_call.py",),
    also=("pytest-xdist",),
)  # fmt: skip

AGENTS = Library(
    "LangChain's agents", "langchain", "libs/langchain_v1", "LANGCHAIN_SRC",
    short=(
        "tests/unit_tests/agents/test_react_agent.py",
        "tests/unit_tests/agents/middleware/implementations/test_human_in_the_loop.py",
        "tests/unit_tests/agents/middleware/implementations/test_tool_call_limit.py",
        "tests/unit_tests/agents/middleware/implementations/test_tool_retry.py",
    ),
    tests=("tests/unit_tests/agents",),
    marks="tests/unit_tests/agents/conftest.py",
    by_design_early={
        r"test_framework\.py::test_create_agent_(async_)?invoke": "a tool that notes when it runs does so early",
        r"test_tool_retry\.py::.*(backoff_timing|constant_backoff)": (
            "a tool that fails so many times fails once less in its place, after its early run"
        ),
    },
)  # fmt: skip


# ── the tests ────────────────────────────────────────────────────────────────────────────────────────


def run(*command: object) -> None:
    """Run a command of the set-up; what it printed is shown if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise CannotRun(f"{' '.join(str(part) for part in command)}\n{done.stdout}{done.stderr}")


def tests_of(library: Library, source: Path | None) -> Path:
    """Return a folder with the library's ``tests`` and ``pyproject.toml``, and nothing else of it.

    The package itself is left behind: what is tested is the one installed.
    """
    home = library.build / ("checkout" if source else f"{library.package}-{library.version}")
    if source is None and (home / "tests").is_dir():
        return home
    found = _downloaded(library) if source is None else _checkout(library, source)
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(found / "tests", home / "tests")
    shutil.copy(found / "pyproject.toml", home)
    return home


def _downloaded(library: Library) -> Path:
    package, version, variable = library.package, library.version, library.variable
    print(f"getting the source distribution of {package} {version} ...", flush=True)
    folder = library.build / "sdist"
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", package)
    try:
        run(*pip, "--dest", folder, f"{package}=={version}")
    except CannotRun as failed:
        raise CannotRun(f"{failed}\nNo source distribution: name a checkout with {variable} or --source") from None
    name = f"{package.replace('-', '_')}-{version}"
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    if not (folder / name / library.marks).is_file():
        raise CannotRun(
            f"{package} {version} has no tests in its source distribution: name a checkout with {variable}"
        )
    return folder / name


def _checkout(library: Library, source: Path) -> Path:
    for folder in (source / library.folder, source):
        if (folder / library.marks).is_file() and (folder / "pyproject.toml").is_file():
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            if project.get("version") != library.version:
                told = f"the checkout is {project.get('version')}, installed is {library.version}"
                print(f"note: {told}", file=sys.stderr)
            return folder
    raise CannotRun(f"{source} is no checkout of {library.title}: there is no {library.folder}/{library.marks} in it")


def source_of(library: Library, named: Path | None) -> Path | None:
    """Return the checkout that the command line or the environment names; ``None``: the source distribution."""
    told = os.environ.get(library.variable)
    source = named or (Path(told) if told else None)
    return source.expanduser() if source else None


# ── their environment ────────────────────────────────────────────────────────────────────────────────


def environment_for(library: Library, tests: Path) -> Path:
    """Return the Python of the suite's own environment, made if it is not there or out of date."""
    project = tomllib.loads((tests / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [each for each in project["dependency-groups"]["test"] if isinstance(each, str)]
    needed = [each for each in needed if not NOT_NEEDED.match(each)]
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    versions = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    versions = without_pinned(versions, needed)
    folder = library.build
    stamp, wanted = folder / "venv" / "installed.txt", f"{ROOT}\n{needed}\n{versions}"
    python = folder / "venv" / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print("making the suite's environment ...", flush=True)
    shutil.rmtree(folder / "venv", ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(versions, encoding="utf-8")
    run(sys.executable, "-m", "venv", folder / "venv")
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraints)
    this = f"{library.package}=={library.version}"
    run(*install, "--editable", ROOT, this, *library.also, "pytest-timeout", *needed)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def without_pinned(versions: str, needed: Iterable[str]) -> str:
    """Return the lines of ``pip freeze`` without the packages whose version the tests themselves pin.

    Both as constraints would ask pip for two versions of one package, which it refuses.
    """
    pinned = {requirement.name for requirement in map(Requirement, needed) if "==" in str(requirement.specifier)}
    names = {canonicalize_name(name) for name in pinned}
    kept = (
        line
        for line in versions.splitlines()
        if canonicalize_name(re.split("[=@ ]", line, maxsplit=1)[0]) not in names
    )
    return "\n".join(kept) + "\n"
