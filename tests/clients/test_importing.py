"""A module is reported right after its code ran, whenever, however and in whichever thread it is imported."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import logging
import pkgutil
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from orla_lg.clients.importing import ImportHook

Watch = Callable[..., list[str]]
CODE = "class Client:\n    pass\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that modules are imported from; afterwards none of them is."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("pond"):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def watch(folder: Path) -> Iterator[Watch]:
    """Install a hook for some names; returns what it reports, as it does."""
    hooks: list[ImportHook] = []

    def install(*names: str, imported: Callable[[types.ModuleType], None] | None = None) -> list[str]:
        seen: list[str] = []

        def note(module: types.ModuleType) -> None:
            seen.append(module.__name__)
            if imported is not None:
                imported(module)

        hooks.append(ImportHook(names, note))
        hooks[-1].install()
        return seen

    before = list(sys.meta_path)
    yield install
    for hook in hooks:
        hook.remove()
    assert sys.meta_path == before, "nothing of ours stays"


def put(folder: Path, name: str, code: str = CODE) -> Path:
    """Write a module, or a package's ``__init__``."""
    file = folder / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    importlib.invalidate_caches()
    return file


def test_a_module_is_reported_when_its_code_has_run(folder: Path, watch: Watch) -> None:
    put(folder, "pond_llm")
    put(folder, "pond_other")
    found: list[type] = []
    seen = watch("pond_llm", imported=lambda module: found.append(module.Client))
    importlib.import_module("pond_other")
    assert seen == []
    module = importlib.import_module("pond_llm")
    importlib.import_module("pond_llm")
    assert seen == ["pond_llm"] and found == [module.Client]


def test_one_that_is_there_already_is_reported_at_once(folder: Path, watch: Watch) -> None:
    put(folder, "pond_llm")
    importlib.import_module("pond_llm")
    assert watch("pond_llm") == ["pond_llm"]


def test_a_module_within_packages_is_reported_by_its_whole_name(folder: Path, watch: Watch) -> None:
    # The two above it are namespaces.
    put(folder, "pond/cloud/sdk/__init__", "from pond.cloud.sdk._client import Client\n")
    put(folder, "pond/cloud/sdk/_client")
    seen = watch("pond", "pond.cloud.sdk")
    module = importlib.import_module("pond.cloud.sdk._client")
    assert seen == ["pond.cloud.sdk"], "a namespace runs no code"
    assert module.Client is sys.modules["pond.cloud.sdk"].Client


def test_nothing_of_ours_shows_on_a_module(folder: Path, watch: Watch) -> None:
    put(folder, "pond_llm", CODE + "import inspect, pkgutil\nSEEN = type(__loader__), type(__spec__.loader)\n"
        "DATA = pkgutil.get_data(__name__, 'pond_llm.py')\nSOURCE = inspect.getsource(Client)\n")  # fmt: skip
    watch("pond_llm")
    module = importlib.import_module("pond_llm")
    assert set(module.SEEN) == {SourceFileLoader}, "nor while its code runs"
    assert isinstance(module.__loader__, SourceFileLoader) and module.__spec__ is not None
    assert isinstance(module.__spec__.loader, SourceFileLoader)
    assert module.SOURCE == inspect.getsource(module.Client) == CODE
    assert pkgutil.get_data("pond_llm", "pond_llm.py") == module.DATA


def test_whoever_only_looks_for_it_gets_a_spec_that_works(folder: Path, watch: Watch) -> None:
    file = put(folder, "pond_llm")
    seen = watch("pond_llm")
    spec = importlib.util.find_spec("pond_llm")
    assert spec is not None and spec.origin == str(file) and "pond_llm" not in sys.modules and not seen
    assert spec.loader is not None
    assert spec.loader.get_filename("pond_llm") == str(file)  # type: ignore[attr-defined]
    assert spec.loader.get_source("pond_llm") == CODE  # type: ignore[attr-defined]
    assert copy.copy(spec.loader) is not None and not hasattr(spec.loader, "no_such")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert seen == ["pond_llm"], "by hand, too"


def test_a_failing_import_reports_nothing_and_fails_as_without_us(folder: Path, watch: Watch) -> None:
    put(folder, "pond_llm", "raise LookupError('no licence')\n")
    seen = watch("pond_llm", "pond_nowhere")
    with pytest.raises(LookupError, match="no licence") as raised:
        importlib.import_module("pond_llm")
    assert raised.value.__traceback__ is not None
    with pytest.raises(ModuleNotFoundError, match="pond_nowhere"):
        importlib.import_module("pond_nowhere")
    assert not seen and "pond_llm" not in sys.modules
    put(folder, "pond_llm", CODE + "# mended, and of another length: by that its cached bytecode is known as old\n")
    importlib.import_module("pond_llm")
    assert seen == ["pond_llm"]


def test_a_fault_of_the_listener_fails_no_import(
    folder: Path, watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    put(folder, "pond_llm")

    def fail(module: types.ModuleType) -> None:
        raise KeyError("an unknown version")

    with caplog.at_level(logging.WARNING, "orla_lg"):
        watch("pond_llm", imported=fail)
        assert importlib.import_module("pond_llm").Client
    assert "could not look into the module pond_llm" in caplog.text


def test_a_reload_is_reported_again(folder: Path, watch: Watch) -> None:
    put(folder, "pond_llm")
    seen = watch("pond_llm")
    module = importlib.import_module("pond_llm")
    first = module.Client
    assert importlib.reload(module) is module and module.Client is not first
    assert seen == ["pond_llm", "pond_llm"]
    assert isinstance(module.__loader__, SourceFileLoader)


def lazily(name: str) -> types.ModuleType:
    """Import as ``importlib.util.LazyLoader`` has it: the module's code runs when it is first used."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("before", [True, False])
def test_a_lazy_module_is_reported_once_it_is_used_and_stays_lazy(folder: Path, watch: Watch, before: bool) -> None:
    put(folder, "pond_llm", "import sys\nsys.pond_ran = True\n" + CODE)
    try:
        module = lazily("pond_llm") if before else None
        seen = watch("pond_llm")
        module = module or lazily("pond_llm")
        assert not hasattr(sys, "pond_ran") and not seen
        assert module.Client
        assert hasattr(sys, "pond_ran") and seen == ["pond_llm"]
    finally:
        vars(sys).pop("pond_ran", None)


def test_a_module_that_takes_another_place_is_reported_as_what_is_imported(folder: Path, watch: Watch) -> None:
    made = "import sys, types\nnew = types.ModuleType(__name__)\nnew.Client = 'the real one'\n"
    put(folder, "pond_llm", made + "sys.modules[__name__] = new\n")
    found: list[Any] = []
    watch("pond_llm", imported=lambda module: found.append(module.Client))
    assert importlib.import_module("pond_llm").Client == "the real one" and found == ["the real one"]


def test_a_module_out_of_an_archive_is_reported(folder: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(folder / "wheel.zip", "w") as archive:
        archive.writestr("pond_zipped.py", CODE)
        archive.writestr("pond_beside.py", CODE)
    monkeypatch.syspath_prepend(str(folder / "wheel.zip"))
    seen = watch("pond_zipped")
    importlib.import_module("pond_beside")
    importlib.import_module("pond_zipped")
    assert seen == ["pond_zipped"]


class Asks(MetaPathFinder):
    """Another tool's hook, which finds by asking all finders, as those of tracers do."""

    def __init__(self) -> None:
        self.busy = False
        self.ran: list[str] = []

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if self.busy or not fullname.startswith("pond"):
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.busy = False
        if spec is None or spec.loader is None:
            return spec
        inner, ran = spec.loader, self.ran

        class Chained:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def create_module(self, spec: ModuleSpec) -> Any:
                return None

            def exec_module(self, module: types.ModuleType) -> None:
                inner.exec_module(module)
                ran.append(module.__name__)

        spec.loader = Chained()  # type: ignore[assignment]
        return spec


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_another_tools_hook_and_ours_both_see_it_once(folder: Path, watch: Watch, first: str) -> None:
    put(folder, "pond_llm")
    theirs = Asks()
    if first == "ours":
        sys.meta_path.insert(0, theirs)
    seen = watch("pond_llm")
    if first == "theirs":
        sys.meta_path.insert(0, theirs)
    try:
        importlib.import_module("pond_llm")
    finally:
        sys.meta_path.remove(theirs)
    assert seen == ["pond_llm"] == theirs.ran


def test_finders_of_before_specs_are_left_alone(folder: Path, watch: Watch) -> None:
    class Old:
        pass

    put(folder, "pond_llm")
    sys.meta_path.insert(0, Old())  # type: ignore[arg-type]
    try:
        seen = watch("pond_llm")
        importlib.import_module("pond_llm")
    finally:
        sys.meta_path[:] = [each for each in sys.meta_path if not isinstance(each, Old)]
    assert seen == ["pond_llm"]


def test_any_thread_may_import(folder: Path, watch: Watch) -> None:
    for number in range(8):
        put(folder, f"pond_{number}")
    threads_seen: list[tuple[str, int]] = []
    names = [f"pond_{number}" for number in range(8)]
    watch(*names, imported=lambda module: threads_seen.append((module.__name__, threading.get_ident())))
    started = threading.Barrier(16)

    def work(name: str) -> None:
        started.wait()
        assert importlib.import_module(name).Client

    threads = [threading.Thread(target=work, args=(name,)) for name in names * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(name for name, _ in threads_seen) == names, "each once, by whichever thread ran its code"


def test_an_import_under_way_is_waited_for(folder: Path, watch: Watch) -> None:
    gate, running = threading.Event(), threading.Event()
    sys.pond_gate, sys.pond_running = gate, running  # type: ignore[attr-defined]
    put(folder, "pond_llm", "import sys\nsys.pond_running.set()\nsys.pond_gate.wait(10)\n" + CODE)
    try:
        importing = threading.Thread(target=importlib.import_module, args=("pond_llm",))
        importing.start()
        assert running.wait(10)
        threading.Timer(0.05, gate.set).start()
        found: list[Any] = []
        watch("pond_llm", imported=lambda module: found.append(module.Client))
        importing.join(10)
        assert found and set(found) == {sys.modules["pond_llm"].Client}, "whole, and not as far as it was"
    finally:
        del sys.pond_gate, sys.pond_running  # type: ignore[attr-defined]


def test_after_its_end_nothing_is_reported(folder: Path) -> None:
    put(folder, "pond_llm")
    put(folder, "pond_later")
    seen: list[str] = []
    hook = ImportHook(["pond_llm", "pond_later"], lambda module: seen.append(module.__name__))
    hook.install()
    hook.install()
    assert sys.meta_path.count(hook) == 1
    lazy = lazily("pond_later")
    hook.remove()
    hook.remove()
    importlib.import_module("pond_llm")
    assert lazy.Client and not seen
    hook.install()
    hook.remove()
    assert sorted(seen) == ["pond_later", "pond_llm"], "installed again, it finds what came meanwhile"
