"""The command line. Each command's own file registers it, and is imported when it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Sequence
from importlib import import_module
from typing import NoReturn

from orla_lg import __version__
from orla_lg.errors import OrlaError, did_you_mean

DESCRIPTION = """\
Serving middleware for LangGraph: every node's model call on the right backend, in the right order, with its
KV cache kept.
"""

EPILOG = """\
start here:
  orla-lg demo         a support desk's graph on an engine embedded in Python; no key, no GPU
  orla-lg engine up    that engine alone, to try your own graph against
  orla-lg check        what the backends in your orla.toml can do, and what would let them do more
  orla-lg plan M:GRAPH the stages of your graph, where each runs, and what decides that
  orla-lg clients      the packages whose model calls are served here: of OpenAI, Anthropic, Ollama and others
  orla-lg explain last who decided where the newest call ran, and why
  orla-lg top          a running process: what each call waits for, where each cache lies; pause, drain, resume
  orla-lg mapper fit   learn from labelled prompts which of them a light model answers as well
  orla-lg serve        one core for many processes, and a gateway for what is not LangGraph; --demo shows it
  orla-lg keys         the keys of such a server: make, list, show, revoke
  orla-lg conform      whether an engine's adapter does what it promises
  orla-lg replay FILE  recorded traffic in virtual time: what another policy, cap or engine would have done
  orla-lg sim up       a simulated engine: a GPU's behaviour without one
"""


COMMANDS = {
    "orla_lg.demo.command": {
        "demo": "answer support tickets with a LangGraph graph, bare and wrapped: what does orla_lg change?"
    },
    "orla_lg.check": {"check": "validate the configuration, probe the backends, say what each can do"},
    "orla_lg.plan": {"plan": "show a graph's stages as a tree, and what decides where each runs"},
    "orla_lg.clients.commands": {"clients": "list the packages whose model calls are served in this environment"},
    "orla_lg.explain": {"explain": "say who decided where a call ran, why, and what was considered"},
    "orla_lg.top.commands": {
        "top": "watch a running process: its queues, what each call waits for, where each workflow's cache is",
        "pause": "let no more calls go to a backend of a running process",
        "drain": "pause a backend, and wait until nothing is in flight there",
        "resume": "let calls go to a backend again",
        "move": "have a workflow's next calls go to another backend of its model, and its cache with them",
        "set": "change a policy or a limit of a running process",
    },
    "orla_lg.serve.command": {
        "serve": "one core for many processes, with a gateway",
        "reload": "have a running server load its configuration again",
    },
    "orla_lg.serve.access.commands": {"keys": "make, list, show and revoke the keys of `orla-lg serve`"},
    "orla_lg.mappers.commands": {"mapper": "a stage mapper learned from your own labelled prompts"},
    "orla_lg.engines.commands": {"engine": "real engines on this machine, to try orla_lg with"},
    "orla_lg_sim.commands": {"sim": "a simulated engine, to test and to study with"},
    "orla_lg.replay.command": {"replay": "recorded traffic in virtual time, as it was and under other settings"},
    "orla_lg.testing.commands": {"conform": "check that an adapter and its engine do what they say"},
}
"""By module, the commands that it registers, and what each does. Only the module that is asked for is imported."""


def parser() -> argparse.ArgumentParser:
    """Return the whole command line's parser."""
    return _with(COMMANDS)


def parser_for(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of one command line: the command's own, or, where it names none, that of all by name."""
    command = next((word for word in argv if not word.startswith("-")), None)
    module = next((module for module, commands in COMMANDS.items() if command in commands), None)
    return _with(() if module is None else (module,))


def _with(modules: Collection[str]) -> argparse.ArgumentParser:
    """Return a parser of the commands of some modules; of none, one that knows all commands by name alone."""
    top = argparse.ArgumentParser(
        prog="orla-lg",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"orla-lg {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in modules:
        import_module(module).register(commands)
    if not modules:
        for named in COMMANDS.values():
            for name, summary in named.items():
                commands.add_parser(name, help=summary)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of ours are one line on stderr, Ctrl-C is exit status 130, a pipe without a reader 0."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            print(end="", flush=True)  # here, and not at the interpreter's end, where nothing catches it
    except BrokenPipeError:  # `orla-lg check | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write is written there
        return 0


def _run(argv: Sequence[str]) -> int:
    top = parser_for(argv)
    args, unknown = top.parse_known_args(argv)
    if unknown:
        _refuse(top, argv, unknown)
    try:
        return int(args.run(args))
    except OrlaError as error:
        print(f"orla-lg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _refuse(parser: argparse.ArgumentParser, argv: Sequence[str], unknown: Sequence[str]) -> NoReturn:
    """Say what a command does not take, with its own usage, and what was probably meant; ends with status 2."""
    for word in argv:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction) and word in action._name_parser_map:
                parser = action._name_parser_map[word]
                break
    option = next((word.partition("=")[0] for word in unknown if word.startswith("--")), None)
    options = [each for action in parser._actions for each in action.option_strings if each.startswith("--")]
    parser.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(option, options) if option else ''}")
