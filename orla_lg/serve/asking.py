"""What ``orla-lg reload`` asks of a running server."""

from __future__ import annotations

import argparse
from typing import Any

import httpx

from orla_lg import config
from orla_lg.errors import OrlaError
from orla_lg.link.dialing import addresses, are_of
from orla_lg.serve.settings import UNIX, settings

RELOAD_PATIENCE_S = 60.0
WITHHELD = (
    f"; the key in {config.SERVER_KEY} was not sent, since this is neither the server in {config.SERVER} nor one on "
    "this machine: --key gives it"
)


def reload(args: argparse.Namespace) -> int:
    """Have a server load its configuration again, print what changed, and return the exit status."""
    url, transport = _server(args)
    key = args.key or (config.server_key() if _has_our_key(args.server) else None)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(transport=transport, timeout=RELOAD_PATIENCE_S, trust_env=False) as client:
            answer = client.post(f"{url}/v1/orla/reload", json={"dry_run": args.dry_run}, headers=headers)
        said: Any = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OrlaError(f"no server answers at {url} ({error}); --server says where it is") from error
    except ValueError as error:
        raise OrlaError(f"{url} answers {answer.status_code}, and is no server of ours") from error
    if not answer.is_success:
        fault = said.get("error") if isinstance(said, dict) else None
        text = str(fault.get("message") if isinstance(fault, dict) else fault or said)[:20_000]
        raise OrlaError(text + (WITHHELD if answer.status_code == 401 and not key and config.server_key() else ""))
    print("would change:" if args.dry_run else "changed:")
    print(said["changes"])
    return 0


def _has_our_key(url: str | None) -> bool:
    """Whether the key in the environment is for a server: the one named there, or one on this machine."""
    if not url:  # the environment names it, or our own configuration
        return True
    wanted, found = addresses(url), config.server()
    if found is not None and are_of(wanted, found.url):
        return True
    return all(each.is_local for each in wanted)


def _server(args: argparse.Namespace) -> tuple[str, httpx.HTTPTransport | None]:
    """Return where the server is, and how it is reached where that is a Unix socket."""
    url: str | None = args.server
    if not url and (found := config.server()) is not None:
        url = found.url
    if not url:
        chosen = settings(args.config)
        url = chosen.listen.url(tls=chosen.has_tls)
    if url.startswith(UNIX):
        return "http://localhost", httpx.HTTPTransport(uds=url.removeprefix(UNIX))
    return url.rstrip("/"), None
