from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from orla_lg import Backend, Orla, config
from orla_lg.core.engine.backend import Cost
from orla_lg.core.policies import NAMES, EarliestDeadline, Fair, ShortestJob, WorkflowFcfs
from orla_lg.errors import ConfigError, MappingError
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.need import NeedMapper
from orla_lg.mappers.table import tables_of

WHOLE = """
stage_policy = "priority"
keep_records = 5
admission = false
untranslatable = "error"
[backends.light]
url = "http://127.0.0.1:1/v1"
api_key_env = "MY_KEY"
aliases = ["gpt"]
[backends.light.cost]
input_per_mtoken = 1.5
[mapping]
node = ["light"]
"*" = "light"
"""


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "orla.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_a_file_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    settings = config.load(write(tmp_path, WHOLE))
    (backend,) = settings.backends
    assert (backend.name, backend.api_key, backend.aliases) == ("light", "secret", ("gpt",))
    assert backend.cost == Cost(1.5) and settings.mapping == {"node": ["light"], "*": "light"}
    assert (settings.stage_policy, settings.request_policy, settings.keep_records) == ("priority", None, 5)
    assert not settings.admission
    with Orla.from_settings(settings) as orla:
        assert not orla.core.serving.schedulers["light"].cache.admission.holds
        assert orla.core.untranslatable == "error"


URL = 'url = "http://127.0.0.1:1/v1"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "backends: missing"),
        ("backends = {}", "backends: missing; at least one"),
        ("[backends.b]", "backends.b.url: missing"),
        (f"[backends.b]\n{URL}\nmodl = 'm'", "backends.b.modl: unknown key; did you mean 'model'"),
        (f"[backends.cost]\n{URL}\nmodl = 'm'", "did you mean 'model'"),
        (f"[backends.b]\n{URL}\ncost = {{input = 1}}", "backends.b.cost.input: unknown key.*input_per_mtoken"),
        (
            f"tools_safe = ['search']\n[backends.b]\n{URL}",
            r"tools_safe: it is no key of a configuration; it belongs to the graph: orla\.wrap\(graph, tools_safe=",
        ),
        (
            f"[backends.b]\n{URL}\nsplit_prompts = true",
            r"backends\.b\.split_prompts: .*orla\.wrap\(graph, split_prompts=",
        ),
        (f"stagepolicy = 'x'\n[backends.b]\n{URL}", "stagepolicy: unknown key; did you mean 'stage_policy'"),
        (
            f"stage_policy = 'prio'\n[backends.b]\n{URL}",
            "stage_policy: found 'prio'.*did you mean 'priority'",
        ),
        (
            f"policy = {{b = 'edf'}}\n[backends.b]\n{URL}",
            "policy: found .*by backend is stage_policy, by stage request",
        ),
        (f"stage_policy = 3\n[backends.b]\n{URL}", "stage_policy: found 3; .*it must be the name of a policy"),
        (
            f"request_policy = {{a = 'x'}}\n[backends.b]\n{URL}",
            r"request_policy: found \{'a': 'x'\}; unknown scheduling policy 'x'",
        ),
        (
            f"request_policy = {{a = 1}}\n[backends.b]\n{URL}",
            "request_policy: .*a must be the name",
        ),
        (f"memory = 'x'\n[backends.b]\n{URL}", "memory: found 'x'; unknown memory policy 'x'"),
        (f"untranslatable = 'drop'\n[backends.b]\n{URL}", "untranslatable: found 'drop'; .*'external' or 'error'"),
        (f"[backends.b]\n{URL}\napi_key_env = 'NOT_SET'", "backends.b.api_key_env.*'NOT_SET' is not set"),
        ("[backends.b]\nurl = 'x'", "backend 'b': url 'x' is not http"),
        ("[backends\nx", r"not valid TOML.*line 1"),
        ("stage_policy = priority", r'line 1, column 16.*a text stands in quotes: stage_policy = "priority"$'),
        ("a = 1\nurl = http://host:1/v1 # it", 'quotes: url = "http://host:1/v1"$'),
        ("[mapping]\nx = [light, 'heavy']", r'quotes: x = \["light"$'),
        ("c = { a = light }", r'quotes: c = \{ a = "light"$'),
        ("admission = True", "TOML writes admission = true"),
        ("control = None", "TOML has no None; leave the key out"),
        (b"\xff", "not valid TOML"),
    ],
)
def test_every_fault_names_file_and_key(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)orla.toml.*{message}") as raised:
        config.load(write(tmp_path, text))
    assert "Value error" not in str(raised.value), "that is how pydantic puts it"


FOUR_FAULTS = {
    "an unknown key": ("capacty = 3", "[backends.b]", "backends.b.capacty: unknown key; did you mean 'capacity'"),
    "a value out of bounds": ("quality = 3", "[backends.c]", "backends.c.quality: found 3"),
    "an unknown engine": (
        'engine = "lamacpp"',
        "[backends.d]",
        "backend 'd': unknown engine 'lamacpp'; did you mean",
    ),
    "a key that is not set": ('api_key_env = "NOT_SET"', "[backends.e]", "variable 'NOT_SET' is not set"),
    "a url that is none": ('url = "ftp://x"', "[backends.f]", "backend 'f': url 'ftp://x' is not http"),
    "another that none takes": ('url = "http://h:1/\\u00a0 x"', "[backends.g]", "backend 'g': url"),
    "no backend": (
        'draft = "lihgt"',
        "[mapping]",
        "stage 'draft' is mapped to backend 'lihgt', which does not exist",
    ),
    "another": ('reply = ["b", "hevy"]', "[mapping]", "stage 'reply' is mapped to backend 'hevy'"),
    "an entry that is none": ("polish = 3", "[mapping]", "mapping of stage 'polish': expected a backend's name"),
    "a parameter": ('route = { to = "b", top_p = 7 }', "[mapping]", "top_p must be a number from 0 to 1"),
    "a variant": ('x = "nowhere"', "[variants.cheap]", "variant 'cheap': stage 'x' is mapped to backend 'nowhere'"),
    "a variant's entry": ("y = 3", "[variants.cheap]", "variants.cheap: mapping of stage 'y'"),
    "a policy": ('stage_policy = "prio"', "", "stage_policy: found 'prio'"),
    "a limit": ("calls = -1", "[limits.run]", "calls must be a whole number of at least 0"),
    "another limit": (
        "x = { call = 3 }",
        "[limits.stages]",
        "limits.stages.x.call: unknown key; did you mean 'calls'",
    ),
    "a file": ('records_file = "http://x"', "", "records_file: 'http://x' is no path"),
}


def file_of(lines: Iterable[tuple[str, str]]) -> str:
    """Return a file with these lines in their tables, and a backend that is right for each table that needs a URL."""
    tables: dict[str, list[str]] = {"": [], "[backends.b]": []}
    for line, table in lines:
        tables.setdefault(table, []).append(line)
    for table, inside in tables.items():
        if table.startswith("[backends") and not any(line.startswith("url") for line in inside):
            inside.append(URL)
    return "\n".join("\n".join((table, *inside)) for table, inside in tables.items())


@pytest.mark.parametrize("first", range(0, len(FOUR_FAULTS), 2))
def test_all_faults_are_named_at_once(tmp_path: Path, first: int) -> None:
    faults = list(FOUR_FAULTS.values())
    four = [faults[(first + nth * 3) % len(faults)] for nth in range(4)]
    file = write(tmp_path, file_of((line, table) for line, table, _ in four))
    with pytest.raises((ConfigError, MappingError)) as raised:
        Orla.from_config(file)
    message = str(raised.value)
    assert [said for _, _, said in four if said not in message] == []
    assert message.count("\n  - ") == 4, message


def test_each_fault_alone_is_one_line(tmp_path: Path) -> None:
    for line, table, said in FOUR_FAULTS.values():
        with pytest.raises((ConfigError, MappingError)) as raised:
            Orla.from_config(write(tmp_path, file_of([(line, table)])))
        message = str(raised.value)
        assert said in message and message.startswith(str(tmp_path / "orla.toml: ")) and "\n" not in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "orla.toml")


def test_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORLA_CONFIG", "ORLA_URL", "ORLA_MODEL", "ORLA_ENGINE", "ORLA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    with pytest.raises(ConfigError, match="no configuration"):
        config.find()
    monkeypatch.setenv("ORLA_URL", "nonsense")
    with pytest.raises(ConfigError, match="environment: backend 'default': url 'nonsense'"):
        config.find()
    monkeypatch.setenv("ORLA_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("ORLA_MODEL", "m")
    assert (config.find().backends[0].model, config.find().source) == ("m", "the environment")
    write(tmp_path, f"[backends.above]\n{URL}")
    assert config.find().backends[0].name == "above"
    named = tmp_path / "other.toml"
    named.write_text(f"[backends.named]\n{URL}")
    monkeypatch.setenv("ORLA_CONFIG", str(named))
    assert config.find().backends[0].name == "named"


@pytest.mark.parametrize(("said", "off"), [("1", True), ("yes", True), ("", False), ("0", False), ("False", False)])
def test_stepping_aside(monkeypatch: pytest.MonkeyPatch, said: str, off: bool) -> None:
    monkeypatch.setenv("ORLA_DISABLED", said)
    assert config.disabled() is off


MAPPED = f"""
load_aware = true
records_file = "logs/r.jsonl"
[backends.light]
{URL}
[backends.heavy]
{URL}
[mapping]
classify = {{to = ["light", "heavy"], temperature = 0, max_tokens = 5}}
"sub|tools" = {{needs = ["tools", "context>16k"], prefer = "cheapest"}}
"*" = ["heavy", "light"]
[variants.cheap]
"*" = "light"
"""


def test_tables_variants_and_load_awareness(tmp_path: Path) -> None:
    file = write(tmp_path, MAPPED)
    settings = config.load(file)
    assert settings.load_aware and settings.records_file == tmp_path / "logs" / "r.jsonl"
    with Orla.from_config(file) as orla:
        serving = orla.core.serving
        assert isinstance(serving.mappings.shared, LoadAware) and isinstance(
            serving.mappings.variants["cheap"], LoadAware
        )
        (table,) = tables_of(serving.mappings.shared)
        assert table.rules["classify"].to == ("light", "heavy")
        assert table.rules["classify"].parameters == {"temperature": 0, "max_tokens": 5}
        assert isinstance(table.rules["sub|tools"].mapper, NeedMapper)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ("[mapping]\na = 3", "mapping of stage 'a': expected a backend's name or a list of names, got 3"),
        ("[mapping]\na = {to = 'b', temprature = 1}", "mapping of stage 'a': unknown key 'temprature'; did you mean"),
        ("[mapping]\na = {needs = 'toolz'}", "mapping of stage 'a': need 'toolz' is unknown"),
        ("[mapping]\na = {to = 'b', temperature = 'x'}", "mapping of stage 'a': temperature must be a number"),
        ("[variants.v]\na = {}", "variants.v: mapping of stage 'a': give either"),
        ("[variants]\nv = 'b'", "variants.v: found 'b'"),
    ],
)
def test_every_fault_in_a_mapping_names_file_and_key(tmp_path: Path, mapping: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)orla.toml.*{message}"):
        config.load(write(tmp_path, f"[backends.b]\n{URL}\n{mapping}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"load_aware = true\n[backends.b]\n{URL}", "load_aware: there is no .mapping."),
        (f"records_file = ''\n[backends.b]\n{URL}", "records_file: found ''"),
    ],
)
def test_faults_of_what_stands_beside_it(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s)orla.toml.*{message}"):
        config.load(write(tmp_path, text))


def test_policies_by_backend_and_by_stage(tmp_path: Path) -> None:
    said = "stage_policy = {b = 'edf', '*' = 'fair'}\nrequest_policy = {ask = 'sjf'}\n"
    with Orla.from_config(write(tmp_path, f"{said}[backends.b]\n{URL}\n[backends.c]\n{URL}")) as orla:
        ordered = {name: scheduler.queue.policies for name, scheduler in orla.core.serving.schedulers.items()}
    assert isinstance(ordered["b"].stage, EarliestDeadline) and isinstance(ordered["c"].stage, Fair)
    assert isinstance(ordered["b"].of("ask"), ShortestJob) and isinstance(ordered["b"].of("reply"), WorkflowFcfs)


def test_every_policy_may_be_named(tmp_path: Path) -> None:
    for name in NAMES:
        assert config.load(write(tmp_path, f"stage_policy = {name!r}\n[backends.b]\n{URL}")).stage_policy == name


def test_a_policy_for_a_backend_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"orla.toml: stage_policy: backend 'c' does not exist"):
        Orla.from_config(write(tmp_path, f"stage_policy = {{c = 'fcfs'}}\n[backends.b]\n{URL}"))


def test_estimates_lie_beside_the_configuration(tmp_path: Path) -> None:
    file = write(tmp_path, f"estimates_file = 'learned.json'\n[backends.b]\n{URL}")
    assert config.load(file).estimates_file == tmp_path / "learned.json"
    (tmp_path / "learned.json").mkdir()
    with pytest.raises(ConfigError, match=r"orla.toml: .*learned.json' cannot be read: Is a directory"):
        Orla.from_config(file)


def test_a_variant_that_names_no_backend_is_told_with_its_file(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match=r"orla.toml: variant 'v': stage 'a' is mapped to backend 'c'"):
        Orla.from_config(write(tmp_path, f"[backends.b]\n{URL}\n[variants.v]\na = 'c'"))


def test_a_url_is_the_base_of_all_paths() -> None:
    with pytest.raises(ConfigError, match=r"url is the base of all paths, here 'http://127\.0\.0\.1:1/v1'"):
        Orla([Backend("b", "http://127.0.0.1:1/v1/chat/completions")])
