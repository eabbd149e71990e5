"""Writes into docs/tutorial.md what its commands and its code print, on the engines that it starts.

``make page-tutorial`` runs the page from top to bottom in an empty folder: its ``orla-lg`` commands in a shell, its
Python in this process, ``toml`` into ``orla.toml``. A ``console`` or ``text`` block that follows is replaced by what
was printed. Ports are free ones while it runs, and those of the page in what it writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.lib.command import DOCS, ROOT, parser

PAGE = DOCS / "tutorial.md"
PORTS = ("8001", "8002")
PATIENCE_S = 300.0
"""For one command; the first start of an engine installs it."""
SHOWN = ("console", "text")
_PROGRESS = re.compile(r"^\[ *\d+ s\] .*\n", re.M)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@contextlib.contextmanager
def free_ports() -> Iterator[dict[str, str]]:
    """Find a free port for each of the page's; afterwards end the engines there, whatever became of the page."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        ports = {port: str(each.getsockname()[1]) for port, each in zip(PORTS, sockets, strict=True)}
    try:
        yield ports
    finally:
        for port in ports.values():
            end = [sys.executable, "-m", "orla_lg", "engine", "down", port]
            subprocess.run(end, capture_output=True, check=False)


def replaced(text: str, names: Mapping[str, str]) -> str:
    """Return *text* with each name replaced where it stands by itself."""
    return re.sub("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in names), lambda hit: names[hit[0]], text)


def in_shell(lines: str) -> str:
    """Return what commands print, without the progress of what is fetched or loaded meanwhile."""
    program = f'orla-lg() {{ {sys.executable} -m orla_lg "$@"; }}\n{lines}'
    done = subprocess.run(
        ["bash", "-e", "-c", program], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{lines}\n{done.stdout}{done.stderr}")
    return _PROGRESS.sub("", done.stdout)


def in_python(code: str, space: dict[str, Any]) -> str:
    """Return what code prints in the session of the page."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, PAGE.name, "exec", dont_inherit=True), space)
    return printed.getvalue()


def run(page: str, ports: Mapping[str, str]) -> str:
    """Run the blocks of a page in this folder, and return the page with what they printed."""
    space: dict[str, Any] = {"__name__": "tutorial"}
    back = {real: written for written, real in ports.items()} | {
        str(Path.cwd()): "~/first-hour",
        str(Path.home()): "~",
    }
    found = list(_BLOCK.finditer(page))
    parts, at = [], 0
    for block, behind in zip(found, [*found[1:], None], strict=True):
        language, code = block[1], replaced(block[2], ports)
        shown = behind is not None and behind[1] in SHOWN and not page[block.end() : behind.start()].strip()
        if language == "toml":
            Path("orla.toml").write_text(code, encoding="utf-8")
        if language in SHOWN or (language != "python" and not code.startswith("orla-lg ")):
            continue
        printed = in_shell(code) if language == "bash" else in_python(code, space)
        if shown and behind is not None:
            start = behind.start(2)
            parts += [
                page[at:start],
                replaced("\n".join(map(str.rstrip, printed.rstrip().splitlines())) + "\n", back),
            ]
            at = behind.end(2)
    return "".join([*parts, page[at:]])


def main() -> None:
    parser("tutorial", __doc__).parse_args()
    here = Path.cwd()
    with free_ports() as ports, tempfile.TemporaryDirectory() as folder:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
        os.chdir(folder)
        try:
            written = run(PAGE.read_text(encoding="utf-8"), ports)
        finally:
            os.chdir(here)
    PAGE.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
