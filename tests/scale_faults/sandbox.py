"""A private network, pids and temporary files, where they may be made: nothing is reachable, all ends together."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

INSIDE = "ORLA_SCALE_FAULTS_INSIDE"
SET_FLAGS, UP, RUNNING = 0x8914, 0x1, 0x40
ROOT = Path(__file__).resolve().parents[2]


def enter(module: str, words: Sequence[str]) -> str:
    """Run this program again in namespaces of its own; returns empty once inside, else why there are none."""
    if os.environ.get(INSIDE):
        _settle()
        return ""
    unshare = shutil.which("unshare")
    if unshare is None:
        return "there is no `unshare` here"
    flags = ["--net", "--pid", "--mount", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        flags += ["--user", "--map-root-user"]
    tried = subprocess.run([unshare, *flags, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return tried.stderr.strip() or f"`unshare` ends with {tried.returncode}"
    return os.execve(unshare, [unshare, *flags, sys.executable, "-m", module, *words], {**os.environ, INSIDE: "1"})


def _settle() -> None:
    """Let the loopback be up and the temporary folder be our own; the first process must heed signals itself."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SET_FLAGS, struct.pack("16sh22x", b"lo", UP | RUNNING))
    folder = Path(tempfile.gettempdir()).resolve()
    ours = [Path(each).resolve() for each in (ROOT, sys.prefix, sys.base_prefix, *sys.path) if each]
    if not any(each.is_relative_to(folder) for each in ours):
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
