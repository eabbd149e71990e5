"""A Ray cluster of several raylets on this machine, a scripted engine, replicas, and ``orla-lg serve --on ray``."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import httpx

from orla_lg_llamacpp.embedded import free_port
from tests.scripted_engine import MODEL
from tests.serve_kills.processes import Engine, Replica, until

BOUND = 4
CHAT = {"pool": "chat"}
CONFIG = """
[backends.main]
url = "{url}"
model = "{model}"
engine = "vllm"
max_concurrency = {bound}
[backends.serve]
url = "{serve_url}"
max_concurrency = 2
[mapping]
served = "serve"
"*" = "main"
[serve]
store = "{store}"
pool = "chat"
listen_address = "127.0.0.1:{port}"
replica_lease_s = 5
drain_s = 5
[ray]
standbys = {standbys}
gateways = {gateways}
labels = {{ pool = "chat" }}
namespace = "{namespace}"
"""
SETTINGS = {
    "health_check_period_ms": "500", "health_check_timeout_ms": "1000", "health_check_failure_threshold": "4",
    "enable_worker_prestart": "0", "prestart_worker_first_driver": "0",
}  # fmt: skip
"""Of Ray: nodes are taken for dead sooner than by default, and no process is started that nothing asks for."""

PATIENCE_S = 200.0
"""A guard only: beside other work a cluster of three takes minutes to start."""


def authenticated(folder: Path) -> None:
    """Have everything of Ray's that is started from here use a token of this folder."""
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))


class Said(NamedTuple):
    """A line that the command printed of an actor."""

    name: str
    state: str
    epoch: int
    pid: int
    node: str
    url: str

    @classmethod
    def of(cls, line: str) -> Said | None:
        found = re.match(r"  (orla-\S+) +(\S+)", line)
        if found is None:
            return None
        epoch, pid = re.search(r"epoch (\d+)", line), re.search(r"pid (\d+)", line)
        node, url = re.search(r"node (\w+)", line), re.search(r"(http://\S+)", line)
        return cls(
            found[1], found[2], int(epoch[1]) if epoch else 0, int(pid[1]) if pid else 0,
            node[1] if node else "", url[1] if url else "",
        )  # fmt: skip


class Command:
    """``orla-lg serve --on …``, and what it printed."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.lines: list[str] = []
        self.errors = folder / "command.err"
        with self.errors.open("a") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "orla_lg", "serve", *words],
                cwd=folder, stdout=subprocess.PIPE, stderr=file, text=True, bufsize=1,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):
            for line in self.process.stdout or ():
                self.lines.append(line.rstrip("\n"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(20)
        self._reader.join(5)

    @property
    def text(self) -> str:
        return "\n".join([*self.lines, self.errors.read_text()[-3000:]])

    def now(self) -> dict[str, Said]:
        """Return each actor as it was last said."""
        said = (Said.of(line) for line in list(self.lines))
        return {each.name: each for each in said if each is not None}

    def core(self, before: int = 0) -> Said:
        """Wait for an actor that decides, by a greater epoch than *before*, and return it."""

        def found() -> Said | None:
            self.check()
            cores = [each for each in self.now().values() if each.state == "ready" and each.epoch > before]
            return max(cores, key=lambda each: each.epoch) if cores else None

        said: Said = until(found, f"a core with an epoch above {before}\n{self.text}", PATIENCE_S)
        return said

    def other_process(self, than: Said) -> Said:
        """Wait until an actor listens in another process than before, and return it."""

        def found() -> Said | None:
            self.check()
            now = self.now()[than.name]
            return now if now.pid != than.pid and now.state in ("ready", "standby") else None

        said: Said = until(found, f"{than.name} in another process than {than.pid}\n{self.text}", PATIENCE_S)
        return said

    def until_followed(self) -> None:
        def is_there() -> bool:
            self.check()
            return any("Ctrl-C" in line for line in self.lines)

        until(is_there, f"the command follows the actors\n{self.text}", PATIENCE_S)

    def check(self) -> None:
        assert self.process.poll() is None, self.text

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


class Ground:
    """All of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()
        self.cluster: Any = None
        self.serve_url = f"http://127.0.0.1:{free_port()}/v1"
        """Of an application of Ray Serve."""
        self.replicas: list[Replica] = []

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.engine = stack.enter_context(Engine(self.folder))
            authenticated(self.folder)
            os.environ.update({f"RAY_{name}": value for name, value in SETTINGS.items()})
            self.cluster = self._cluster()
            stack.callback(self._end_of_cluster)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @staticmethod
    def _cluster() -> Any:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(2):
            cluster.add_node(num_cpus=1, labels=CHAT, wait=False)
        cluster.wait_for_nodes()
        return cluster

    def _end_of_cluster(self) -> None:
        for node in self.cluster.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False)

    @property
    def address(self) -> str:
        address: str = self.cluster.address
        return address

    def config(self, name: str = "orla.toml", namespace: str = "orla", standbys: int = 1, gateways: int = 1) -> Path:
        file = self.folder / name
        file.write_text(CONFIG.format(
            url=self.engine.url, serve_url=self.serve_url, model=MODEL, bound=BOUND, standbys=standbys,
            gateways=gateways, store=self.folder / f"{namespace}.db", port=free_port(), namespace=namespace,
        ))  # fmt: skip
        return file

    def command(self, *words: str) -> Command:
        return self._stack.enter_context(Command(self.folder, f"--on=ray={self.address}", *words))

    def replica(self, url: str, *options: str) -> Replica:
        name = f"r{len(self.replicas)}"
        port = int(url.rpartition(":")[2])
        made = Replica(name, port, self.engine.url, self.folder, *options, seed=len(self.replicas))
        self.replicas.append(self._stack.enter_context(made))
        return made.await_ready()

    def node_of(self, said: Said) -> Any:
        """Return the node of ``cluster_utils`` that an actor is on."""
        return next(node for node in self.cluster.list_all_nodes() if node.node_id.startswith(said.node))

    @staticmethod
    def kill(node: Any, name: str) -> Any:
        """Kill one of a node's processes, ``raylet`` or the head's ``gcs_server``, and return it; it is not reaped.

        What a raylet started ends with it once it is reaped, and not before: a process asks for its parent's end.
        """
        process = node.all_processes[name][0].process
        process.kill()
        return process


def answered(gateway: Said) -> bool:
    """Whether a gateway answers a call by HTTP."""
    body = {"model": "main", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    return httpx.post(f"{gateway.url}/v1/chat/completions", json=body, timeout=60, trust_env=False).is_success


def await_flow(replicas: Sequence[Replica], calls: int = 8) -> None:
    """Wait until so many calls have ended from now on, in all replicas together."""
    before = sum(len(each.ended) for each in replicas)
    until(lambda: sum(len(each.ended) for each in replicas) >= before + calls, f"{calls} calls end")


def check_calls(ground: Ground) -> None:
    """No call may have failed, none may have been sent twice, and the engine never had more than its bound."""
    account = ground.engine.account()
    assert [each.errors for each in ground.replicas if each.errors] == []
    assert account["twice"] == []
    assert account["most"] <= BOUND
