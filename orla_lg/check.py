"""``orla-lg check``: is the configuration right, do the backends answer, and what can each of them do."""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from orla_lg import config
from orla_lg.config import ENVIRONMENT
from orla_lg.config_faults import listed, one_server_twice
from orla_lg.config_pools import free_choices
from orla_lg.core.boundary.plain import counted
from orla_lg.core.cache.isolation import can_isolate
from orla_lg.core.engine.backend import Backend, Capability, Probe, model_asked
from orla_lg.core.guard.globs import read_glob
from orla_lg.core.guard.guard import EXTERNAL
from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.policies import DEFAULT_STAGE
from orla_lg.errors import BackendUnavailable, ConfigError, OrlaError
from orla_lg.graph.named import graph_named, misspelt
from orla_lg.graph.stage_names import named_by
from orla_lg.link.adapter import LinkedAdapter
from orla_lg.link.serving import LinkedServing
from orla_lg.openai_api import pair_check
from orla_lg.openai_api.adapter import PLAIN_WIRES
from orla_lg.openai_api.agreement import Agreement
from orla_lg.openai_api.recognition import TITLES, engine_at
from orla_lg.orla import Orla

EXAMPLES = """\
examples:
  orla-lg check                      the nearest orla.toml, ORLA_CONFIG or ORLA_URL; or ORLA_SERVER, which goes first
  orla-lg check --config prod.toml   another file
  orla-lg check --graph app:graph    are the stages that it names those of the graph? app.py is imported, no node runs
  orla-lg check --early-tools        are an engine's answers the same when they are streamed? asks each for two
  orla-lg check --json | jq .        for machines

exit status: 0 all is well; 1 a backend does not answer, is another engine, misses its model, or cannot isolate
tenants though it is to; 2 the configuration is wrong
"""

NOT_APART = {
    "vllm": "this vLLM finds prompts under another cache_salt too, or refuses it; versions from 0.9 on heed it",
    "sglang": "this SGLang finds prompts under another cache_salt too; 0.5.23 heeds it",
    "": "this engine cannot divide its cache; vllm, sglang and llamacpp can, as would an engine for each tenant",
}
"""By engine, why tenants are not isolated there."""

READING = ("priority", "edf")
"""Policies that read a hint about order."""

_OF_BACKENDS = "backend:"

POLL_S = 0.02

PLAIN = "openai"
"""The adapter of any engine, which uses nothing but the OpenAI API."""

APART = {
    "vllm": "each has its own cache_salt",
    "sglang": "each has its own cache_salt",
    "llamacpp": "a slot's tokens are used for their own tenant; without `--cache-ram 0` none are used again at all",
}

GAIN = "to gain more"

LEGEND = f"""\
native, emulated   the capability works now
flag, plugin       it works once the engine is started as the lines under "{GAIN}" say
unsupported        this engine does not have it
?                  the engine does not answer"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the top parser."""
    parser = subparsers.add_parser(
        "check",
        help="validate the configuration, probe the backends, say what each can do",
        description="Validate orla.toml, probe every backend, and print what each can do.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="the configuration file (default: ORLA_CONFIG, else the nearest orla.toml)"
    )
    parser.add_argument(
        "--graph", metavar="MODULE:NAME", action="append", default=[],
        help="hold the stages that the configuration names against this graph's; may be given for several graphs",
    )  # fmt: skip
    parser.add_argument(
        "--early-tools", action="store_true",
        help="ask each backend for a short answer in one piece and as a stream: where both are equal, tools start "
        "early beneath a plain invoke too",
    )  # fmt: skip
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="seconds to wait (default 5)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, print, and return the exit status."""
    if not args.config and (server := config.server()) is not None:
        return _run_linked(args, server)
    try:
        settings = config.load(args.config) if args.config else config.find()
        # Without the control socket, which is for the process that serves.
        with Orla.from_settings(replace(settings, control=False)) as orla:
            graphs = {named: graph_named(named) for named in args.graph}
            if wrong := misspelt(orla.core.serving, graphs) if graphs else []:
                raise ConfigError(listed(orla.source, wrong))
            reports = _reports(orla, args.timeout)
            if args.early_tools:
                _compare(orla, reports)
            twice = one_server_twice([report.backend for report in reports])
            notes = [*twice, *_of_policies(settings), *_of_access(settings), *_of_stages(orla, graphs)]
            notes += _of_pools(orla, settings)
    except OrlaError as error:
        print(f"orla-lg check: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps([report.as_dict() for report in reports], indent=2))
    else:
        print("\n".join([_source(orla.source), *_text(reports), *notes]))
    return 0 if all(report.well for report in reports) else 1


def _run_linked(args: argparse.Namespace, server: config.Server) -> int:
    """Check the link to a server and what it serves, from here: print, and return the exit status."""
    try:
        with Orla.remote(control=False) as orla:
            reports, serving = _linked_reports(orla, args.timeout), orla.core.serving
            if args.early_tools:
                _compare(orla, reports)
            graphs = {named: graph_named(named) for named in args.graph}
            if wrong := misspelt(serving, graphs) if graphs else []:
                raise ConfigError(listed(orla.source, wrong))
            notes = _of_stages(orla, graphs)
            assert isinstance(serving, LinkedServing)
            known, others = serving.known, _other_pools(serving, args.timeout)
    except OrlaError as error:
        print(f"orla-lg check: {error}", file=sys.stderr)
        return 2
    about: dict[str, object] = {"url": server.url, "version": known.version, "epoch": known.epoch}
    about["replicas"] = known.replicas
    if others:
        about["pools"] = {each.pool: each.is_met for each in others}
    if args.json:
        print(json.dumps({"server": about, "backends": [report.as_dict() for report in reports]}, indent=2))
    else:
        version = f" {known.version}" if known.version else ""
        link = (
            f"ok    the link to {server.url}: orla_lg{version}, epoch {known.epoch}, "
            f"{counted(known.replicas, 'replica')} with this one"
        )
        print("\n".join([_source_of_server(), link, *map(str, others), *_text(reports), *notes]))
    return 0 if all(report.well for report in reports) and all(pool.is_met for pool in others) else 1


class _OtherPool(NamedTuple):
    """A pool beside the one whose core the server is, and whether its core is met from here."""

    pool: str
    is_met: bool
    said: str

    def __str__(self) -> str:
        return f"{'ok   ' if self.is_met else 'FAULT'} pool {self.pool!r}: {self.said}"


def _other_pools(serving: LinkedServing, timeout_s: float) -> list[_OtherPool]:
    """Return the other pools, after their cores had time to be met."""
    others, until_s = (
        [core for core in serving.cores.all() if core is not serving.cores.home],
        time.monotonic() + timeout_s,
    )
    while not all(core.link.up for core in others) and time.monotonic() < until_s:
        time.sleep(POLL_S)
    return [
        _OtherPool(
            core.pool, core.link.up, f"epoch {core.known.epoch}" if core.link.up else f"no core: {core.link.fault}"
        )
        for core in others
    ]


def _linked_reports(orla: Orla, timeout_s: float) -> list[_Report]:
    """Return what is to be said of each backend: as the core sees it, and whether it is reached from here."""
    serving = orla.core.serving
    adapters = [scheduler.adapter for scheduler in serving.schedulers.values()]
    inner = [adapter.inner for adapter in adapters if isinstance(adapter, LinkedAdapter)]
    probing = [serving.background.submit(adapter.probe()) for adapter in inner]
    asked = [serving.background.submit(engine_at(adapter)) for adapter in inner]
    concurrent.futures.wait(probing, timeout=timeout_s)
    concurrent.futures.wait(asked, timeout=timeout_s)
    reports = []
    for scheduler, probed, found in zip(serving.schedulers.values(), probing, asked, strict=True):
        health = scheduler.health
        report = _Report(scheduler.backend, health.probe, health.fault, found.result() if found.done() else None)
        failed = probed.exception() if probed.done() else TimeoutError(f"no answer in {timeout_s} s")
        if failed is not None:
            report.faults.append(f"it is not reached from here, where its calls are sent: {failed}")
        reports.append(report)
    return reports


def _source_of_server() -> str:
    """Return which configuration won, and which others there are."""
    others = [name for name in ("ORLA_CONFIG", "ORLA_URL") if os.environ.get(name)]
    try:
        found = config.find().source
    except OrlaError:  # none, or one that is of no use
        found = ""
    if found and found != ENVIRONMENT and not os.environ.get("ORLA_CONFIG"):
        others.append(found)
    also = f"; {', '.join(others)} {'is' if len(others) == 1 else 'are'} there too, but a server goes first"
    return f"configured by {config.SERVER}{also if others else ''}"


def _reports(orla: Orla, timeout_s: float) -> list[_Report]:
    """Return what is to be said of each backend, after asking all of them at once."""
    silent, serving = orla.connect(timeout_s), orla.core.serving
    asked = [serving.background.submit(engine_at(scheduler.adapter)) for scheduler in serving.schedulers.values()]
    concurrent.futures.wait(asked, timeout=timeout_s)
    return [
        _Report(scheduler.backend, scheduler.health.probe, silent[name], found.result() if found.done() else None)
        for (name, scheduler), found in zip(serving.schedulers.items(), asked, strict=True)
    ]


def _compare(orla: Orla, reports: Sequence[_Report]) -> None:
    """Find out whether each backend that leaves it open answers the same in one piece and as a stream."""
    asked = []
    for report in reports:
        backend, probe = report.backend, report.probe
        model = None if probe is None else model_asked(backend.model, probe, "")
        if model and backend.early_tools and backend.assemble is None:
            clients = orla.core.clients[backend.name]
            asked.append((report, clients, pair_check.begin(orla.core.serving, clients, probe, {"model": model})))
    concurrent.futures.wait([pair for _, _, pair in asked if pair is not None], timeout=pair_check.PAIR_S)
    for report, clients, _ in asked:
        report.agreement = clients.agreement


def _of_policies(settings: config.Settings) -> list[str]:
    """Return what is to be said where a policy that reads hints orders one level of the queues, the other unnamed."""
    levels = {"stage_policy": settings.stage_policy, "request_policy": settings.request_policy}
    named = [(level, each) for level, each in levels.items() if each is not None]
    if settings.policy is not None or len(named) != 1 or named[0][1] not in READING:
        return []
    (level, policy), others = named[0], {"stage_policy": "the calls of one stage", "request_policy": "stages"}
    return [
        "",
        f'policies: {level} = "{policy}" leaves {others[level]} to the default, {DEFAULT_STAGE}, which reads no '
        f'hints; policy = "{policy}" orders both',
    ]


def _of_access(settings: config.Settings) -> list[str]:
    """Return what is to be said of policies that name a backend which is none."""
    names = [EXTERNAL, *(backend.name for backend in settings.backends)]
    found = [
        f"policies: {policy.name!r} says {pattern!r}, which is no backend of this configuration ({', '.join(names)})"
        for policy in settings.policies
        for pattern in (*policy.subjects, *policy.resources)
        if pattern.startswith(_OF_BACKENDS)
        and not any(read_glob(pattern).matches(_OF_BACKENDS + name) for name in names)
    ]
    return ["", *found] if found else []


def _of_pools(orla: Orla, settings: config.Settings) -> list[str]:
    """Return which pools there are, and which mappings choose freely among several of them."""
    if not settings.pools:
        return []
    mappings = orla.core.serving.mappings
    named = {
        "the mapping": mappings.shared,
        **{f"variant {name!r}": each for name, each in mappings.variants.items()},
    }
    listed = "; ".join(f"{pool}: {', '.join(names)}" for pool, names in settings.pools.items())
    return ["", f"pools: {listed}; each has a core of its own", *free_choices(settings.pools, named)]


def _of_stages(orla: Orla, graphs: Mapping[str, object]) -> list[str]:
    """Return what is to be said of the stages that the configuration names."""
    named = dict.fromkeys(name for _, name in named_by(orla.core.serving) if name != ANY_STAGE)
    if not named:
        return []
    if graphs:
        return ["", f"stages: all that are named ({', '.join(named)}) are in {' and '.join(graphs)}"]
    return [
        "",
        f"stages: {', '.join(named)} are named; `orla-lg check --graph MODULE:NAME` says whether a graph has them",
    ]


class _Report:
    def __init__(
        self, backend: Backend, probe: Probe | None, fault: BackendUnavailable | None, found: str | None
    ) -> None:
        self.backend, self.probe, self.found = backend, probe, found
        self.agreement: Agreement | None = None
        """Whether its answers are the same when they are streamed, where that was asked."""
        is_other = found is not None and found != backend.engine
        mistaken = is_other and backend.engine in TITLES
        self.faults = [str(fault)] if fault is not None and not mistaken else []
        if mistaken:
            self.faults.append(
                f'engine = "{backend.engine}", but {TITLES[str(found)]} answers there; engine = "{found}" is right'
            )
        if probe is not None and backend.model and probe.models and backend.model not in probe.models:
            self.faults.append(f"model {backend.model!r} is not served; it serves {', '.join(probe.models)}")
        if probe is not None and backend.isolate_tenants and not can_isolate(probe):
            why = NOT_APART.get(backend.engine, NOT_APART[""])
            self.faults.append(f"isolate_tenants: tenants find each other's prompts in the cache: {why}")

        self.notes = []
        if is_other and backend.engine == PLAIN:
            self.notes.append(
                f'{TITLES[str(found)]} answers there: engine = "{found}" would use what it can beyond the OpenAI API'
            )
        if probe is not None and not backend.model and len(probe.distinct) > 1:
            self.notes.append(
                "names no model and serves several: calls must name one of them, others end with a MappingError"
            )

    @property
    def well(self) -> bool:
        return not self.faults

    @property
    def isolates(self) -> bool:
        """Whether it is to isolate tenants, and does."""
        return self.backend.isolate_tenants and self.probe is not None and can_isolate(self.probe)

    @property
    def early_tools(self) -> str:
        """What is to be said of tools that may start early; empty for nothing."""
        backend = self.backend
        if not backend.early_tools:
            return "no tool starts early"
        if backend.assemble is not None:
            return f"answers in one piece are {'' if backend.assemble else 'not '}streamed for them"
        return "" if self.agreement is None else str(self.agreement)

    def as_dict(self) -> dict[str, object]:
        """Return the report for ``--json``."""
        probe = self.probe or Probe()
        return {
            "backend": self.backend.name,
            "url": self.backend.url,
            "engine": self.backend.engine,
            "engine_found": self.found,
            "ok": self.well,
            "faults": self.faults,
            "notes": self.notes,
            "models": list(probe.models),
            "slots": probe.slots,
            "context_tokens": probe.context_tokens,
            "version": probe.version,
            "wires": sorted(probe.wires),
            "isolates_tenants": self.isolates,
            "early_tools": self.backend.early_tools,
            "assemble": self.backend.assemble,
            "streams_differ": None if self.agreement is None else self.agreement.found,
            "tool_calls_compared": self.agreement is not None and self.agreement.had_calls,
            "capabilities": {str(name): str(support) for name, support in probe.capabilities.items()},
            "advice": {str(name): text for name, text in probe.advice.items()},
        }


def _source(source: str) -> str:
    ignored = source != ENVIRONMENT and "ORLA_URL" in os.environ
    return f"configured by {source}" + ("; ORLA_URL is set too, but a file goes first" if ignored else "")


def _text(reports: Sequence[_Report]) -> list[str]:
    lines = []
    for report in reports:
        lines += _lines(report)
    if any(report.probe is not None for report in reports):
        lines += ["", *_matrix(reports), "", LEGEND]
    return lines


def _lines(report: _Report) -> list[str]:
    backend, probe = report.backend, report.probe
    lines = [f"{'ok   ' if report.well else 'FAULT'} {backend.name}: {backend.engine} at {backend.url}"]
    if probe is not None:
        slots = f", {counted(probe.slots, 'slot')}" if probe.slots else ""
        context = f", {counted(probe.context_tokens, 'token')} of context" if probe.context_tokens else ""
        version = "" if "unknown" in probe.version or not probe.version else f", version {probe.version}"
        lines.append(f"      serves {', '.join(probe.models) or 'models it does not list'}{slots}{context}{version}")
    if probe is not None and probe.wires:
        asked = sorted(probe.wires - PLAIN_WIRES)
        lines.append(f"      speaks {', '.join(['chat', *asked])}; what is asked on another wire is translated")
        if asked and probe.slots:
            lines.append(
                "      it has slots, which chat alone can name: it is asked by chat, whatever else it speaks"
            )
    lines += [f"      {line}" for line in (*report.faults, *report.notes)]
    if report.isolates:
        lines.append(f"      isolates tenants: {APART.get(backend.engine, 'its adapter says so')}")
    if report.early_tools:
        lines.append(f"      early tools: {report.early_tools}")
    if probe is not None and probe.advice:
        lines += [f"      {GAIN}:", *(f"        {advice}" for advice in dict.fromkeys(probe.advice.values()))]
    return lines


def _matrix(reports: Sequence[_Report]) -> list[str]:
    """Return the capabilities as a table, a column for each backend."""
    width = max(len(name) for name in Capability)
    columns = [max(len(report.backend.name), len("unsupported")) for report in reports]
    names = zip(reports, columns, strict=True)
    rows = [" " * width + "".join(f"  {report.backend.name:<{column}}" for report, column in names)]
    for capability in Capability:
        cells = []
        for report, column in zip(reports, columns, strict=True):
            said = report.probe.capabilities if report.probe is not None else {}
            cells.append(f"  {said.get(capability, '?'):<{column}}")
        rows.append(f"{capability:<{width}}" + "".join(cells))
    return [row.rstrip() for row in rows]
