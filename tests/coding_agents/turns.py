"""One turn of a coding agent: what it is asked, what the scripted model makes it do, and what it reports."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.coding_agents.packages import folder
from tests.wire.machine import Machine
from tests.wires.chatting_server import ChattingServer
from tests.wires.messages_server import Answer, MessagesServer, text, tool_use
from tests.wires.responses_server import ResponsesServer, Turn

TURN_S = 120
PROMPT = "Write the word `made` into the file made.txt."
SHELL = "echo made > made.txt"
SAID = "The file is written."
STAGE = "coding"
"""Each agent can be configured to send a header, which says it."""


@dataclass(frozen=True)
class Ended:
    """How a turn ended."""

    status: int
    said: str
    """The last message of the agent."""
    session: str
    """As the agent names it."""
    log: str
    """All that it printed."""


Take = Callable[[str, str, str, Path, Path], Ended]
"""Takes a turn: the root of the gateway, its key, the model, the folder to work in, the home folder."""


def codex(root: str, key: str, model: str, work: Path, home: Path) -> Ended:
    """Let Codex take one turn; its wire is OpenAI's Responses."""
    provider = (
        f'{{name="gateway", base_url="{root}/v1", env_key="GATEWAY_KEY", wire_api="responses", '
        f'http_headers={{"X-Orla-Stage"="{STAGE}"}}}}'
    )
    argv = [
        "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox",
        "-c", 'model_provider="gateway"', "-c", f"model_providers.gateway={provider}", "-m", model, PROMPT,
    ]  # fmt: skip
    done = _run("codex", argv, work, home, GATEWAY_KEY=key)
    session = re.search(r"^session id: (\S+)$", done.stderr, re.MULTILINE)
    return Ended(done.returncode, done.stdout.strip(), session[1] if session else "", done.stderr)


def claude_code(root: str, key: str, model: str, work: Path, home: Path) -> Ended:
    """Let Claude Code take one turn; its wire is Anthropic's Messages."""
    argv = ["-p", PROMPT, "--dangerously-skip-permissions", "--output-format", "json"]
    said = {
        "ANTHROPIC_BASE_URL": root, "ANTHROPIC_MODEL": model, "ANTHROPIC_SMALL_FAST_MODEL": model,
        "ANTHROPIC_CUSTOM_HEADERS": f"X-Orla-Stage: {STAGE}",
    }  # fmt: skip
    # IS_SANDBOX: it refuses to run without permissions as root anywhere else.
    done = _run("claude", argv, work, home, ANTHROPIC_AUTH_TOKEN=key, IS_SANDBOX="1", **said)
    try:
        last = json.loads(done.stdout)
    except ValueError:
        last = {}
    return Ended(done.returncode, last.get("result", ""), last.get("session_id", ""), done.stdout + done.stderr)


def _run(command: str, argv: list[str], work: Path, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run an agent in an environment that names nothing but the gateway."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", **more}
    return subprocess.run(
        [str(folder() / command), *argv], cwd=work, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=TURN_S, check=False,
    )  # fmt: skip


# What the model does: it has the agent run one command, and is content with whatever comes of it.


def _call(tools: list[dict[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """Return the call of the agent's shell; ``None`` where a request offers none, as one for a title."""
    names = {(tool.get("function") or tool).get("name") for tool in tools}
    if "exec_command" in names:
        return "exec_command", {"cmd": SHELL}
    if "Bash" in names:
        return "Bash", {"command": SHELL, "description": "Write the file"}
    return None


def responses_script(body: dict[str, Any]) -> Turn:
    """Act as the model, asked by Responses or by chat completions."""
    call = _call(body.get("tools") or [])
    ran = any(item.get("type") == "function_call_output" for item in body["input"])
    if ran or call is None:
        return Turn(text=SAID)
    return Turn("I need the shell.", calls=((call[0], json.dumps(call[1])),))


def messages_script(body: dict[str, Any]) -> Answer:
    """Act as the model, asked by Messages."""
    call = _call(body.get("tools") or [])
    blocks = [block for message in body["messages"] for block in _blocks(message)]
    if call is None or any(block.get("type") == "tool_result" for block in blocks):
        return Answer((text(SAID),))
    return Answer((text("I need the shell."), tool_use(call[0], **call[1])))


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else []


def engine_for(agent: str, spoken: str) -> Any:
    """Return a scripted engine that speaks chat completions alone, or the agent's wire alone."""
    machine = Machine(token_s=0.0)
    if spoken == "chat":
        return ChattingServer(responses_script, machine=machine)
    if agent == "codex":
        return ResponsesServer(responses_script, machine=machine)
    return MessagesServer(messages_script, speaks=frozenset({"messages"}), machine=machine)
