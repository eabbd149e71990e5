"""Codex and Claude Code take one turn with a tool each, against the gateway and a scripted engine.

One arm's engine speaks chat completions alone, so that request and answer are translated; the other's speaks the
agent's own wire.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from tests.coding_agents.turns import SAID, STAGE, Take, claude_code, codex, engine_for
from tests.serve.running_gateway import running_gateway
from tests.wires.messages_server import MODEL

KEY = "key-of-the-agent"


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
    work, home = tmp_path / "work", tmp_path / "home"
    work.mkdir()
    home.mkdir()
    with engine_for(agent, spoken) as engine, running_gateway(engine) as gateway:
        began = time.monotonic()
        ended = take(gateway.root, KEY, MODEL, work, home)
        took_s = time.monotonic() - began
        records = gateway.records(2)
    assert ended.status == 0, ended.log
    assert ended.said == SAID, ended.log
    assert (work / "made.txt").read_text() == "made\n"  # the tool ran
    first, second = records
    assert [(each.workflow, each.stage) for each in records] == [(ended.session, STAGE)] * 2
    assert (first.error, second.error, first.external, second.external) == (None, None, False, False)
    assert first.prompt_tokens and second.cached_tokens
    assert second.cached_tokens >= 0.9 * first.prompt_tokens
    print(
        f"\n{agent} over {spoken}: {took_s:.1f} s, workflow {first.workflow}, stage {first.stage}, "
        f"prompts of {first.prompt_tokens} and {second.prompt_tokens} tokens, {second.cached_tokens} of them cached"
    )
