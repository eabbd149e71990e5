"""Codex and Claude Code take one turn with a tool each, at ``orla-lg serve`` with a key and a scripted engine.

One arm's engine speaks chat completions alone, so that request and answer are translated; the other's speaks the
agent's own wire.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.coding_agents.turns import (
    FOUND,
    SAID,
    STAGE,
    Ended,
    Take,
    claude_code,
    codex,
    engine_for,
    searching_script,
)
from tests.serve.processes import Served, orla_lg, serving, until_ready
from tests.wire.machine import Machine
from tests.wires.chatting_server import ChattingServer
from tests.wires.messages_server import MODEL

TENANT = "developers"
PATIENCE_S = 10.0
SOON_S = 30.0

CONFIGURATION = """
records_file = "records.jsonl"
backends.main.url = "{url}"
mapping."*" = "main"
"""


def records_in(file: Path, calls: int) -> list[dict[str, Any]]:
    """Return the records of so many calls, as soon as they are written; other lines amend these."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        lines = [json.loads(line) for line in (file.read_text().splitlines() if file.exists() else ())]
        records = [line for line in lines if "amends" not in line]
        if len(records) >= calls:
            return records
        assert time.monotonic() < until_s, f"{len(records)} of {calls} calls have a record"
        time.sleep(0.05)


@dataclass(frozen=True)
class Turned:
    """A turn, and what the server has of it."""

    ended: Ended
    records: list[dict[str, Any]]
    work: Path
    took_s: float


@contextmanager
def served(engine: Any, folder: Path, *limits: str) -> Iterator[tuple[Served, str, Path, Path]]:
    """Yield a server before a scripted engine, a key for it, and an agent's folders: to work in, and its home."""
    assert [name for _, name in socket.if_nameindex()] == ["lo"], "run by make test-coding-agents"
    work, home, server = folder / "work", folder / "home", folder / "server"
    for each in (work, home, server):
        each.mkdir()
    (server / "orla.toml").write_text(CONFIGURATION.format(url=engine.url))
    limited = [word for limit in limits for word in ("--limit", limit)]
    key = orla_lg(server, "keys", "create", "agent", "--tenant", TENANT, *limited).stdout.strip()
    assert key
    with serving(server) as gateway:
        until_ready(gateway)
        yield gateway, key, work, home
        assert key not in gateway.errors
    assert not any(key in json.dumps(seen.headers) for seen in engine.requests)


def turned(engine: Any, take: Take, folder: Path, calls: int, *, same_prefix: bool = True) -> Turned:
    """Have an agent take a turn at a server, with a key, before a scripted engine; it works."""
    with served(engine, folder) as (gateway, key, work, home):
        began_s = time.monotonic()
        ended = take(gateway.url, key, MODEL, work, home)
        took_s = time.monotonic() - began_s
        assert ended.status == 0, ended.log
        records = records_in(gateway.folder / "records.jsonl", calls)
    assert ended.said == SAID, ended.log
    for record in records:
        assert (record["workflow"], record["stage"]) == (ended.session, STAGE)
        assert (record["tenant"], record["backend"]) == (TENANT, "main")
        assert record["error"] is None and not record["external"]
    for before, after in pairwise(records if same_prefix else ()):  # tools stand at the beginning of a prompt
        assert after["cached_tokens"] >= 0.9 * before["prompt_tokens"] > 0
    return Turned(ended, records, work, took_s)


@pytest.mark.parametrize(
    ("agent", "take", "spoken"),
    [
        ("codex", codex, "chat"),
        ("codex", codex, "responses"),
        ("claude_code", claude_code, "chat"),
        ("claude_code", claude_code, "messages"),
    ],
)
def test_a_turn_with_a_tool(agent: str, take: Take, spoken: str, tmp_path: Path) -> None:
    with engine_for(agent, spoken) as engine:
        turn = turned(engine, take, tmp_path, calls=2)
    assert (turn.work / "made.txt").read_text() == "made\n"  # the tool ran
    first, second = turn.records
    counted = (
        f"{first['prompt_tokens']} and {second['prompt_tokens']} tokens, {second['cached_tokens']} of them cached"
    )
    print(f"\n{agent}, engine by {spoken}: {turn.took_s:.1f} s; workflow {turn.ended.session}; prompts of {counted}")


def test_a_tool_that_is_found_by_a_search(tmp_path: Path) -> None:
    """Before, it is no tool of the request that the engine gets; then it is one like the others."""
    with ChattingServer(searching_script, machine=Machine(token_s=0.0)) as engine:
        turn = turned(engine, claude_code, tmp_path, calls=3, same_prefix=False)
    assert (turn.work / "made.txt").read_text() == "made\n"
    first, *others = [{tool["function"]["name"] for tool in body["tools"]} for body in engine.bodies()]
    assert FOUND not in first and all(FOUND in names for names in others)


@pytest.mark.parametrize(("agent", "take", "told"), [("codex", codex, "Quota"), ("claude_code", claude_code, "429")])
def test_a_spent_budget_ends_the_turn(agent: str, take: Take, told: str, tmp_path: Path) -> None:
    """Agents try again what may succeed; this may not, and is said to be in vain."""
    with (
        engine_for(agent, "chat") as engine,
        served(engine, tmp_path, "1 calls per 1d") as (gateway, key, work, home),
    ):
        began_s = time.monotonic()
        ended = take(gateway.url, key, MODEL, work, home)
        assert time.monotonic() - began_s < SOON_S
        assert ended.status != 0 and told in ended.log
        assert len(engine.bodies()) == 1
