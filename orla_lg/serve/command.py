"""``orla-lg serve`` and ``orla-lg reload``: their arguments. What they do is imported once they are to do it."""

from __future__ import annotations

import argparse

from orla_lg.serve.settings import DEFAULT_PORT, LOOPBACK, UNIX

SERVE = f"""\
Run one core for many processes: LangGraph applications reach it by Orla.remote(...), everything else by the OpenAI
and Anthropic APIs. What waits is ordered, and what is bounded holds, over all of them.

Without a configuration it starts with no engine behind it, and is healthy at once.

examples:
  orla-lg serve --demo                    with an engine of its own, to see it answer
  orla-lg serve --config orla.toml        your engines
  orla-lg serve --port 9000               on http://{LOOPBACK}:9000 instead of {DEFAULT_PORT}; 0: a free port
  orla-lg serve --listen-address unix:/run/user/1000/orla.sock
  orla-lg serve --on ray                  the core and a standby as actors of a Ray cluster that this command starts
  orla-lg serve --on ray=10.0.0.5:6379    the same on a running cluster; they go on after Ctrl-C, --stop ends them
  orla-lg serve --listen-address 0.0.0.0:8081    for other machines: needs a key (orla-lg keys create), and
                                          [serve] tls_cert and tls_key, or behind_proxy = true
  orla-lg serve --pool fast               the core of one pool of backends; each pool of [pools] has its own
  orla-lg serve --port 8090 --gateway --core http://{LOOPBACK}:{DEFAULT_PORT}
                                          the APIs alone, before that core: as many of these as it takes
  orla-lg serve --port 8082 --standby     the same store and backends: take over when the core there ends or dies

SIGTERM or Ctrl-C: new calls are refused (503), those under way have [serve] drain_s seconds (30), a second one ends
at once. SIGHUP, or `orla-lg reload`: the configuration is loaded again.

Of several on one store one decides. The others answer /readyz and calls with 503, and one of them takes over once the
lease of the first ([serve] core_lease_s) is given back or over. Links follow by themselves.

exit status: 0 drained and ended; 1 something is wrong with its configuration or its port, or it was cut short
"""

RELOAD = """\
Have a running `orla-lg serve` load its configuration again, and print what changed. Calls go on. A file that is
wrong, or asks for what needs a restart, changes nothing.

What changes while it runs: backends added and removed, their max_concurrency, capacity, cost and quality; the
mapping, variants and load_aware; policies; limits.

examples:
  orla-lg reload --dry-run          what would change
  orla-lg reload                    change it
  orla-lg reload --server https://10.0.0.5:8081 --key "$ORLA_SERVER_KEY"

exit status, with --dry-run too: 0 it was loaded, or can be; 1 nothing was changed, or would be: the file is wrong or
asks for what needs a restart, or no server answers
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the top parser."""
    form = argparse.RawDescriptionHelpFormatter
    serve = subparsers.add_parser(
        "serve", help="one core for many processes, with a gateway", description=SERVE, formatter_class=form
    )
    serve.add_argument(
        "--config",
        metavar="FILE",
        help="the configuration (default: ORLA_CONFIG, else the nearest orla.toml, else none)",
    )
    where = serve.add_mutually_exclusive_group()
    where.add_argument(
        "--listen-address", metavar="HOST:PORT", help=f"or {UNIX}PATH (default {LOOPBACK}:{DEFAULT_PORT})"
    )
    where.add_argument("--port", type=_port, metavar="N", help=f"the same as --listen-address {LOOPBACK}:N")
    serve.add_argument(
        "--store",
        metavar="FILE|URL",
        help="where keys, leases and what is spent are kept; all cores and standbys of an application name the same "
        "one: a file, or redis://HOST:PORT/DB with its password in ORLA_STORE_PASSWORD (default: what [serve] store "
        "says, else a file in your state folder)",
    )
    serve.add_argument(
        "--pool", metavar="NAME", help="the pool of [pools] whose core this is (default: what [serve] pool says)"
    )
    serve.add_argument(
        "--standby",
        action="store_true",
        help="wait for the end of the core that has the store's lease, take over, and wait again if replaced",
    )
    serve.add_argument(
        "--advertise",
        metavar="URL",
        action="append",
        help="by which other processes reach this one, where that is not what it listens on; may be given again",
    )
    serve.add_argument(
        "--gateway",
        action="store_true",
        help="no core: only its gateway, before a core elsewhere; any number of them may stand before one",
    )
    serve.add_argument(
        "--core", metavar="URL", help="of a --gateway: where its core is (default: [serve] core, else ORLA_SERVER)"
    )
    serve.add_argument("--demo", action="store_true", help="start a small engine too, and serve that")
    serve.add_argument(
        "--on", type=_cluster, metavar="ray[=HOST:PORT]",
        help="run cores as actors of a Ray cluster: one that is started and ends with this command, or the one at "
        "Ray's own HOST:PORT; needs token authentication, and orla-lg[ray]",
    )  # fmt: skip
    serve.add_argument("--stop", action="store_true", help="with --on ray=HOST:PORT: drain and end what runs there")
    serve.set_defaults(run=run_serve)
    reload = subparsers.add_parser(
        "reload", help="have a running server load its configuration again", description=RELOAD, formatter_class=form
    )
    reload.add_argument("--dry-run", action="store_true", help="only say what would change")
    reload.add_argument(
        "--config", metavar="FILE", help="whose [serve] says where the server listens (default: as for serve)"
    )
    reload.add_argument("--server", metavar="URL", help="the server (default: ORLA_SERVER, else what [serve] says)")
    reload.add_argument(
        "--key",
        help="a key of scope control, where the server has keys (default: ORLA_SERVER_KEY, for the server in "
        "ORLA_SERVER and those on this machine)",
    )
    reload.set_defaults(run=run_reload)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 65_536):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a port: 1 to 65535, or 0 for a free one")
    return int(text)


def _cluster(text: str) -> str:
    """Return the address of a cluster; empty: one is started."""
    kind, equals, address = text.partition("=")
    host, colon, port = address.rpartition(":")
    if kind != "ray" or (equals and not (colon and host and "/" not in host and port.isascii() and port.isdecimal())):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be ray, or ray=HOST:PORT with Ray's own address")
    return address


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal ends it, and return the exit status."""
    from orla_lg.serve.starting import serve

    return serve(args)


def run_reload(args: argparse.Namespace) -> int:
    """Have a server load its configuration again, print what changed, and return the exit status."""
    from orla_lg.serve.asking import reload

    return reload(args)
