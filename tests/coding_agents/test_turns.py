"""Codex and Claude Code take one turn with a tool each, at ``orla-lg serve`` with a key and a scripted engine.

One arm's engine speaks chat completions alone, so that request and answer are translated; the other's speaks the
agent's own wire.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.coding_agents.turns import SAID, STAGE, Take, claude_code, codex, engine_for
from tests.serve.processes import orla_lg, serving, until_ready
from tests.wires.messages_server import MODEL

TENANT = "developers"
PATIENCE_S = 10.0

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
    assert [name for _, name in socket.if_nameindex()] == ["lo"], "run by make test-coding-agents"
    work, home, server = tmp_path / "work", tmp_path / "home", tmp_path / "server"
    for folder in (work, home, server):
        folder.mkdir()
    with engine_for(agent, spoken) as engine:
        (server / "orla.toml").write_text(CONFIGURATION.format(url=engine.url))
        key = orla_lg(server, "keys", "create", agent, "--tenant", TENANT).stdout.strip()
        with serving(server) as gateway:
            until_ready(gateway)
            began_s = time.monotonic()
            ended = take(gateway.url, key, MODEL, work, home)
            took_s = time.monotonic() - began_s
            assert ended.status == 0, ended.log
            first, second = records_in(server / "records.jsonl", calls=2)
            log = gateway.errors
        assert not any(key in json.dumps(seen.headers) for seen in engine.requests)
    assert ended.said == SAID, ended.log
    assert (work / "made.txt").read_text() == "made\n"  # the tool ran
    for record in (first, second):
        assert (record["workflow"], record["stage"]) == (ended.session, STAGE)
        assert (record["tenant"], record["backend"]) == (TENANT, "main")
        assert record["error"] is None and not record["external"]
    assert second["cached_tokens"] >= 0.9 * first["prompt_tokens"] > 0
    assert key and key not in log
    counted = (
        f"{first['prompt_tokens']} and {second['prompt_tokens']} tokens, {second['cached_tokens']} of them cached"
    )
    print(f"\n{agent}, engine by {spoken}: {took_s:.1f} s; workflow {ended.session}; prompts of {counted}")
