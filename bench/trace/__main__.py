"""Draws docs/trace.svg: the trace of examples/langsmith_tracing.py on an engine embedded in Python.

``make picture-trace`` writes the picture. The example runs as it is, in a process of its own; what it sends to
LangSmith is taken in by a collector here and drawn as a tree, each run with its bar of time and what orla_lg wrote.
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.lib.command import DOCS, ROOT, parser
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from tests.langsmith_collector import Collector

EXAMPLE = ROOT / "examples" / "langsmith_tracing.py"
BAR, WIDTH = 30, 136
SHOWN = {
    "orla_backend": "on {}", "orla_queue_wait_s": "queue {:.2f} s", "orla_ttft_s": "first token {:.2f} s",
    "orla_cached_tokens": "cached {}", "orla_prompt_tokens": "of {} tokens",
}  # fmt: skip
"""What is drawn of the metadata that orla_lg writes, and how."""

Run = Mapping[str, Any]


def record(url: str) -> list[Run]:
    """Run the example against an engine, and return the runs that it traced."""
    with Collector() as collector:
        environment = {
            **os.environ, "LANGSMITH_TRACING": "true", "LANGSMITH_ENDPOINT": collector.url,
            "LANGSMITH_API_KEY": "any", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }  # fmt: skip
        subprocess.run([sys.executable, str(EXAMPLE), "--url", url], env=environment, check=True, timeout=300)
        return list(collector.runs.values())


def seconds(written: str) -> float:
    """Return a time of the protocol as seconds; they are UTC, with or without saying so."""
    when = datetime.fromisoformat(written)
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


def tree(runs: Iterable[Run]) -> Iterator[tuple[str, Run]]:
    """Yield runs as a tree has them, each with the lines that lead to it; steps that only route are left out."""
    shown = [run for run in runs if not str(run["name"]).startswith(("ChannelWrite", "_", "Branch"))]

    def below(parent: str | None, lead: str) -> Iterator[tuple[str, Run]]:
        children = sorted((each for each in shown if each.get("parent_run_id") == parent), key=_began)
        for each in children:
            last = each is children[-1]
            branch = "" if parent is None else "└─ " if last else "├─ "
            yield lead + branch, each
            yield from below(each["id"], lead + ("" if parent is None else "   " if last else "│  "))

    yield from below(None, "")


def _began(run: Run) -> float:
    return seconds(run["start_time"])


def said(run: Run) -> str:
    """Return what orla_lg wrote on a run, in words."""
    metadata = (run.get("extra") or {}).get("metadata") or {}
    found = [form.format(metadata[name]) for name, form in SHOWN.items() if name in metadata]
    return ", ".join(found).replace(", of ", " of ")


def picture(runs: Iterable[Run]) -> Table:
    """Return the trace as a table: names as a tree, a bar of time, and what orla_lg wrote."""
    rows = list(tree(runs))
    begin, end = min(_began(run) for _, run in rows), max(seconds(run["end_time"]) for _, run in rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bright_black")
    for heading in ("run", "", "seconds", "metadata that orla_lg adds"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "seconds" else "left")
    for lead, run in rows:
        start, stop = ((seconds(run[key]) - begin) / (end - begin) * BAR for key in ("start_time", "end_time"))
        is_model = run["run_type"] == "llm"
        bar = Text(" " * int(start) + "█" * max(1, round(stop) - int(start)), style="green" if is_model else "blue")
        name = Text(lead, style="bright_black").append(str(run["name"]), "bold" if is_model else "default")
        took = seconds(run["end_time"]) - _began(run)
        table.add_row(name, bar, f"{took:.2f}", said(run))
    return table


def main() -> None:
    """Record and draw."""
    options = parser("trace", __doc__)
    options.add_argument("--out", type=Path, default=DOCS / "trace.svg")
    out = options.parse_args().out
    with EmbeddedEngine(EngineSettings(slots=1, context_tokens=1024, threads=1)) as engine:
        runs = record(engine.url)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(picture(runs), markup=False)
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="a traced run"), flags=re.DOTALL)
    out.write_text(drawn, encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
