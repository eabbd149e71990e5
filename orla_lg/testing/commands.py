"""``orla-lg conform``: run the conformance suite on an adapter and an engine that runs."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence

from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.engine.registry import adapter_of
from orla_lg.errors import ConfigError, OrlaError, did_you_mean
from orla_lg.testing.conformance import CHECKS, Report, Result, Status, conform

EXAMPLES = """\
examples:
  orla-lg conform --url http://127.0.0.1:8001/v1                  a server that speaks OpenAI's API
  orla-lg conform --url http://127.0.0.1:8001/v1 --engine vllm    with the adapter made for it
  orla-lg conform --list                                          what is checked
  orla-lg conform --url ... --only cached_tokens_are_real         one check; repeat --only for more
  orla-lg conform --url ... --json > report.json                  for machines; progress goes to stderr

The engine should have nothing else to do: checks fill and flush its cache, and look at its load.
A check that does not apply, to this engine or as it was started, is skipped, and says why.

exit status: 0 it conforms, 1 a check failed, 2 the command is wrong
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the top parser."""
    parser = subparsers.add_parser(
        "conform",
        help="check that an adapter and its engine do what they say",
        description="Run the conformance suite: does the engine do what its adapter says that it can?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--url", help="the engine's OpenAI-style URL, usually ending in /v1")
    parser.add_argument("--engine", default="openai", help="the adapter, by its registered name (default openai)")
    parser.add_argument("--model", help="the model to ask for (default: the first that is served)")
    parser.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the API key")
    parser.add_argument("--admin-key-env", metavar="NAME", help="the same for an administrators' key (SGLang)")
    parser.add_argument("--only", action="append", metavar="CHECK", help="run this check; may be repeated")
    parser.add_argument("--disruptive", action="store_true", help="also what interrupts others: sleep, flushing all")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for one check (default 60)")
    parser.add_argument("--list", action="store_true", help="print what is checked and end")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the suite, print, and return the exit status."""
    if args.list:
        print("\n".join(f"{check.name}\n    {check.asserts}" for check in CHECKS))
        return 0
    try:
        only = _known(args.only)
        adapter = adapter_of(_backend(args))
    except OrlaError as error:
        print(f"orla-lg conform: {error}", file=sys.stderr)
        return 2
    report = asyncio.run(_conform(adapter, args, only))
    print(json.dumps(report.asdict(), indent=2) if args.json else _summary(report))
    return 0 if report.ok else 1


def _known(only: Sequence[str] | None) -> Sequence[str] | None:
    names = [check.name for check in CHECKS]
    for name in only or ():
        if name not in names:
            raise ConfigError(f"no check is called {name!r}{did_you_mean(name, names)}")
    return only


def _backend(args: argparse.Namespace) -> Backend:
    if not args.url:
        raise ConfigError("where is the engine? Give --url http://host:port/v1")
    key, admin_key = _key(args.api_key_env), _key(args.admin_key_env)
    return Backend("engine", args.url, model=args.model, engine=args.engine, api_key=key, admin_key=admin_key)


def _key(variable: str | None) -> str | None:
    if variable and variable not in os.environ:
        raise ConfigError(f"the environment variable {variable} is not set")
    return os.environ[variable] if variable else None


async def _conform(adapter: BackendAdapter, args: argparse.Namespace, only: Sequence[str] | None) -> Report:
    def progress(result: Result) -> None:
        print(result, file=sys.stderr if args.json else sys.stdout, flush=True)

    try:
        return await conform(adapter, only=only, disruptive=args.disruptive, limit_s=args.timeout, progress=progress)
    finally:
        await adapter.aclose()


def _summary(report: Report) -> str:
    *_, counts = str(report).splitlines()
    lines = ["", f"{report.adapter} on {report.engine}: {counts}"]
    if not any(result.status is Status.PASSED for result in report.results):
        lines.append("nothing passed: does the engine answer?")
    return "\n".join(lines)
