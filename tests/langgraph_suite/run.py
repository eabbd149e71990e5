"""LangGraph's own tests, once as they are and once with every graph wrapped: what does wrapping change?

The tests come from the source distribution of the LangGraph that is installed in .venv, so they are of the version
that orla_lg runs on. They run in an environment of their own under build/langgraph-suite, with the versions of .venv
and what the tests need besides; the first run makes it (half a minute), the next ones find it. With --agents they are
LangChain's tests of create_agent and its middleware, with --tool-node those of LangGraph's ToolNode, each with a
folder of its own.

Every compiled graph, every @entrypoint and every Pregel that a test makes is wrapped with an Orla whose one backend
is a stub: the tests' models are fakes, so what is compared is the graph, not the answers. A test that passes bare and
not wrapped runs again on its own, three times; if it passes each time it was unlucky (some of LangGraph's tests race
with time), else it differs. A difference that is meant stands in by_design, with its cause (libraries.py).

With --tools all tools of the wrapped graphs are said to be safe, and next prompts are split: at the end of each
answer of a fake model the plugin lets the graph's watch hear its tool calls, so that the tools start early, truly. A
test that leaves such a tool behind has failed. The run is worth nothing, and fails, where no tool started early.

PostgreSQL: where ORLA_TEST_POSTGRES_URL names a server, the parametrisations on PostgreSQL run too (2,000 tests more,
half an hour). A throwaway server:
    eval "$(.ci/postgres.sh start)"; make test-langgraph; .ci/postgres.sh stop
Redis and LangGraph's development server are left out. "memory_migrate_sends", which LangGraph leaves out without
Docker although it needs no service, runs.

Exit: 0 nothing differs but what is meant; 1 something does; 2 the tests could not be had or run.

Examples:
    make test-langgraph                                      everything: about ten minutes on two cores
    make test-langgraph SUITE=--short                        one file of each kind: under a minute
    make test-langgraph SUITE=--tools                        all tools start early
    make test-langgraph SUITE=tests/test_time_travel.py      chosen files
    make test-langgraph SUITE='-k interrupt'                 chosen tests
    make test-langgraph SUITE='--source ~/src/langgraph'     the tests of a checkout; or set LANGGRAPH_SRC to its path
    make test-agents-suite SUITE='--short --tools'           create_agent's, with tools that start early
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # as a script: its neighbours are named as in the tests
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from tests.langgraph_suite.libraries import (
    AGENTS,
    LANGGRAPH,
    TOOL_NODE,
    CannotRun,
    Library,
    environment_for,
    source_of,
    tests_of,
)
from tests.langgraph_suite.outcomes import AGAIN, Outcomes, cause_of, compare, suspects, table

HERE = Path(__file__).resolve().parent

AGAIN_AT_MOST = 100
"""Where more fail wrapped, it was not bad luck."""

TEST_TIMEOUT_S = 120
"""For one test; the slowest takes some seconds."""


@dataclass(frozen=True)
class Suite:
    """What both runs have in common."""

    library: Library
    python: Path
    home: Path
    chosen: Sequence[str]
    workers: int
    tools: bool = False
    """Whether tools start early in the wrapped run."""

    def run(self, name: str, *, wrap: bool, only: Sequence[str] = ()) -> Outcomes:
        """Run the tests bare or wrapped, telling how far they are, and return how they ended."""
        noted, log, names = (self.library.build / f"{name}{suffix}" for suffix in (".jsonl", ".log", ".only"))
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
        if wrap and self.tools:
            env["ORLA_SUITE_TOOLS"] = "1"
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
    asked = _parser().parse_args(argv)
    library = AGENTS if asked.agents else TOOL_NODE if asked.tool_node else LANGGRAPH
    tests = asked.tests or (library.short if asked.short else library.tests)
    chosen = [*tests, *(("-k", asked.k) if asked.k else ())]
    by_design = {**library.by_design, **(library.by_design_early if asked.tools else {})}
    try:
        home = tests_of(library, source_of(library, asked.source))
        suite = Suite(library, environment_for(library, home), home, chosen, asked.workers, asked.tools)
        postgres = "with" if os.environ.get("ORLA_TEST_POSTGRES_URL") else "without"
        print(f"{library.title} {library.version}, {postgres} PostgreSQL, {asked.workers} processes; ", end="")
        print(f"logs in {library.build}")
        bare, wrapped = suite.run("bare", wrap=False), suite.run("wrapped", wrap=True)
        again = _again(suite, [test for test in suspects(bare, wrapped) if cause_of(test, by_design) is None])
    except CannotRun as failed:
        print(f"make test-langgraph: {failed}", file=sys.stderr)
        return 2
    compared = compare(bare, wrapped, again, by_design)
    print(f"\n{table(bare, wrapped, compared)}")
    if asked.tools and not wrapped.early["taken in their place"]:
        print("\nNo tool that was started early was taken in its place: this shows nothing.")
        return 1
    return 1 if compared.differing else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make test-langgraph", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", default=[], help="files or tests, from the folder above tests/")
    parser.add_argument("-k", metavar="EXPRESSION", help="only tests whose names match, as pytest's -k")
    parser.add_argument("--short", action="store_true", help="only one file of each kind")
    parser.add_argument("--tools", action="store_true", help="all tools start early, and next prompts are split")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--agents", action="store_true", help="LangChain's tests of create_agent instead")
    which.add_argument("--tool-node", action="store_true", help="langgraph-prebuilt's tests of ToolNode instead")
    parser.add_argument("--source", type=Path, help="a checkout of the library instead of its source distribution")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8), help="processes (default: cores)")
    return parser


def _again(suite: Suite, tests: Sequence[str]) -> list[Outcomes]:
    if not 0 < len(tests) <= AGAIN_AT_MOST:
        return []
    return [suite.run(f"again {number}", wrap=True, only=tests) for number in range(1, AGAIN + 1)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that pytest is ended too
    sys.exit(main())
