"""Configurations with mistakes of every kind: each is read, or a ``ConfigError`` that names file and key.

ORLA_CONFIG_FILES=20000 pytest tests/test_config_fuzz.py     a deep run, about five minutes
"""

from __future__ import annotations

import copy
import gc
import inspect
import os
import random
import resource
import string
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orla_lg import Backend, Cost, Limit, Limits, Orla
from orla_lg.core.policies import Fair, Priority
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.errors import ConfigError, MappingError, shown
from orla_lg.mappers.cost_quality import CostQualityMapper
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.need import NeedMapper
from orla_lg.mappers.table import StageTable

FILES = int(os.environ.get("ORLA_CONFIG_FILES", "300"))
SEED = int(os.environ.get("ORLA_CONFIG_SEED", "12"))
AT_ONCE = 50
"""Files between two looks at threads and descriptors."""

PATIENCE_S, MEMORY_KIB = 5.0, 200_000
DESCRIPTORS = Path("/proc/self/fd")
KEY = "sk-of-the-backend-0123456789"

VALID: dict[str, Any] = {
    "stage_policy": {"light": "priority", "*": "workflow_fcfs"},
    "request_policy": "fcfs",
    "memory": "default",
    "admission": True,
    "keep_records": 100,
    "load_aware": True,
    "warm_up": True,
    "untranslatable": "error",
    "records_file": "records.jsonl",
    "estimates_file": "estimates.json",
    "control": "door.sock",
    "backends": {
        "light": {
            "url": "http://127.0.0.1:9/v1", "model": "small", "engine": "llamacpp", "api_key_env": "FUZZ_KEY",
            "aliases": ["a", "b"], "max_concurrency": 4, "capacity": 100, "quality": 0.5, "max_saved": 8,
            "cost": {"input_per_mtoken": 0.1, "output_per_mtoken": 0.2, "cached_input_per_mtoken": 0.01},
        },
        "heavy": {
            "url": "https://[::1]:8443/v1", "engine": "vllm", "admin_key_env": "FUZZ_KEY",
        },
    },
    "mapping": {
        "classify": {"to": ["light", "heavy"], "temperature": 0, "max_tokens": 5, "extra_body": {"top_k": 1}},
        "tool": {"needs": ["tools", "context>16k"], "prefer": "cheapest", "stop": ["x"], "seed": 1},
        "a|b": "light",
        "*": ["heavy", "light"],
    },
    "variants": {"cheap": {"*": "light"}},
    "tags": {"team": "red", "app": "desk"},
    "policies": [
        {"name": "a", "subjects": ["team:*", "[r-z]?d"], "resources": ["tool:\\*"], "action": "deny"},
        {"name": "b", "subjects": ["*"], "resources": ["data:pii", "skill:x"]},
    ],
    "stages": {"intake": {"labels": ["pii"], "declassifies": ["secret"]}},
    "limits": {
        "run": {"calls": 50, "wall_s": 120.0},
        "stages": {"classify": {"tokens": 1000}},
        "tenants": {"*": {"cost_usd": 1.5, "per_s": 3600}},
    },
    "serve": {
        "listen_address": "127.0.0.1:8081", "names": ["orla.example"], "store": "serve.db", "behind_proxy": False,
        "tls_cert": "cert.pem", "tls_key": "key.pem", "core_lease_s": 1.5, "replica_lease_s": 10, "drain_s": 0.5,
        "max_body_bytes": 4096, "body_timeout_s": 2.5,
        "gateway": {
            "session_headers": ["x-session-id"], "session_fields": ["program_id"], "session_idle_s": 60,
            "max_sessions": 10, "answer_timeout_s": 60, "max_attempts": 2,
        },
    },
}  # fmt: skip

NUMBERS = [
    0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 10**30, 16**5000, -(2**63), 0.5, -0.0, 1e308, -1e308, 1e-320,
    float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "\0", "a\0b", "\n", "a\r\nb", "\x7f", "\u2028", "é", "\U0001f980", "x" * 300, "x" * 100_000,
    "~nosuchuser/x", "/", ".", "..", "/dev/null/x", "/proc/self/mem", "~", "*", "auto", "light", "nan", "1", "true",
    "0x10", "-5", "{}", "[]", "%s%n", "${FUZZ_KEY}", "context>1..2", "context>.", "context>" + "9" * 400,
    "quality>=0.5k", "context>", "toolz", "backend:[", "data:x\\", "[^", "tool:" + "a*" * 200, "deny", "team:red",
    "workflow_fcfs", "fair", "openai", "sim", "none", "FUZZ_KEY", "FUZZ_BAD_KEY", "A=B",
]  # fmt: skip
URLS = [
    "http://", "http:///v1", "http:// /v1", "http://h:99999/v1", "http://h:-1/v1", "http://h:x/v1", "http://h:0/v1", "http://h:/v1",
    "http://[::1", "http://::1/v1", "http://[zz]/v1", "http://[::1]x/v1", "http://user:SECRET-WORD@h/v1",
    "http://SECRET-WORD@h/v1", "http://:SECRET-WORD@[::1/v1", "ftp://h/v1", "//h/v1", "h:80", "http://a..b/v1",
    "http://" + "a" * 70 + "/v1", "http://h\u2100/v1", "http://h/\n", "http://h /v1", "http://ｈ/v1", "http://h%00/v1",
    "http://h/v1?x=1#y", "http://" + "h." * 40_000 + "/v1", "HTTP://H/V1", "http:/h", "tcp://h:1", "tcp://*:1", "tcp://h:x",
    "tcp://[::1", "ipc://", "ipc:///a\0b", "ipc://*", "http://\u00df.de/v1", "http://xn--a/v1", "http://-/v1", "http://1.2.3.4.5:80/v1",
]  # fmt: skip
SHAPES: list[Any] = [
    True, False, [], {}, [[]], [{}], {"": 1}, {"a": {"b": {"c": {}}}}, [1, "a", True], {"*": 1}, {"to": []},
    {"needs": "tools"}, {"needs": ["tools", 3]}, {"needs": [], "prefer": "x"}, {"needs": {"a": 1}}, {"prefer": 3},
    {"to": "light"}, {"to": "light", "needs": "tools"}, {"calls": 1, "per_s": 0}, {"wall_s": 1, "per_s": 1},
    {"per_s": 1}, ["light"] * 1000, ["light"], ["heavy", "light"],
]  # fmt: skip
RAW = [
    "1979-05-27T07:32:00Z",
    "07:32:00",
    "1979-05-27",
    "0xdeadbeef",
    "0b1",
    "1_000",
    "1__0",
    "+5",
    "'''\n'''",
    "=",
    "]",
    '"\\ud800"',
]
"""As it stands in the file; some of it is no TOML."""


class Raw(str):
    """What stands in the file as it is."""


def toml(value: Any) -> str:
    """Return *value* as an inline value of TOML."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if value.bit_length() < 1000 else hex(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return "{" + ", ".join(f"{quoted(key)} = {toml(each)}" for key, each in value.items()) + "}"


def quoted(text: str) -> str:
    special = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(special.get(c, f"\\u{ord(c):04x}" if c < " " or c == "\x7f" else c) for c in text) + '"'


def written(tree: dict[str, Any]) -> str:
    return "".join(f"{quoted(key)} = {toml(value)}\n" for key, value in tree.items())


def places(tree: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key in tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield (*above, key)
        yield from places(tree[key], (*above, key))


def some_value(dice: random.Random) -> Any:
    kind = dice.randrange(6)
    if kind == 0:
        return dice.choice(NUMBERS)
    if kind == 1:
        return dice.choice(TEXTS)
    if kind == 2:
        return dice.choice(URLS)
    if kind == 3:
        return Raw(dice.choice(RAW))
    if kind == 4:
        planes = ((0, 128), (0, 0xD800), (0xE000, 0x110000))
        return "".join(chr(dice.randrange(*dice.choice(planes))) for _ in range(dice.randrange(12)))
    return copy.deepcopy(dice.choice(SHAPES))


def inside(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def mutated(dice: random.Random) -> tuple[bytes, set[str]]:
    """Return a file, and words of which a message about its mistakes has one."""
    tree, touched = copy.deepcopy(VALID), set[str]()
    for _ in range(dice.choice((1, 1, 1, 1, 1, 1, 2, 3))):
        place = dice.choice(list(places(tree)) or [("backends",)])
        touched |= {str(part) for part in place}
        table, key = inside(tree, place[:-1]), place[-1]
        change = dice.randrange(10)
        if change == 0 and key in (table if isinstance(table, dict) else range(len(table))):
            del table[key]
        elif change == 1 and isinstance(table, dict):
            name = dice.choice([*TEXTS, *string.ascii_lowercase, str(key)[:-1], str(key) + "s", str(key).upper()])
            touched |= {name[:20], repr(name)[1:20]}
            table[name] = some_value(dice)
        elif change == 2 and isinstance(table, dict):
            name = dice.choice([key, *TEXTS])
            touched |= {name[:20], repr(name)[1:20]}
            table[name] = table.pop(key)
        elif change == 3:
            other = dice.choice(list(places(VALID)))
            table[key] = copy.deepcopy(inside(VALID, other))
        elif change == 4:
            table[key] = [table[key]] if dice.randrange(2) else {str(key): table[key]}
        else:
            table[key] = some_value(dice)
    text = written(tree).encode("utf-8", "surrogatepass")
    broken = damaged(text, dice)
    return broken, touched if broken == text else {""}


def damaged(text: bytes, dice: random.Random) -> bytes:
    """Return *text* as it is, or as no editor would have left it."""
    damage = dice.randrange(40)
    if damage == 0:
        at = dice.randrange(len(text))
        return text[:at] + bytes([dice.randrange(256)]) + text[at + dice.randrange(3) :]
    if damage == 1:
        return text[: dice.randrange(len(text))]
    if damage == 2:
        return b"\xef\xbb\xbf" + text
    if damage == 3:
        return text.decode("utf-8", "replace").encode("utf-16")
    if damage == 4:
        depth = dice.choice((10, 900, 100_000))
        return text + b"deep = " + b"[" * depth + b"]" * depth
    if damage == 5:
        return text + b"[" + b".".join([b"a"] * dice.choice((10, 5000))) + b"]\nb = 1\n"
    if damage == 6:
        return text + text.split(b"\n")[0] + b"\n"
    return text


ELSEWHERE = ("not valid TOML", "nested", "load_aware", "does not exist")
"""What a mistake is called that shows at another place than it was made: a backend that is gone from its mapping."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUZZ_KEY", KEY)
    monkeypatch.setenv("FUZZ_BAD_KEY", KEY + "\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    return tmp_path / "a"


def attempt(file: Path) -> Exception | None:
    """Build and close an ``Orla``; return what it raised."""
    try:
        Orla.from_config(file).close()
    except Exception as error:
        return error
    return None


def held() -> tuple[int, int]:
    """Return how many threads and descriptors there are."""
    gc.collect()
    return threading.active_count(), len(list(DESCRIPTORS.iterdir())) if DESCRIPTORS.exists() else 0


def left_behind(at_first: tuple[int, int]) -> tuple[int, int] | None:
    """Return what is held where that is more than at first, and stays so."""
    until = time.monotonic() + PATIENCE_S
    while any(now > before for now, before in zip(held(), at_first, strict=True)):
        if time.monotonic() > until:
            return held()
        time.sleep(0.01)
    return None


def check(text: bytes, touched: set[str], error: Exception | None) -> str | None:
    """Return what is wrong with how a file was taken."""
    if error is None:
        return None
    said = str(error)
    if not isinstance(error, ConfigError | MappingError):
        return f"{type(error).__name__}: {said[:300]}"
    if "orla.toml" not in said:
        return f"no file: {said[:300]}"
    if not any(word in said for word in (*touched, *ELSEWHERE)):
        return f"no key of {sorted(touched)[:5]}: {said[:300]}"
    if KEY in said or "SECRET-WORD" in said:
        return f"it shows a key: {said[:500]}"
    if len(said) > 20_000:
        return f"it has {len(said)} characters: {said[:300]}"
    return None


def test_every_mistake_is_named(folder: Path) -> None:
    dice, file, wrong = random.Random(SEED), folder / "orla.toml", []
    file.write_text(written(VALID))
    assert attempt(file) is None
    at_first, taken, slowest = held(), 0, 0.0
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(FILES):
        text, touched = mutated(dice)
        file.write_bytes(text)
        began = time.monotonic()
        error = attempt(file)
        slowest = max(slowest, time.monotonic() - began)
        taken += error is None
        if fault := check(text, touched, error):
            wrong.append(f"{number}: {fault}\n    {text[:2000]!r}")
        if number % AT_ONCE == 0 and (left := left_behind(at_first)):
            wrong.append(f"{number}: left behind: {at_first} became {left}")
    print(f"{FILES} files: {taken} read, {FILES - taken} refused by name, slowest {slowest:.2f} s")
    assert not wrong, f"{len(wrong)} of {FILES} files, such as:\n" + "\n".join(wrong[:10])
    assert slowest < PATIENCE_S
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib < MEMORY_KIB
    assert FILES / 20 < taken < FILES * 0.8, "mistakes and what is none are both among them"


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("not even this")


OBJECTS: list[Any] = [
    None, Odd(), Odd, object(), b"bytes", "\ud800", 3 + 4j, range(3), {1: 2}, {None: None}, (), ("light",),
    lambda: None, *NUMBERS, *TEXTS, *URLS, *SHAPES,
]  # fmt: skip
URL = "http://127.0.0.1:9/v1"
BACKENDS = [Backend("light", URL), Backend("heavy", URL)]


def an_orla(**settings: Any) -> None:
    Orla(**{"backends": BACKENDS, **settings}).close()


MADE: list[tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]] = [
    (Backend, {"name": "light", "url": URL}, tuple(inspect.signature(Backend).parameters)),
    (Cost, {}, tuple(inspect.signature(Cost).parameters)),
    (Limit, {}, tuple(inspect.signature(Limit).parameters)),
    (Limits, {}, tuple(inspect.signature(Limits).parameters)),
    (Limits.of, {}, ("given",)),
    (WarmUp, {}, tuple(inspect.signature(WarmUp).parameters)),
    (NeedMapper, {}, ("needs", "prefer")),
    (StageTable, {}, ("table",)),
    (LoadAware, {"inner": {"*": "light"}}, ("inner", "margin")),
    (CostQualityMapper, {}, ("target", "stages", "default", "budget_usd")),
    (Priority, {}, ("ageing_s",)),
    (Fair, {}, ("weights",)),
    (an_orla, {}, tuple(name for name in inspect.signature(Orla).parameters if name != "admission")),
]


@pytest.mark.parametrize(("make", "right", "names"), MADE, ids=lambda each: getattr(each, "__qualname__", ""))
def test_every_wrong_argument_is_named(
    make: Callable[..., Any], right: dict[str, Any], names: tuple[str, ...], folder: Path
) -> None:
    wrong = []
    for name in names:
        for value in OBJECTS[:: 12 if make is an_orla else 1]:
            try:
                make(**{**right, name: value})
            except (ConfigError, MappingError) as error:
                if len(str(error)) > 20_000 or "SECRET-WORD" in str(error):
                    wrong.append(f"{name}={shown(value)}: {error}")
            except Exception as error:
                wrong.append(f"{name}={shown(value)}: {error!r:.200}")
    assert not wrong, "\n".join(wrong)
