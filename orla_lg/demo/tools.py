"""The support desk's tools: plain LangChain tools over the company's files, and an outbox for its letters."""

from __future__ import annotations

import json
import threading
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from langchain_core.tools import BaseTool, ToolException, tool

_DATA = files("orla_lg.demo") / "data"


@tool
def read_policy_yaml(policy: str) -> str:
    """Return the company's policy file for one category of tickets."""
    known = {file.name.removesuffix(".yaml"): file for file in (_DATA / "policies").iterdir()}
    if policy not in known:  # a model chose the name: it must not lead out of the folder
        raise ToolException(f"there is no policy {policy!r}; there are {', '.join(sorted(known))}")
    return known[policy].read_text(encoding="utf-8").strip()


@tool
def read_team_descriptions() -> str:
    """Return what each of the company's teams is there for."""
    return (_DATA / "teams.yaml").read_text(encoding="utf-8").strip()


def rules_in(policy_yaml: str) -> dict[str, str]:
    """Return the rules of a policy file, by name."""
    parsed: dict[str, Any] = yaml.safe_load(policy_yaml)
    return {str(name): str(rule) for name, rule in parsed["rules"].items()}


def teams_in(team_yaml: str) -> dict[str, str]:
    """Return the team for each category."""
    parsed: dict[str, Any] = yaml.safe_load(team_yaml)
    pairs = ((categories, str(team).split(" (")[0]) for categories, team in parsed.items())
    return {category: team for categories, team in pairs for category in categories.split(", ")}


def mailer(outbox: Path | None) -> BaseTool:
    """Return the tool that "sends" an email: it adds a line of JSON to *outbox*, if there is one."""
    lock = threading.Lock()

    @tool
    def send_email(subject: str, body: str) -> str:
        """Send an email to the customer who wrote the ticket."""
        if outbox is not None:
            with lock, outbox.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"subject": subject, "body": body}, ensure_ascii=False) + "\n")
        return "sent"

    return send_email
