"""The start of ``orla-lg serve``: what its arguments ask for, in this process or on a cluster."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import logging
import os
import sys
from dataclasses import replace

from orla_lg.demo.engine import demo_engine
from orla_lg.errors import ConfigError
from orla_lg.serve.interrupting import ended_in_order
from orla_lg.serve.settings import ServeSettings, settings

EXTRA = (
    "aiohttp", "httptools", "orjson", "prometheus_client", "starlette", "uvicorn",
    *(() if sys.platform == "win32" else ("uvloop",))
)  # fmt: skip
INSTALL = "pip install 'orla-lg[serve]'"


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal ends it, and return the exit status."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"orla-lg serve needs {', '.join(missing)}, which a plain install leaves out: {INSTALL}")
    if args.demo and args.pool:
        raise ConfigError("--demo has one engine, and one core for it; --pool is for a configuration with [pools]")
    if args.demo and args.config:
        raise ConfigError("--demo serves an engine of its own, --config those of a file; give one of them")
    if args.demo and args.standby:
        raise ConfigError("--demo has no store that another process shares, so it is no --standby of one")
    if args.gateway and (args.demo or args.standby or args.store):
        raise ConfigError("--gateway holds no state and takes no lease: --demo, --standby and --store are a core's")
    if args.core and not args.gateway:
        raise ConfigError("--core says where a gateway's core is; give --gateway too")
    if args.on is not None:
        from orla_lg.serve.ray.command import serve_on_ray

        return serve_on_ray(args)
    if args.stop:
        raise ConfigError(
            "--stop ends what runs on Ray: --on ray=HOST:PORT --stop; a server of its own ends by Ctrl-C"
        )
    chosen = settings(
        args.config,
        args.listen_address,
        args.port,
        args.store,
        args.pool,
        standby=args.standby,
        advertise=args.advertise or (),
        reads_file=not args.demo,
    )
    with contextlib.ExitStack() as ending:
        ending.enter_context(ended_in_order())
        if args.gateway:
            from orla_lg.serve.stateless.starting import serve_gateway

            return serve_gateway(chosen, args.core, ending)
        if args.demo:
            chosen = replace(chosen, core=ending.enter_context(demo_engine()))
        status = _serve(chosen, ending, is_demo=args.demo)
    return _again(status)


def _again(status: int) -> int:
    """Begin again as a standby where that is meant, in the same process and with nothing of what was in it."""
    from orla_lg.serve.ending import EXIT_REPLACED

    if status == EXIT_REPLACED and sys.platform != "win32":
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return status


def _serve(chosen: ServeSettings, ending: contextlib.ExitStack, *, is_demo: bool) -> int:
    # What the extra brings is imported here: the command line starts without it.
    from orla_lg.serve.announcement import announcement
    from orla_lg.serve.parts import open_parts
    from orla_lg.serve.running import LOG_FORMAT
    from orla_lg.serve.server import run

    parts = open_parts(chosen, ending, in_memory=is_demo)
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)

    def started(url: str) -> None:
        print("\n".join(announcement(chosen, parts, url, is_demo=is_demo)), flush=True)

    gc.collect()
    gc.freeze()  # what the imports made stays: the collector need not look through it at every few hundred calls
    return run(chosen, parts.orla, parts.store, parts.opened, started)
