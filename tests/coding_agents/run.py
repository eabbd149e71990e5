"""Codex and Claude Code, from their npm packages, one turn with a tool each, against the gateway.

The packages are installed into the user's cache folder the first time (npm is needed, and 800 MB). The turns run in a
network namespace of their own that has loopback only, so that what the agents would ask of anything but the gateway
fails; no key of a provider is needed. The engine behind the gateway is a script.

Exit: pytest's; 2 where the packages cannot be had; 0, after saying so, where no namespace can be made.

Examples:
    make test-coding-agents
    make test-coding-agents TESTS='-k codex -s'
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

from tests.coding_agents import packages

HERE = Path(__file__).resolve().parent
INSIDE = "ORLA_CODING_AGENTS"
"""Set for the tests themselves: they are collected only where it is."""

_WAYS = (["unshare", "--net"], ["unshare", "--net", "--map-root-user"])
"""As root, and as a user that may make namespaces."""

_SET_FLAGS, _UP = 0x8914, 0x1


def main() -> int:
    """Install the packages, enter a namespace, run the tests."""
    if os.environ.get(INSIDE):
        bring_loopback_up()
        os.execv(sys.executable, [sys.executable, "-m", "pytest", "-s", str(HERE), *sys.argv[1:]])
    try:
        packages.install()
    except packages.NotInstalled as failure:
        print(f"the coding agents cannot be had: {failure}")
        return 2
    way = way_in()
    if way is None:
        print("skipped: no network namespace can be made here (unshare --net is not allowed)")
        return 0
    again = [*way, sys.executable, "-m", "tests.coding_agents.run", *sys.argv[1:]]
    return subprocess.run(again, env={**os.environ, INSIDE: "1"}, check=False).returncode


def way_in() -> list[str] | None:
    """Return the command that runs another one in a network namespace of its own; ``None`` where none can."""
    if shutil.which("unshare") is None:
        return None
    for way in _WAYS:
        if subprocess.run([*way, "true"], capture_output=True, check=False).returncode == 0:
            return way
    return None


def bring_loopback_up() -> None:
    """Let 127.0.0.1 be reached, in a namespace that has nothing else."""
    names = [name for _, name in socket.if_nameindex()]
    if names != ["lo"]:
        raise SystemExit(f"expected a network namespace with loopback only, found {', '.join(names)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        fcntl.ioctl(asking, _SET_FLAGS, struct.pack("16sh14x", b"lo", _UP))


if __name__ == "__main__":
    sys.exit(main())
