"""Real engines: started here or running already, their tokens, and their cache made empty."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Self

import httpx

from bench.lib.command import ROOT, tell
from orla_lg.engines import EngineOptions, running_engine
from orla_lg.openai_api.metrics import samples
from orla_lg_llamacpp.embedded import free_port
from orla_lg_llamacpp.model import ensure_model

LLAMACPP, VLLM_CPU = "llamacpp", "vllm"
FLUSH_TRIES, FLUSH_PAUSE_S = 20, 0.25
"""A call that ended a moment ago may still hold blocks, and vLLM then flushes nothing."""

Message = dict[str, str]


def cuts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Return where pieces of these sizes begin and end."""
    return pairwise([sum(sizes[:n]) for n in range(len(sizes) + 1)])


class Engine:
    """An engine beside its chat API; each kind has ``prompt``, a chat's tokens, and ``empty_cache``."""

    block_tokens = 1
    """What is cached together or not at all."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        # Not through a proxy that the environment names: engines are near.
        self._http = httpx.Client(base_url=self.url.removesuffix("/v1"), timeout=60, trust_env=False)
        self.model = str(self._asked("GET", "/v1/models")["data"][0]["id"])

    @property
    def has_plugin(self) -> bool:
        """Whether the engine hears of workflows, where that takes a plugin."""
        return True

    def _asked(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, json=body if method == "POST" else None)
            return dict(answer.raise_for_status().json())
        except (httpx.HTTPError, ValueError) as error:
            raise SystemExit(f"{self.url}: {method} {path}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()


class VLLM(Engine):
    """One vLLM server in its development mode."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        pools = [labels for labels, _ in samples(self._http.get("/metrics").text, "vllm:cache_config_info")]
        if len(pools) != 1:
            raise SystemExit(f"{self.url} shows {len(pools)} KV caches in its metrics; a vLLM with one is needed")
        self.blocks, self.block_tokens = (int(pools[0][name]) for name in ("num_gpu_blocks", "block_size"))

    @property
    def has_plugin(self) -> bool:
        answer = self._http.post("/v1/orla/kv/stat", json={})
        return answer.is_success and answer.json().get("effect") == "stat"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._tokens(messages=messages, add_generation_prompt=True)

    def split(self, text: str, sizes: Sequence[int]) -> list[str] | None:
        """Return consecutive pieces of *text* of so many tokens; ``None`` where it has fewer."""
        tokens = self._tokens(prompt=text, add_special_tokens=False)
        if sum(sizes) > len(tokens):
            return None
        pieces = [self._asked("POST", "/detokenize", model=self.model, tokens=tokens[a:b]) for a, b in cuts(sizes)]
        return [str(piece["prompt"]) for piece in pieces]

    def empty_cache(self) -> None:
        for _ in range(FLUSH_TRIES):
            answer = self._http.post("/reset_prefix_cache")
            if answer.is_success and answer.json().get("success") is True:
                return
            time.sleep(FLUSH_PAUSE_S)
        raise SystemExit(
            f"{self.url} did not empty its prefix cache (status {answer.status_code}: {answer.text[:200]!r}); "
            "start it with VLLM_SERVER_DEV_MODE=1 and let nothing else use it"
        )

    def _tokens(self, **asked: Any) -> list[int]:
        return list(self._asked("POST", "/tokenize", model=self.model, **asked)["tokens"])


class Llama(Engine):
    """llama.cpp's server."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.slots = int(self._asked("GET", "/props")["total_slots"])

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        text = self._asked("POST", "/apply-template", messages=list(messages))["prompt"]
        return list(self._asked("POST", "/tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def empty_cache(self) -> None:
        for slot in range(self.slots):
            self._asked("POST", f"/slots/{slot}?action=erase")


@contextlib.contextmanager
def engine_at(options: EngineOptions, url: str | None = None) -> Iterator[Any]:
    """Give the engine at *url*, else one of our own with these options, ended afterwards."""
    with contextlib.ExitStack() as stack:
        if url is None:
            tell(f"starting {options.engine}", last=True)
            url = stack.enter_context(running_engine(options)).url
        yield stack.enter_context(Llama(url) if options.engine == LLAMACPP else VLLM(url))


def child(*words: str) -> tuple[subprocess.Popen[str], str]:
    """Start an engine in a Python of its own, which ends with its standard input; return it and the URL it prints."""
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,  # Ctrl-C is for the benchmark, which ends its engine
    )  # fmt: skip
    assert process.stdout is not None
    if not (url := process.stdout.readline().strip()):
        raise SystemExit(f"an engine did not start with {words}")
    return process, url


@contextlib.contextmanager
def started(module: str, *options: str) -> Iterator[str]:
    """Run a module that serves as a process of its own, and give its URL."""
    process, url = child("-m", module, *options)
    with process:
        try:
            yield url
        finally:
            process.terminate()


# A llama.cpp with flags that Orla's own engines do not have
SERVE = """
import json, sys
said = json.loads(sys.argv[1])
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = said["path"], {said["model"]}
params.hostnames, params.port, params.verbosity = ["127.0.0.1"], said["port"], 0
params.n_parallel, params.n_ctx = said["slots"], said["slots"] * said["context"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = said["threads"]
params.fit_params = params.ui = False
params.use_jinja = params.endpoint_slots = params.endpoint_props = True
params.cache_ram_mib = said["cache_ram"]
if said["save"]:
    params.slot_save_path, params.cache_idle_slots = said["save"], False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


class LlamaProcess:
    """A llama.cpp in a process of its own; *cache_ram* is MiB beside the slots (-1: without end), *save* a folder."""

    model = "smollm2"

    def __init__(self, *, slots: int, context: int, threads: int, port: int, cache_ram: int, save: str) -> None:
        self._said = {
            "path": str(ensure_model()), "model": self.model, "port": port or free_port(), "slots": slots,
            "context": context, "threads": threads, "cache_ram": cache_ram, "save": save,
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        self.process, address = child("-c", SERVE, json.dumps(self._said))
        self.url = f"{address}/v1"

    def end(self) -> None:
        with self.process:
            self.process.kill()

    def restart(self) -> None:
        self.end()
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()
