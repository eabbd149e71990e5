"""The coding agents, from their npm packages: pinned, and kept in the user's cache folder."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from orla_lg_llamacpp.model import cache_folder

PINNED: Mapping[str, str] = {"@openai/codex": "0.171.0", "@anthropic-ai/claude-code": "2.1.332"}
COMMANDS: Mapping[str, str] = {"@openai/codex": "codex", "@anthropic-ai/claude-code": "claude"}

INSTALL_S = 900
ANSWER_S = 60


class NotInstalled(Exception):
    """A package could not be had; the text says what failed."""


def folder() -> Path:
    """Return the folder of the installed commands; another set of versions is another folder."""
    versions = "-".join(PINNED.values())
    return cache_folder() / "coding-agents" / versions / "node_modules" / ".bin"


def install() -> None:
    """Install the packages with the user's npm, from wherever it is set up to take them, unless they are there.

    Raises:
        NotInstalled: There is no npm, it failed, or what it installed does not run.
    """
    if not all((folder() / command).exists() for command in COMMANDS.values()):
        npm = shutil.which("npm")
        if npm is None:
            raise NotInstalled("there is no npm; install Node.js 20 or newer")
        prefix = folder().parent.parent
        prefix.mkdir(parents=True, exist_ok=True)
        wanted = [f"{name}@{version}" for name, version in PINNED.items()]
        print(f"installing {' '.join(wanted)} into {prefix} (800 MB, once) ...", flush=True)
        _run([npm, "install", "--prefix", str(prefix), "--no-audit", "--no-fund", "--save-exact", *wanted], INSTALL_S)
    for name, command in COMMANDS.items():
        said = _run([str(folder() / command), "--version"], ANSWER_S)
        if PINNED[name] not in said:
            raise NotInstalled(f"{command} says that it is {said.strip()!r} instead of {PINNED[name]}")


def _run(argv: list[str], timeout_s: float) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{' '.join(argv[:2])}: {error}") from error
    if done.returncode != 0:
        raise NotInstalled(f"{' '.join(argv[:2])} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout
