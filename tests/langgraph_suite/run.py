"""LangGraph's own tests, once as they are and once with every graph wrapped: what does wrapping change?

The tests come from the source distribution of the LangGraph that is installed in .venv, so they are of the version
that orla_lg runs on. They run in an environment of their own under build/langgraph-suite, with the versions of .venv
and what the tests need besides; the first run makes it (half a minute), the next ones find it.

Every compiled graph, every @entrypoint and every Pregel that a test makes is wrapped with an Orla whose one backend
is a stub: the tests' models are fakes, so what is compared is the graph, not the answers. A test that passes bare and
not wrapped runs again on its own, three times; if it passes each time it was unlucky (some of LangGraph's tests race
with time), else it differs. A difference that is meant stands in BY_DESIGN, with its cause.

PostgreSQL: where ORLA_TEST_POSTGRES_URL names a server, the parametrisations on PostgreSQL run too (2,000 tests more,
half an hour). A throwaway server:
    eval "$(.ci/postgres.sh start)"; make test-langgraph; .ci/postgres.sh stop
Redis and LangGraph's development server are left out. "memory_migrate_sends", which LangGraph leaves out without
Docker although it needs no service, runs.

Exit: 0 nothing differs but what is meant; 1 something does; 2 the tests could not be had or run.

Examples:
    make test-langgraph                                      everything: about ten minutes on two cores
    make test-langgraph SUITE=--short                        one file of each kind: under a minute
    make test-langgraph SUITE=tests/test_time_travel.py      chosen files
    make test-langgraph SUITE='-k interrupt'                 chosen tests
    make test-langgraph SUITE='--source ~/src/langgraph'     the tests of a checkout; or set LANGGRAPH_SRC to its path
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build" / "langgraph-suite"

BY_DESIGN: Mapping[str, str] = {}
"""Tests that fail wrapped and are meant to: a pattern of their names, and the cause."""

SHORT = ("tests/test_checkpoint_migration.py", "tests/test_interruption.py", "tests/test_subgraph_persistence.py")
"""Savers that delegate and old checkpoints; interrupts, sync and async; subgraphs: the kinds that broke before."""

NOT_NEEDED = re.compile(r"(langgraph-cli|py-spy|pyperf|pytest-cov|pytest-watcher)\b")
"""What LangGraph lists for its tests and these runs do without: servers, profilers."""

AGAIN = 3
"""So often does a test that failed wrapped run on its own."""

AGAIN_AT_MOST = 100
"""Where more fail wrapped, it was not bad luck."""

TEST_TIMEOUT_S = 120
"""For one test; the slowest takes some seconds."""


class CannotRun(Exception):
    """The tests could not be had, or did not run."""


# ── the outcome ──────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Outcomes:
    """How the tests of one run ended, by name."""

    ended: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    collected: int = 0

    @classmethod
    def read(cls, lines: Iterable[str]) -> Outcomes:
        """Return what the plugin noted; a test with a phase that failed has failed."""
        outcomes = cls()
        for line in lines:
            if not line.endswith("\n"):  # still being written
                continue
            noted = json.loads(line)
            if "collected" in noted:
                outcomes.collected = noted["collected"]
            elif outcomes.ended.get(noted["test"]) != "failed":
                outcomes.ended[noted["test"]] = noted["outcome"]
                outcomes.why[noted["test"]] = noted["why"]
        return outcomes

    def count(self, outcome: str) -> int:
        """Return how many tests ended so."""
        return sum(each == outcome for each in self.ended.values())


@dataclass
class Comparison:
    """What wrapping changed."""

    meant: dict[str, str] = field(default_factory=dict)
    """Tests that differ by design, and the cause."""
    unlucky: list[str] = field(default_factory=list)
    """Tests that failed wrapped once and then passed each time."""
    differing: dict[str, str] = field(default_factory=dict)
    """Tests that differ, and how they fail."""


def suspects(bare: Outcomes, wrapped: Outcomes) -> list[str]:
    """Return the tests that passed bare and did not pass wrapped."""
    return [test for test, outcome in bare.ended.items() if outcome == "passed" != wrapped.ended.get(test)]


def compare(bare: Outcomes, wrapped: Outcomes, again: Sequence[Outcomes], by_design: Mapping[str, str]) -> Comparison:
    """Return what wrapping changed, given how the suspects ended when they ran *again*."""
    compared = Comparison()
    for test in suspects(bare, wrapped):
        cause = next((cause for pattern, cause in by_design.items() if re.search(pattern, test)), None)
        failed = [run for run in again if run.ended.get(test) != "passed"]
        if cause is not None:
            compared.meant[test] = cause
        elif again and not failed:
            compared.unlucky.append(test)
        else:
            compared.differing[test] = next(iter(failed), wrapped).why.get(test) or "it did not run to its end"
    return compared


def table(bare: Outcomes, wrapped: Outcomes, compared: Comparison) -> str:
    """Return the outcome as a table, and below it the tests that differ, by cause."""
    lines = [f"{'':<10}{'bare':>8}{'wrapped':>9}"]
    lines += [
        f"{name:<10}{bare.count(name):>8,}{wrapped.count(name):>9,}" for name in ("passed", "failed", "skipped")
    ]
    if compared.unlucky:
        lines += ["", f"{len(compared.unlucky)} failed wrapped once and passed {AGAIN} times on their own:"]
        lines += [f"  {test}" for test in compared.unlucky]
    for title, causes in (("differ by design", compared.meant), ("DIFFER", compared.differing)):
        for cause, many in Counter(_first_line(cause) for cause in causes.values()).most_common():
            lines += ["", f"{many} {title}: {cause}"]
            lines += [f"  {test}" for test, each in causes.items() if _first_line(each) == cause]
    if not compared.differing:
        lines += ["", "Nothing differs." if not compared.meant else "Nothing else differs."]
    return "\n".join(lines)


def _first_line(why: str) -> str:
    return why.strip().partition("\n")[0][:160]


# ── the tests and their environment ──────────────────────────────────────────────────────────────────


def run(*command: object) -> None:
    """Run a command of the set-up; what it printed is shown if it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise CannotRun(f"{' '.join(str(part) for part in command)}\n{done.stdout}{done.stderr}")


def tests_of(source: Path | None, version: str) -> Path:
    """Return a folder with LangGraph's ``tests`` and ``pyproject.toml``, and nothing else of it.

    The package itself is left behind: what is tested is the one installed.
    """
    home = FOLDER / ("checkout" if source else f"langgraph-{version}")
    if source is None and (home / "tests").is_dir():
        return home
    found = _downloaded(version) if source is None else _checkout(source, version)
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(found / "tests", home / "tests")
    shutil.copy(found / "pyproject.toml", home)
    return home


def _downloaded(version: str) -> Path:
    print(f"getting the source distribution of langgraph {version} ...", flush=True)
    folder = FOLDER / "sdist"
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "langgraph")
    try:
        run(*pip, "--dest", folder, f"langgraph=={version}")
    except CannotRun as failed:
        raise CannotRun(f"{failed}\nNo source distribution: name a checkout with LANGGRAPH_SRC or --source") from None
    with tarfile.open(next(folder.glob(f"langgraph-{version}.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / f"langgraph-{version}"
    if not (unpacked / "tests").is_dir():
        raise CannotRun(
            f"langgraph {version} has no tests in its source distribution: name a checkout with LANGGRAPH_SRC"
        )
    return unpacked


def _checkout(source: Path, version: str) -> Path:
    for folder in (source / "libs" / "langgraph", source):
        if (folder / "tests" / "conftest.py").is_file() and (folder / "pyproject.toml").is_file():
            project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            if project.get("version") != version:
                print(f"note: the checkout is {project.get('version')}, installed is {version}", file=sys.stderr)
            return folder
    raise CannotRun(f"{source} is no checkout of LangGraph: there is no libs/langgraph/tests/conftest.py in it")


def environment_for(tests: Path, version: str) -> Path:
    """Return the Python of the suite's own environment, made if it is not there or out of date."""
    project = tomllib.loads((tests / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [each for each in project["dependency-groups"]["test"] if isinstance(each, str)]
    needed = [each for each in needed if not NOT_NEEDED.match(each)]
    freeze = [sys.executable, "-m", "pip", "freeze", "--exclude-editable"]
    versions = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    versions = without_pinned(versions, needed)
    stamp, wanted = FOLDER / "venv" / "installed.txt", f"{ROOT}\n{needed}\n{versions}"
    python = FOLDER / "venv" / "bin" / "python"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print("making the suite's environment ...", flush=True)
    shutil.rmtree(FOLDER / "venv", ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    constraints = FOLDER / "constraints.txt"
    constraints.write_text(versions, encoding="utf-8")
    run(sys.executable, "-m", "venv", FOLDER / "venv")
    install = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraints)
    run(*install, "--editable", ROOT, f"langgraph=={version}", "psycopg-pool", "pytest-timeout", *needed)
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


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Suite:
    """What both runs have in common."""

    python: Path
    home: Path
    chosen: Sequence[str]
    workers: int

    def run(self, name: str, *, wrap: bool, only: Sequence[str] = ()) -> Outcomes:
        """Run the tests bare or wrapped, telling how far they are, and return how they ended."""
        noted, log, names = (FOLDER / f"{name}{suffix}" for suffix in (".jsonl", ".log", ".only"))
        noted.write_text("", encoding="utf-8")
        names.write_text("\n".join(only), encoding="utf-8")
        chosen = sorted({test.partition("::")[0] for test in only}) or list(self.chosen)
        # A test that hangs ends its process, and the others go on in a new one: hence a process even for few tests.
        spread = ("-n", 1 if only else self.workers, "--dist", "worksteal")
        bounded = ("--timeout", TEST_TIMEOUT_S, "--timeout-method", "thread")
        plugins = ("-p", "orla_suite_plugin", "-p", "no:cacheprovider")
        command = (self.python, "-m", "pytest", "-q", *plugins, *spread, *bounded, *chosen)
        started = time.monotonic()
        with log.open("w", encoding="utf-8") as output:
            running = subprocess.Popen(
                [str(part) for part in command],
                cwd=self.home,
                env=self._environment(noted, wrap, names if only else None),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                _tell(running, name, noted, started)
            finally:
                if running.poll() is None:
                    running.terminate()
                    running.wait()
        with noted.open(encoding="utf-8") as lines:
            outcomes = Outcomes.read(lines)
        # 1: tests failed; more: pytest did. After a crash a plugin may fail at the very end, when all is noted.
        if not outcomes.ended or (running.returncode not in (0, 1) and len(outcomes.ended) < outcomes.collected):
            tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise CannotRun(f"pytest ended with {running.returncode} in the {name} run; see {log}\n{tail}")
        return outcomes

    def _environment(self, noted: Path, wrap: bool, only: Path | None) -> dict[str, str]:
        left_out = ("ORLA_", "OPENAI_", "LANGSMITH_", "LANGCHAIN_", "PYTEST_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
        env |= {"LANGSMITH_TRACING": "false", "NO_DOCKER": "false", "PYTHONPATH": str(HERE)}
        env |= {"ORLA_SUITE_OUTCOMES": str(noted), "ORLA_SUITE_WRAP": "1" if wrap else "0"}
        if only is not None:
            env["ORLA_SUITE_ONLY"] = str(only)
        if server := os.environ.get("ORLA_TEST_POSTGRES_URL"):
            env["ORLA_SUITE_POSTGRES"], _, env["PGDATABASE"] = server.partition("?")[0].rpartition("/")
            env["ORLA_SUITE_POSTGRES"] += "/"
        return env


def _tell(running: subprocess.Popen[bytes], name: str, noted: Path, started: float) -> None:
    """Print how far a run is until it ends: one line that is written over, or on a pipe one line in half a minute."""
    live, last = sys.stdout.isatty(), started
    while True:
        ended = running.poll() is not None
        if ended or live or time.monotonic() - last >= 30:
            last = time.monotonic()
            with noted.open(encoding="utf-8") as lines:
                outcomes = Outcomes.read(lines)
            done, all_of_them = len(outcomes.ended), outcomes.collected
            failed, taken_s = outcomes.count("failed"), last - started
            line = f"{name:<8} {done:,} of {all_of_them:,} tests, {failed:,} failed, {taken_s:.0f} s"
            print(f"\r{line}" if live else line, end="" if live and not ended else "\n", flush=True)
        if ended:
            return
        time.sleep(0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite twice, print what wrapping changed, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="make test-langgraph", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", default=[], help="files or tests, from the folder above tests/")
    parser.add_argument("-k", metavar="EXPRESSION", help="only tests whose names match, as pytest's -k")
    parser.add_argument("--short", action="store_true", help=f"only {', '.join(SHORT)}")
    parser.add_argument("--source", type=Path, help="a checkout of LangGraph instead of its source distribution")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes (default: cores)")
    asked = parser.parse_args(argv)
    source = asked.source or (Path(os.environ["LANGGRAPH_SRC"]) if os.environ.get("LANGGRAPH_SRC") else None)
    chosen = [*(asked.tests or (SHORT if asked.short else ("tests",))), *(("-k", asked.k) if asked.k else ())]
    version = importlib.metadata.version("langgraph")
    try:
        home = tests_of(source.expanduser() if source else None, version)
        suite = Suite(environment_for(home, version), home, chosen, asked.workers)
        postgres = "with" if os.environ.get("ORLA_TEST_POSTGRES_URL") else "without"
        print(f"LangGraph {version}, {postgres} PostgreSQL, {asked.workers} processes; logs in {FOLDER}")
        bare, wrapped = suite.run("bare", wrap=False), suite.run("wrapped", wrap=True)
        again = _again(suite, suspects(bare, wrapped))
    except CannotRun as failed:
        print(f"make test-langgraph: {failed}", file=sys.stderr)
        return 2
    compared = compare(bare, wrapped, again, BY_DESIGN)
    print(f"\n{table(bare, wrapped, compared)}")
    return 1 if compared.differing else 0


def _again(suite: Suite, tests: Sequence[str]) -> list[Outcomes]:
    tests = [test for test in tests if not any(re.search(pattern, test) for pattern in BY_DESIGN)]
    if not 0 < len(tests) <= AGAIN_AT_MOST:
        return []
    return [suite.run(f"again {number}", wrap=True, only=tests) for number in range(1, AGAIN + 1)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that pytest is ended too
    sys.exit(main())
