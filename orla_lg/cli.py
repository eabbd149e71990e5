"""The command line. Each command's own file registers it here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from orla_lg import __version__, check, explain, plan
from orla_lg.clients import commands as clients
from orla_lg.demo import command as demo
from orla_lg.engines import commands as engine
from orla_lg.errors import OrlaError
from orla_lg.mappers import commands as mapper
from orla_lg.serve import command as serve
from orla_lg.serve import key_commands as keys
from orla_lg.testing import commands as conform
from orla_lg.top import commands as live
from orla_lg_sim import commands as sim

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
  orla-lg sim up       a simulated engine: a GPU's behaviour without one
"""


def parser() -> argparse.ArgumentParser:
    """Return the whole command line's parser."""
    top = argparse.ArgumentParser(
        prog="orla-lg",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"orla-lg {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, check, plan, clients, explain, live, serve, keys, mapper, engine, sim, conform):
        module.register(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of ours are one line on stderr, Ctrl-C is exit status 130."""
    args = parser().parse_args(argv)
    try:
        return int(args.run(args))
    except OrlaError as error:
        print(f"orla-lg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `orla-lg check | head`
        sys.stderr.close()
        return 0
