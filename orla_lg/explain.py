"""``orla-lg explain``: who decided where a call ran, why, what was considered, and what happened; a run drawn."""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orla_lg import config, explain_tools, timeline
from orla_lg.core.boundary.complete import complete
from orla_lg.core.boundary.plain import counted, json_line, shown
from orla_lg.core.engine.backend import Effect
from orla_lg.errors import ConfigError, OrlaError

EXAMPLES = """\
A process writes its records where its configuration says, or Orla(records_file="records.jsonl"):

  records_file = "records.jsonl"       # in orla.toml, beside it

examples:
  orla-lg explain last                       the newest call in the file that the nearest orla.toml names
  orla-lg explain --stage reply              the newest call of a stage
  orla-lg explain 3f2a91b07c-17              one call, by its record's id or the beginning of it
  orla-lg explain last run.jsonl             the newest call in another file; --records run.jsonl says the same
  orla-lg explain last --json | jq .cost_usd
  orla-lg explain --run                      the newest run: its calls as lines of time under one another
  orla-lg explain --run 5c1f run.jsonl       one run, by the beginning of its id, in another file

exit status: 0 found, 1 no such record (or several), 2 no records file
"""

LAST = "last"

AMENDED = ("cache_orders", "cache_borne_out")
"""What a line with ``amends`` says anew of a record."""

CACHE_ACTIONS = {
    "engine": "the engine decides what it keeps",
    "reused": "the call got the slot that its workflow held",
    "claimed": "the call got a free slot",
    "reclaimed": "the call got the slot of an idle workflow",
    "restored": "the call got a slot that was filled with what its workflow had saved",
    "recomputed": "the call got its workflow's slot, but the engine found little of the prompt there",
}
"""What became of the slot's contents, by ``Record.cache_action``."""

EFFECTS: Mapping[str, str] = complete(
    Effect,
    {
        "freed": "the engine freed it",
        "demoted": "others may have its place",
        "pinned": "it stays for a while",
        "saved": "it was saved",
        "restored": "it was restored",
        "warmed": "it was prefilled",
        "deferred": "it is not used again, and goes later",
        "failed": "that failed",
        "unsupported": "the engine cannot",
        "unknown": "it was not answered before the end",
    },
    "EFFECTS in orla_lg.explain",
)
"""What came of an order to an engine's cache."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the top parser."""
    parser = subparsers.add_parser(
        "explain",
        help="say who decided where a call ran, why, and what was considered",
        description="Say of one call which mapper decided, why, which backends it saw with which numbers, and what "
        "then happened: where it ran, how long it waited, what it cost.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "record", nargs="?", metavar="RECORD", help="a record's id, its beginning, or 'last' (default)"
    )
    parser.add_argument("--stage", metavar="NAME", help="the newest call of this stage (its key, or its node's name)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "file", nargs="?", metavar="FILE", help="the records file (default: the one that orla.toml names)"
    )
    where.add_argument("--records", metavar="FILE", help="the records file, as FILE")
    where.add_argument(
        "--config", metavar="FILE", help="the orla.toml that names it (default: ORLA_CONFIG, else the nearest)"
    )
    parser.add_argument(
        "--run", dest="of_run", nargs="?", const=LAST, metavar="RUN",
        help="draw the calls of a run under one another: its id, its beginning, or 'last' (without a value)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the record as JSON; with --run, one a line")
    parser.add_argument(
        "--save-svg", type=Path, metavar="FILE", help="also write the picture, for a page (needs rich)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Explain, and return the exit status."""
    try:
        wanted, file = _asked_for(args)
        found = wanted.among(lines(file)) if isinstance(wanted, Wanted) else wanted.among(file)
        if missed := _missed(wanted, found, file):
            print(f"orla-lg explain: {missed}", file=sys.stderr)
            return 1
        _show(args, wanted, found)
    except FileNotFoundError as error:
        print(
            f"orla-lg explain: there is no file {error.filename}; records are written when calls are made",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # the output's, which is no fault
        raise
    except (OrlaError, OSError) as error:
        print(f"orla-lg explain: {error}", file=sys.stderr)
        return 2
    return 0


def _asked_for(args: argparse.Namespace) -> tuple[Wanted | WantedRun, Path]:
    """Return which record or run is meant, and the file that holds it."""
    named, record, of_run = args.file or args.records, args.record, args.of_run
    if of_run is None:
        if not named and record is not None and Path(record).is_file():  # a file alone: its last
            named, record = record, None
        return Wanted(record or LAST, args.stage), Path(named) if named else _file_of(args.config)
    if args.stage is not None:
        raise ConfigError("--run draws all calls of a run; leave out --stage")
    if not named and record is not None:  # beside a run there is no record to name
        named, record = record, None
    elif not named and Path(of_run).is_file():
        named, of_run = of_run, LAST
    if record is not None:
        raise ConfigError(f"--run draws all calls of a run; leave out the record {record!r}")
    return WantedRun(of_run), Path(named) if named else _file_of(args.config)


def _missed(wanted: Wanted | WantedRun, found: Sequence[Mapping[str, Any]], file: Path) -> str | None:
    if isinstance(wanted, Wanted):
        return None if len(found) == 1 else _not_one(wanted, found, file)
    return None if found else wanted.missed(file)


def _show(args: argparse.Namespace, wanted: Wanted | WantedRun, found: Sequence[dict[str, Any]]) -> None:
    width = timeline.columns()
    if isinstance(wanted, Wanted):
        said, picture, indent = text(found[0]), timeline.call(timeline.Span.of(found[0]), width), 2
    else:
        said, picture, indent = _of_run(found), timeline.chart(_spans(found), width), None
    if args.json:
        print("\n".join(json_line(row, indent=indent) for row in found))
    else:
        print(f"{said}\n\n{timeline.for_stream(picture, sys.stdout)}")
    if args.save_svg is not None:
        _save(args.save_svg, said, picture)


def _save(path: Path, said: str, picture: Sequence[timeline.Line]) -> None:
    if find_spec("rich") is None:
        raise ConfigError("--save-svg draws with rich, which is not installed: pip install 'orla-lg[top]'")
    above: list[timeline.Line] = [((line, ""),) for line in said.splitlines()]
    path.write_text(timeline.svg([*above, (), *picture], "orla-lg explain"), encoding="utf-8")


def _file_of(config_file: str | None) -> Path:
    try:
        settings = config.load(config_file) if config_file else config.find()
    except config.NoConfiguration as error:
        raise ConfigError(
            f"which records? Name the file, as in `orla-lg explain last --records records.jsonl`; {error.why}"
        ) from error
    if settings.records_file is None:
        raise ConfigError(
            f"{settings.source}: no records_file is set, so nothing was written down; add "
            f'records_file = "records.jsonl" and run again, or name a file: orla-lg explain last FILE'
        )
    return settings.records_file


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a records file; the last line may be half written."""
    with file.open(encoding="utf-8", errors="replace") as opened:
        for line in opened:
            try:
                parsed = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(parsed, dict):
                yield parsed


@dataclass
class Wanted:
    """Which record is meant."""

    record: str
    stage: str | None
    scores: dict[str, list[float]] = field(default_factory=dict)
    tools: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By call, what lines say of the tools that its answer called; some stand before its record."""

    def among(self, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the records that are meant, each with its ``scores`` and what became known of its cache later; more
        than one if the id's beginning is not enough."""
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            if "feedback" in row:
                self.scores.setdefault(str(row["feedback"]), []).append(row.get("score", 0.0))
            elif explain_tools.is_of_tool(row):
                self.tools.setdefault(str(row.get("call")), []).append(row)
            elif "amends" in row:
                known = found.get(str(row["amends"]), {})
                known.update((name, row.get(name)) for name in AMENDED if known)
            elif "id" in row and self._meant(row):
                if self.record == LAST:
                    found.clear()
                found[str(row["id"])] = row
        if self.record in found:
            found = {self.record: found[self.record]}
        return [
            {**row, "scores": self.scores.get(name, []), **explain_tools.by_kind(self.tools.get(name, ()))}
            for name, row in found.items()
        ]

    def _meant(self, row: Mapping[str, Any]) -> bool:
        stage = str(row.get("stage") or "")
        if self.stage is not None and self.stage not in (stage, stage.rpartition("|")[2]):
            return False
        return self.record == LAST or str(row["id"]).startswith(self.record)


def _not_one(wanted: Wanted, found: Sequence[Mapping[str, Any]], file: Path) -> str:
    of = f" of stage {wanted.stage!r}" if wanted.stage is not None else ""
    if not found:
        which = "no record" if wanted.record == LAST else f"no record whose id begins with {wanted.record!r}"
        return f"{which}{of} in {file}"
    ids = ", ".join(str(row["id"]) for row in found[:5])
    return f"{len(found)} records{of} begin with {wanted.record!r} in {file}: {ids} …; give more of the id"


@dataclass
class WantedRun:
    """Which run is meant, by the beginning of its id, or the newest."""

    run: str
    several: list[str] = field(default_factory=list)
    """The runs that begin so, where one was meant and there are more."""

    def among(self, file: Path) -> list[dict[str, Any]]:
        """Return the records of the run that is meant; none where there is none, or several begin so."""
        runs = self._meant(lines(file))
        if len(runs) > 1:
            self.several = runs
            return []
        return [row for row in lines(file) if runs and _is_of_run(row) and str(row.get("run")) == runs[0]]

    @staticmethod
    def _runs(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
        return (str(row["run"]) for row in rows if "id" in row and row.get("run"))

    def _meant(self, rows: Iterator[dict[str, Any]]) -> list[str]:
        if self.run == LAST:
            return list(deque(self._runs(rows), maxlen=1))
        begin_so, of_thread = dict[str, None](), dict[str, None]()
        for row in rows:
            for run in self._runs([row]):
                if run.startswith(self.run):
                    begin_so[run] = None
                elif row.get("workflow") == self.run:
                    of_thread = {run: None}  # the newest
        return [self.run] if self.run in begin_so else list(begin_so or of_thread)

    def missed(self, file: Path) -> str:
        """Return why there was not one run."""
        if self.several:
            ids = ", ".join(shown(run, 60) for run in self.several[:5])
            return f"{len(self.several)} runs begin with {self.run!r} in {file}: {ids} …; give more of the id"
        which = (
            "no call of a run"
            if self.run == LAST
            else f"no run whose id begins with {self.run!r}, and none of a workflow of that name,"
        )
        return f"{which} in {file}"


def _is_of_run(row: Mapping[str, Any]) -> bool:
    """Whether a line tells of a run: a call's record, or a tool."""
    return "id" in row or explain_tools.is_of_tool(row)


def _spans(rows: Iterable[Mapping[str, Any]]) -> list[timeline.Span]:
    """Return what is drawn of a run: its calls, and tools that began early."""
    return [
        timeline.tool_span(row) if explain_tools.BEGAN in row else timeline.Span.of(row)
        for row in rows if explain_tools.DID_NOT_BEGIN not in row
    ]  # fmt: skip


def _of_run(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a run in two or three lines: whose it was, its calls in numbers, and the tools that began early."""
    drawn = _spans(rows)
    took_s = max(span.ended_s for span in drawn) - min(span.began_s for span in drawn)
    tools, rows = [row for row in rows if explain_tools.is_of_tool(row)], [row for row in rows if "id" in row]
    spans = [timeline.Span.of(row) for row in rows]
    known = [(span.prompt_tokens, span.cached_tokens) for span in spans]
    prompt, cached = (sum(each[at] or 0 for each in known) for at in (0, 1))
    stages = len({span.stage for span in spans})
    calls = f"{len(rows)} call{'s' * (len(rows) != 1)} of {stages} stage{'s' * (stages != 1)} in {took_s:.2f} s"
    run, workflow = str(rows[0]["run"]), rows[0].get("workflow")
    of = "" if workflow in (None, run) else f" of workflow {shown(workflow, 200)}"
    tenant = f", tenant {shown(rows[0]['tenant'], 200)}" if rows[0].get("tenant") else ""
    early = "".join(f"\n{shown(line)}" for line in explain_tools.of_run(tools))
    return f"run {shown(run, 200)}{of}{tenant}\n{calls}; {prompt} prompt tokens, {cached} of them cached{early}"


def text(row: Mapping[str, Any]) -> str:
    """Return a record as a person reads it."""
    blocks = [
        _head(row),
        _decision(row),
        _table(row.get("considered") or ()),
        _outcome(row),
        _cache(row),
        explain_tools.of_answer(row),
    ]
    return "\n\n".join("\n".join(shown(line) for line in block) for block in blocks if block)


def _head(row: Mapping[str, Any]) -> list[str]:
    step = "" if row.get("step") is None else f", step {row['step']}"
    stage = f"stage {row['stage']!r}" if row.get("stage") else "a call outside any graph"
    of = f"workflow {shown(row.get('workflow'), 200)}" + (f", run {shown(row['run'], 200)}" if row.get("run") else "")
    asked = [f"{name} {shown(row[name], 200)}" for name in ("tenant", "variant", "priority") if row.get(name)]
    return [
        f"record {row['id']}" + (f"  ended {row['at']}" if row.get("at") else ""),
        f"{stage}{step}: {of}" + (f" ({', '.join(asked)})" if asked else ""),
    ]


def _decision(row: Mapping[str, Any]) -> list[str]:
    if row.get("external"):
        why = f" ({row['reason']})" if row.get("reason") else ""
        return [f"orla_lg did not place this call: it went where its code says{why}"]
    if row.get("backend") is None:
        return [f"no backend was chosen for this call: {row.get('error') or 'no mapper answered'}"]
    why = f": {row['reason']}" if row.get("reason") else ""
    return [f"the call ran on {row['backend']!r}, model {row.get('model')!r}", f"decided by {row.get('mapper')}{why}"]


def _table(considered: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was considered, a row for each backend and a column for each number."""
    if not considered:
        return []
    names = list(dict.fromkeys(name for each in considered for name in each.get("numbers") or {}))
    rows = [["considered", *names, ""]]
    for each in considered:
        numbers = each.get("numbers") or {}
        cells = [_number(numbers[name]) if name in numbers else "-" for name in names]
        rows.append([str(each.get("backend")), *cells, str(each.get("verdict") or "")])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) if at in (0, len(row) - 1) else cell.rjust(width)
                  for at, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]  # fmt: skip


def _number(value: Any) -> str:
    if value is None:
        return "∞"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _outcome(row: Mapping[str, Any]) -> list[str]:
    wait, ttft, took = row.get("queue_wait_s"), row.get("ttft_s"), row.get("duration_s")
    first = "" if ttft is None else f", first token {ttft:.3f} s later"
    lines = [f"it waited {wait or 0:.3f} s in the queue{first}, {took or 0:.3f} s in all"]
    if isinstance(odds := row.get("final_odds"), int | float):
        lines.append(f"its turn went by the odds that it was its run's last call: {odds:.0%}")
    if row.get("prompt_tokens") is not None:
        cached = row.get("cached_tokens")
        known = "" if cached is None else f" ({cached} cached)"
        cost = row.get("cost_usd")  # 0 where its backend has no prices
        dollars = f", {cost:.6f} US dollars" if cost else ""
        prompt, answer = (_tokens(row.get(name), kind) for name, kind in _COUNTS.items())
        lines.append(f"{prompt}{known}, {answer}{dollars}")
    tried = f"{counted(row['attempts'], 'attempt')}; " if isinstance(row.get("attempts"), int) else ""
    action = row.get("cache_action")
    lines.append(f"{tried}KV cache: {CACHE_ACTIONS.get(str(action), action)}")
    if row.get("scores"):
        lines.append(f"the answer was scored {', '.join(f'{score:g}' for score in row['scores'])}")
    if row.get("error"):
        lines.append(f"error: {row['error']}")
    return lines


_COUNTS = {"prompt_tokens": "prompt", "completion_tokens": "answered"}


def _tokens(count: Any, kind: str) -> str:
    """Return a count of tokens: ``1 prompt token``, ``2 answered tokens``; one that is no number as it stands."""
    return counted(count, f"{kind} token") if isinstance(count, int) else f"{count} {kind} tokens"


def _cache(row: Mapping[str, Any]) -> list[str]:
    """Return what was believed of the cache, what was asked about it, and whether that was true."""
    lines = []
    believed, found = row.get("expected_cached_tokens"), row.get("cached_tokens")
    if believed is not None and row.get("prompt_tokens") is not None:
        seen = "the engine does not say how many were" if found is None else f"the engine found {found}"
        lines.append(f"orla_lg expected {_tokens(believed, 'cached')} when the call left the queue; {seen}")
    orders = row.get("cache_orders") or ()
    if (hint := row.get("cache_hint")) in ("preserve", "flush"):
        lines.append(f"a hint asked to {hint} its workflow's cache" + ("" if orders else "; no order came of that"))
    for order in orders:
        verb, _, effect = str(order).partition(":")
        lines.append(f"its workflow's cache afterwards: orla_lg ordered {verb}; {EFFECTS.get(effect, effect)}")
    if (borne_out := row.get("cache_borne_out")) is not None:
        said = "bore that out" if borne_out else "did not bear that out"
        lines.append(f"the workflow's next call there {said if orders else _kept(borne_out)}")
    return lines


def _kept(borne_out: bool) -> str:
    return "found it still there" if borne_out else "did not find it there any more"
