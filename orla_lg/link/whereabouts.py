"""Where a process runs, as one text: two processes with the same one see each other by their pids."""

from __future__ import annotations

import contextlib
import os
import socket
from functools import cache
from pathlib import Path


@cache
def here() -> str:
    """Return the host's name and, on Linux, its start and the namespace of its pids.

    Containers of one pod have one name, and do not see each other's processes; after a new start a host has others.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def is_gone(host: str, pid: int) -> bool:
    """Whether a process is known not to run any more; of one elsewhere that is never known."""
    if host != here() or len(host.split()) < 3 or pid <= 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # it is another user's, or no process's number
        return False
    return _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended, and only its parent has not looked yet: its connections are closed."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[:1] == ["Z"]
