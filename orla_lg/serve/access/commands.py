"""``orla-lg keys``: make, list, show and revoke the keys of ``orla-lg serve``."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from orla_lg.config_file import find_file
from orla_lg.core.boundary import checked
from orla_lg.core.boundary.complete import complete
from orla_lg.core.boundary.plain import shown as printable
from orla_lg.core.limits.limits import FIGURES, Limit
from orla_lg.errors import ConfigError, shown
from orla_lg.link.redis_keys import is_shared
from orla_lg.serve.access.keys import ANY, AccessKey, KeyScope, create, forget, named, revoke, stored
from orla_lg.serve.store.named import store_at
from orla_lg.serve.store.sqlite import default_file

DESCRIPTION = """\
Keys of `orla-lg serve`. As long as there is none, a server on 127.0.0.1 is open to this machine. Once one exists,
everything but the health routes needs one; a running server obeys within a second.
"""

EXAMPLES = """\
examples:
  orla-lg keys create laptop                         may call models, and nothing else
  orla-lg keys create ci --tenant acme --limit "5 usd per 30d" --limit "60 calls per 1m" --expires 90d
  orla-lg keys create app --scope link --tenant '*'  for Orla.remote(...), in an application of yours
  orla-lg keys create ops --scope control            for orla-lg reload
  export ORLA_SERVER_KEY=$(orla-lg keys create app --scope link)
  orla-lg keys list
  orla-lg keys revoke ci

A client sends its key as `Authorization: Bearer KEY`, as `x-api-key: KEY`, or as the password in its URL;
Orla.remote takes it as key=KEY, or from ORLA_SERVER_KEY.

scopes: use      calls of models, by any API that the server speaks
        link     links of wrapped graphs (Orla.remote): trusted applications of yours
        gateway  links of gateways (orla-lg serve --gateway), in the names of all keys
        view     what shows all tenants: the live page, the server's state
        control  what changes the server: orla-lg reload; over a link pause, drain, policies and limits

exit status: 0; 1 where something is wrong, which is then said
"""

LIMIT_HELP = (
    "what its calls may use together: NUMBER calls, tokens, usd or seconds (of engines' work), and in which time; "
    'may be given several times: "60 calls per 1m", "2M tokens per 1d", "5 usd"'
)

_WORDS: Mapping[str, tuple[str, ...]] = complete(
    FIGURES,
    {"calls": ("call",), "tokens": ("token",), "cost_usd": ("usd", "$"), "wall_s": ("second",)},
    "_WORDS in orla_lg.serve.access.commands",
)
"""How the command line names each figure."""
_UNITS = {word: figure for figure, words in _WORDS.items() for word in words}
_TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}
_FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])")
_LIMIT = re.compile(
    r"\s*(?P<number>\d[\d_]*(?:\.\d+)?)(?P<factor>k|m)?\s*"
    rf"(?P<unit>{'|'.join(map(re.escape, _UNITS))})s?"
    r"(?:\s*(?:per|/)\s*(?P<time>\S.*?))?\s*",
    re.IGNORECASE,
)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the top parser."""
    parser = subparsers.add_parser(
        "keys",
        help="make, list, show and revoke the keys of `orla-lg serve`",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _create_parser(commands)
    for name, text, run in (
        ("list", "list the keys, and what each may do", run_list),
        ("show", "show all of a key but the key itself", run_show),
        ("revoke", "have keys let nothing in any more", run_revoke),
    ):
        each = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name != "list":
            each.add_argument(
                "key", nargs="+" if name == "revoke" else None, metavar="KEY", help="its id or its name"
            )
        if name == "revoke":
            each.add_argument(
                "--delete", action="store_true",
                help="remove its record too; without any record a server on 127.0.0.1 is open again",
            )  # fmt: skip
        _common(each, run)


def _create_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "create",
        help="make a key, and print it this once",
        description="Make a key. It is printed on stdout this once, and stored nowhere; all else goes to stderr.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="for people: whose it is, or what for")
    many: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument(
        "--scope", choices=[scope.value for scope in KeyScope], metavar="SCOPE", **many,
        help="what it is for: use, link, view or control; default use",
    )  # fmt: skip
    parser.add_argument(
        "--tenant", metavar="TENANT", **many,
        help="whose calls it makes; '*': any that a call names; without it: no tenant's",
    )  # fmt: skip
    parser.add_argument("--tag", metavar="NAME=VALUE", **many, help="on each of its calls")
    parser.add_argument("--backend", metavar="PATTERN", **many, help="where its calls may go; without it: anywhere")
    parser.add_argument("--stage", metavar="PATTERN", **many, help="which its calls may be of; without it: any")
    parser.add_argument("--limit", metavar="LIMIT", **many, help=LIMIT_HELP)
    parser.add_argument("--concurrency", type=int, metavar="N", help="how many of its calls may be in the server")
    parser.add_argument(
        "--expires", metavar="TIME", help="in which time (90d, 12h), or on which day (2027-01-31, UTC)"
    )
    _common(parser, run_create)


def _common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--store", metavar="FILE", help="the server's store, a file or a URL; default: that of "
                        "[serve] store, or ~/.local/state/orla-lg/serve.db")  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="orla.toml, for its [serve] store; default: the nearest")
    parser.set_defaults(run=run)


# The commands


def run_create(args: argparse.Namespace) -> int:
    """Make a key, and print it."""
    now_s = time.time()
    given: dict[str, Any] = {
        "name": args.name,
        "scopes": tuple(dict.fromkeys(args.scope)) or (KeyScope.USE,),
        "tenants": None if ANY in args.tenant else tuple(dict.fromkeys(args.tenant)),
        "tags": dict(map(_tag, args.tag)),
        "backends": tuple(args.backend) or None,
        "stages": tuple(args.stage) or None,
        "limits": tuple(map(limit_of, args.limit)),
        "concurrency": args.concurrency,
        "created_s": now_s,
        "expires_s": None if args.expires is None else _expires(args.expires, now_s),
    }
    AccessKey("checked", sha256="first", **given)  # before a file is made
    with _store(args) as store:
        is_first = not stored(store)
        made, secret = create(store, lambda key_id, sha256: AccessKey(key_id, sha256=sha256, **given))
        where = store.place
    if args.json:
        print(json.dumps({"key": secret, **_dates(made)}, indent=2))
        return 0
    print(secret, flush=True)
    said = [f"key {printable(made.name)!r}, id {made.id}, in {where}: it is shown this once"]
    if is_first:
        said.append("the first key: from now on everything but the health routes needs one")
    print("\n".join(said), file=sys.stderr)
    return 0


def run_list(args: argparse.Namespace) -> int:
    """Print the keys."""
    with _store(args, reads=True) as store:
        keys = [] if store is None else stored(store)
    if args.json:
        print(json.dumps([_dates(key) for key in keys], indent=2))
    elif not keys:
        print("no keys; a server on 127.0.0.1 is open to this machine: `orla-lg keys create NAME` makes one")
    else:
        print("\n".join(_table([HEADS, *map(_cells, keys)])))
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print one key."""
    from orla_lg.serve.access.budgets import spent_of  # brings the core; the other commands need a store alone

    with _store(args) as store:
        key = named(store, args.key)
        spent = spent_of(store, key, time.time())
    found = _dates(key)
    for limit, used in zip(found["limits"], spent, strict=True):
        limit["spent"] = used
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    found["limits"] = [
        f"{_said(limit)} ({_spent_said(limit, used)})" for limit, used in zip(key.limits, spent, strict=True)
    ]
    found["scopes"] = list(key.scopes)
    found["tenants"] = [ANY] if key.tenants is None else list(key.tenants)
    found["tags"] = [f"{tag}={value}" for tag, value in key.tags.items()]
    found["backends"], found["stages"] = (list(each or (ANY,)) for each in (key.backends, key.stages))
    for name, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{name:<12} {'-' if text in (None, '') else printable(text)}")
    return 0


def run_revoke(args: argparse.Namespace) -> int:
    """Revoke keys."""
    with _store(args) as store:
        keys = [named(store, name) for name in args.key]  # all of them, or none
        done = []
        for key in keys:
            done.append(revoke(store, key, time.time()))
            if args.delete:
                forget(store, key)
        left = len(stored(store))
    if args.json:
        print(json.dumps([_dates(key) for key in done], indent=2))
        return 0
    for key in done:
        print(f"key {printable(key.name)!r}, id {key.id}, is {'removed' if args.delete else 'revoked'}")
    if args.delete and not left:
        print("no key is left: a server on 127.0.0.1 is open to this machine again")
    return 0


# The store


@contextlib.contextmanager
def _store(args: argparse.Namespace, *, reads: bool = False) -> Iterator[Any]:
    """Open the store; ``None`` where there is no file and *reads* is all that is wanted."""
    said, where = store_file(args.store, args.config)
    if reads and isinstance(said, Path) and not said.exists():
        yield None
        return
    given = {} if isinstance(said, Path) else _reached_by(args.config)
    store = store_at(f"{said}", where, durable=True, patience_s=5.0, **given)
    try:
        yield store
    finally:
        store.close()


def store_file(named: str | None, configuration: str | None) -> tuple[Path | str, str]:
    """Return the file of the server's state, or the URL of its store, and what names it in messages.

    Args:
        named: By an option.
        configuration: ``orla.toml``; ``None``: the nearest.

    Raises:
        ConfigError: The configuration cannot be read, or what it says is no path.
    """
    if named is not None:
        return named if is_shared(named) else checked.path("--store", named), "--store"
    source, serve = _serve_table(configuration)
    said = serve.get("store")
    if said is None:
        return default_file(), "store"
    where = f"{source}: serve.store"
    if isinstance(said, str) and is_shared(said):
        return said, where
    return source.absolute().parent / checked.path(where, said), where


def _serve_table(configuration: str | None) -> tuple[Path, Mapping[str, Any]]:
    """Return a configuration and its ``[serve]``, whatever else is in it."""
    found = configuration or find_file()
    if found is None:
        return Path(), {}
    source = Path(found)
    try:
        serve = tomllib.loads(source.read_text(encoding="utf-8")).get("serve")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    return source, serve if isinstance(serve, dict) else {}


def _reached_by(configuration: str | None) -> dict[str, Any]:
    """Return by which password, and whether in plain text, a store on another machine is reached."""
    source, serve = _serve_table(configuration)
    given = {"password_env": serve.get("store_password_env"), "plain_text": serve.get("store_plain_text", False)}
    if given["password_env"] is not None:
        checked.text(f"{source}: serve.store_password_env", given["password_env"])
    if not isinstance(given["plain_text"], bool):
        raise ConfigError(f"{source}: serve.store_plain_text must be true or false")
    return given


# Arguments


def limit_of(said: str) -> Limit:
    """Return a limit as the command line says it.

    Raises:
        ConfigError: It says none.
    """
    found = _LIMIT.fullmatch(said)
    if found is None:
        raise ConfigError(f'--limit {shown(said)} must be like "60 calls per 1m", "2M tokens per 1d" or "5 usd"')
    figure = _UNITS[found["unit"].lower()]
    number: Any = float(found["number"].replace("_", "")) * _FACTORS[(found["factor"] or "").lower()]
    if FIGURES[figure].whole:
        if number != int(number):
            raise ConfigError(f"--limit {shown(said)}: there are only whole {figure}")
        number = int(number)
    per_s = None if found["time"] is None else _seconds(f"--limit {shown(said)}", found["time"])
    try:
        return Limit(**{figure: number}, per_s=per_s)
    except ConfigError as error:
        raise ConfigError(f"--limit {shown(said)}: {error}") from error


def _seconds(where: str, said: str, right: str = "a time as 30s, 5m, 12h, 90d or 2w") -> float:
    found = _TIME.fullmatch(said.strip().lower())
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"{where}: {shown(said)} must be {right}")
    return float(found[1]) * _TIMES[found[2]]


def _expires(said: str, now_s: float) -> float:
    try:
        at_s = datetime.fromisoformat(said).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return now_s + _seconds("--expires", said, "a time as 30s, 5m, 12h, 90d or 2w, or a day as 2027-01-31")
    if at_s <= now_s:
        raise ConfigError(f"--expires {shown(said)} is over; a key that is none any more is of no use")
    return at_s


def _tag(said: str) -> tuple[str, str]:
    name, equals, value = said.partition("=")
    if not equals or not name:
        raise ConfigError(f"--tag {shown(said)} must be NAME=VALUE")
    return name, value


# What is printed

HEADS = ("id", "name", "state", "scopes", "tenants", "limits", "expires")


def _cells(key: AccessKey) -> tuple[str, ...]:
    tenants = ANY if key.tenants is None else ", ".join(key.tenants) or "-"
    limits = [*map(_said, key.limits), *([] if key.concurrency is None else [f"{key.concurrency} at once"])]
    cells = (key.id, key.name, key.state(time.time()), ", ".join(key.scopes), tenants, ", ".join(limits) or "-")
    return (*(printable(cell, 60) for cell in cells), _date(key.expires_s) or "-")


def _said(limit: Limit) -> str:
    figures = [FIGURES[name].format(value) for name in FIGURES if (value := getattr(limit, name)) is not None]
    return ", ".join(figures) + ("" if limit.per_s is None else f" per {_time_said(limit.per_s)}")


def _spent_said(limit: Limit, used: dict[str, Any]) -> str:
    figures = [FIGURES[name].format(used[name]) for name in FIGURES if getattr(limit, name) is not None]
    return ", ".join(figures) + " spent"


def _time_said(seconds: float) -> str:
    for unit, each_s in reversed(_TIMES.items()):
        if seconds >= each_s and seconds % each_s == 0:
            return f"{seconds / each_s:g}{unit}"
    return f"{seconds:g}s"


def _dates(key: AccessKey) -> dict[str, Any]:
    found = key.as_dict()
    for name in ("created", "expires", "revoked"):
        found[name] = _date(found.pop(f"{name}_s"))
    return {**found, "state": key.state(time.time())}


def _date(at_s: float | None) -> str | None:
    return None if at_s is None else datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
