"""A core and its standby on Ray: one command starts all of it, kills the core in the middle, and ends it again.

    python examples/ray/run.py

It needs `pip install 'orla-lg[ray]'`, takes about half a minute, and leaves nothing running. On Linux, as root, it
runs in a network of its own; elsewhere Ray listens on this machine's interfaces meanwhile, behind a token.
"""

import asyncio
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from orla_lg import Orla, OrlaError

BOUND, RUNS, AT_ONCE, CALL_S, PATIENCE_S, ENDS_S = 4, 120, 12, 0.1, 240.0, 15.0
INSIDE = "EXAMPLE_INSIDE"
CONFIG = """
[backends.main]
url = "{engine}"
max_concurrency = {bound}

[mapping]
"*" = "main"

[serve]
store = "serve.db"
listen_address = "127.0.0.1:{port}"

[ray]
standbys = 1
"""


class Engine:
    """Answers each call after a while, and counts how many are here at once."""

    def __init__(self) -> None:
        self.now = self.most = self.calls = 0

    async def chat(self, _: Request) -> JSONResponse:
        self.now, self.calls = self.now + 1, self.calls + 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(CALL_S)
        finally:
            self.now -= 1
        message = {"role": "assistant", "content": f"answer {self.calls}"}
        usage = {"prompt_tokens": 20, "completion_tokens": 2, "total_tokens": 22}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return JSONResponse({"id": "c", "object": "chat.completion", "created": 1, "model": "scripted",
                             "choices": [choice], "usage": usage})  # fmt: skip

    async def models(self, _: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": "scripted", "object": "model"}]})

    @contextmanager
    def served(self) -> Iterator[str]:
        routes = [Route("/v1/chat/completions", self.chat, methods=["POST"]), Route("/v1/models", self.models)]
        opened = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="error"))
        Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True).start()
        yield f"http://127.0.0.1:{opened.getsockname()[1]}/v1"
        server.should_exit = True


def graph_of(orla: Orla) -> Any:
    model = ChatOpenAI(model="auto", api_key="none", base_url="http://127.0.0.1:9/v1", max_retries=0, max_tokens=20)

    async def draft(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    async def review(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke([*state["messages"], ("user", "Is that right?")])]}

    builder = StateGraph(MessagesState).add_node("draft", draft).add_node("review", review)
    return orla.wrap(builder.add_edge(START, "draft").add_edge("draft", "review").add_edge("review", END))


async def run_all(graph: Any, ended: list[float], failed: list[str]) -> None:
    """Run all workflows, some at once, and note when each ended."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with places:
            try:
                await graph.ainvoke({"messages": [("user", f"Question {number}")]})
            except OrlaError as error:
                failed.append(f"{type(error).__name__}: {error}")
            ended.append(time.monotonic())

    async with asyncio.TaskGroup() as tasks:
        for number in range(RUNS):
            tasks.create_task(one(number))


class Serve:
    """`orla-lg serve --on ray`, and what it printed of its actors."""

    def __init__(self, config: Path) -> None:
        words = [sys.executable, "-m", "orla_lg", "serve", "--on", "ray", "--config", str(config)]
        self.process = subprocess.Popen(words, cwd=config.parent, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.lines: list[str] = []
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            print(f"    {line}", end="", flush=True)
            self.lines.append(line)

    def until(self, text: str, count: int = 1) -> str:
        """Wait for so many lines with a text, and return the last."""
        until_s = time.monotonic() + PATIENCE_S
        while len(found := [line for line in list(self.lines) if text in line]) < count:
            if self.process.poll() is not None or time.monotonic() > until_s:
                ended = self.process.poll()
                why = (
                    f"`orla-lg serve --on ray` ended with {ended}"
                    if ended is not None
                    else f"{PATIENCE_S:g} s are over"
                )
                raise SystemExit(f"{why}, and it did not say {text!r}; what it said is above")
            time.sleep(0.05)
        return found[-1]

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(PATIENCE_S)


def pid_in(line: str) -> int:
    return int(line.split("pid ")[1].split()[0])


def below(pid: int) -> set[int]:
    """Return a process and all that it started, on Linux."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, size = {pid}, 0
    while size < len(found):
        size = len(found)
        found |= {each for each, parent in parents.items() if parent in found}
    return found


def lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def main() -> int:
    engine = Engine()
    ended: list[float] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder, engine.served() as url:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        config = Path(folder) / "orla.toml"
        config.write_text(CONFIG.format(engine=url, bound=BOUND, port=port))
        serve = Serve(config)
        try:
            serve.until("Ctrl-C")
            core, standby = serve.until("orla-core-0"), serve.until("orla-core-1")
            started = below(serve.process.pid)
            with Orla.remote(f"http://127.0.0.1:{port}") as orla:
                runs = Thread(target=lambda: asyncio.run(run_all(graph_of(orla), ended, failed)))
                began_s = time.monotonic()
                runs.start()
                while len(ended) < RUNS // 3:
                    time.sleep(0.01)
                killed_s = time.monotonic()
                os.kill(pid_in(core), signal.SIGKILL)
                print(f"\n    --- kill -9 {pid_in(core)}: the core ---\n", flush=True)
                runs.join()
                over_s = time.monotonic()
                again = serve.until("orla-core-0", count=3)
                started |= below(serve.process.pid)
        finally:
            serve.end()
    began = [began_s, *sorted(each for each in ended if each < killed_s)]
    after = [killed_s, *sorted(each for each in ended if each >= killed_s)]
    print(f"\n{'':<22}{'seconds':>9}{'runs ended':>12}{'longest pause':>15}")
    for name, times, until_s in (("before the kill", began, killed_s), ("after it", after, over_s)):
        pause_s = max((b - a for a, b in pairwise(times)), default=0.0)
        print(f"{name:<22}{until_s - times[0]:>9.1f}{len(times) - 1:>12}{pause_s:>13.1f} s")
    print(
        f"\nthe core was pid {pid_in(core)}, its standby {pid_in(standby)} went on; Ray began {pid_in(again)} again"
    )
    print(f"calls at the engine: {engine.calls} of {2 * RUNS}, at most {engine.most} at once of {BOUND}")
    print(f"failed: {len(failed)}{''.join(f'; {each}' for each in failed[:1])}")
    until_s = time.monotonic() + ENDS_S
    while (left := [pid for pid in started if lives(pid)]) and time.monotonic() < until_s:
        time.sleep(0.1)  # Ray's own processes end a little after it
    print(f"left running: {len(left)}")
    return int(bool(failed or left or engine.most > BOUND or engine.calls != 2 * RUNS))


def in_a_network_of_its_own() -> int | None:
    """Run this again where no other machine is; `None` where that cannot be made."""
    words = ["unshare", "--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
    try:
        subprocess.run([*words, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        print("no network of its own can be made here: Ray listens on this machine's interfaces, behind its token")
        return None
    return subprocess.run([*words, sys.executable, __file__], env={**os.environ, INSIDE: "1"}, check=False).returncode


def furnish() -> None:
    """Have the new network's one interface up, and a folder of its own for Ray's files."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        fcntl.ioctl(asked, 0x8914, struct.pack("16sH14x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
    Path("/tmp/ray").mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/tmp/ray"], check=True)
    os.environ["HOME"] = os.environ["XDG_STATE_HOME"] = "/tmp/ray"


if __name__ == "__main__":
    if os.environ.get(INSIDE):
        furnish()
        sys.exit(main())
    status = in_a_network_of_its_own()
    sys.exit(main() if status is None else status)
