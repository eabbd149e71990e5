"""What ``orla-lg reload`` asks of a running server."""

from __future__ import annotations

import argparse
import json

from orla_lg import config
from orla_lg.serve.settings import UNIX, settings
from orla_lg.top.asking import ServerClient, ServerKey

RELOAD = "/v1/orla/reload"
RELOAD_PATIENCE_S = 60.0


def reload(args: argparse.Namespace) -> int:
    """Have a server load its configuration again, print what changed, and return the exit status."""
    key = ServerKey.of(args.server, args.key)
    with ServerClient(_server(args), key, patience_s=RELOAD_PATIENCE_S) as server:
        said = server.send("POST", RELOAD, json.dumps({"dry_run": args.dry_run}).encode())
    print("would change:" if args.dry_run else "changed:")
    print(said["changes"])
    return 0


def _server(args: argparse.Namespace) -> str:
    """Return where the server is."""
    if args.server:
        return str(args.server)
    if (found := config.server()) is not None:
        return found.url
    chosen = settings(args.config)
    if chosen.listen.path is not None:
        return f"{UNIX}{chosen.listen.path.absolute()}"
    return chosen.listen.url(tls=chosen.has_tls)
