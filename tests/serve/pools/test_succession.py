"""Servers of one pool follow one another: what stands in the directory of them, and what replicas hear of it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg import Orla
from orla_lg.link.messages import CORES_HEADER, PATH
from orla_lg.link.places import CORES, CorePlace
from orla_lg.link.whereabouts import here
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.ending import EXIT_REPLACED
from orla_lg.serve.http.health import CoreState
from orla_lg.serve.pools import succession
from orla_lg.serve.pools.directory import Directory
from orla_lg.serve.store.store import MemoryStore, StoreUnavailable
from tests.serve.in_thread import Running, server
from tests.serve.test_server import CALL, UPGRADE, key, until
from tests.stub_engine import StubEngine

CONFIG = '[backends.light]\nurl = "{url}"\n[mapping]\n"*" = "light"\n[serve]\n'


@pytest.fixture
def file(tmp_path: Path, engine: StubEngine) -> Path:
    made = tmp_path / "orla.toml"
    made.write_text(CONFIG.format(url=engine.url))
    return made


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(succession, "BEAT_S", 0.05)
    monkeypatch.setattr(succession, "SILENT_S", 0.4)


def is_ready(running: Running) -> Callable[[], bool]:
    return lambda: running.server.state is CoreState.READY


def test_the_directory_has_the_core_and_its_standbys(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    store, meant = MemoryStore(), file.with_name("standby.toml")
    meant.write_text(f"{file.read_text()}standby = true\n")
    directory = Directory(store)
    with server(file, store=store) as first:
        until(is_ready(first))
        until(lambda: directory.cores())
        core = directory.cores()[""]
        assert (core.urls, core.epoch, core.backends, core.pid) == ((first.url,), 1, ("light",), os.getpid())
        assert not directory.standbys("")
        with server(file, store=store) as second, server(meant, store=store) as third:
            until(lambda: len(directory.standbys("")) == 2)
            until(lambda: first.server.succession.cores == {"": [first.url, second.url, third.url]}
                  or first.server.succession.cores == {"": [first.url, third.url, second.url]})  # fmt: skip
            beats = {place.beat for place in directory.standbys("")}
            until(lambda: min(place.beat for place in directory.standbys("")) > max(beats))
            said = [each.message for each in caplog.records if "another core" in each.message]
            assert len(said) == 2 and all(f"({first.url!r}" in each for each in said), said
            assert sum("waits, as `orla-lg serve --standby` does" in each for each in said) == 1
            first.end()
            first.join()
            until(lambda: is_ready(second)() or is_ready(third)())
            core = second if is_ready(second)() else third
            until(lambda: directory.cores()[""].urls == (core.url,))
            until(lambda: len(directory.standbys("")) == 1)
            assert directory.cores()[""].epoch == 2
        until(lambda: not directory.standbys(""))


def test_a_standby_says_where_the_core_is_to_what_may_link(file: Path) -> None:
    store = MemoryStore()
    with server(file, store=store) as first:
        until(is_ready(first))
        with server(file, store=store) as second:
            until(lambda: second.server.succession.own)
            refused = httpx.get(second.url + PATH, headers=UPGRADE)
            assert (refused.status_code, refused.headers[CORES_HEADER].split(",")[0]) == (503, first.url)
            with Orla.remote(second.url) as orla:
                assert list(orla.statistics().backends) == ["light"]
            link = key(store, KeyScope.LINK)
            until(lambda: httpx.get(second.url + PATH, headers=UPGRADE).status_code == 401)
            refused = httpx.get(second.url + PATH, headers=UPGRADE)
            assert CORES_HEADER not in refused.headers and first.url not in refused.text
            allowed = {**UPGRADE, "authorization": f"Bearer {link}"}
            assert httpx.get(second.url + PATH, headers=allowed).headers[CORES_HEADER]
            assert CORES_HEADER not in httpx.post(f"{second.url}/v1/chat/completions", json=CALL).headers


def test_replicas_hear_of_standbys_that_come_and_go(file: Path) -> None:
    store = MemoryStore()
    with server(file, store=store) as first:
        until(is_ready(first))
        with Orla.remote(first.url) as orla:
            places = orla.core.serving.link.places  # type: ignore[attr-defined]
            with server(file, store=store) as second:
                until(lambda: [each.text for each in places.addresses()] == [first.url, second.url])
            until(lambda: [each.text for each in places.addresses()] == [first.url])


def test_a_standby_that_is_dead_is_struck_out(file: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    store = MemoryStore()
    directory = Directory(store)
    directory.stand_by(CorePlace("", ("http://127.0.0.1:1",), host="elsewhere"), "dead elsewhere")
    directory.stand_by(CorePlace("", ("http://127.0.0.1:2",), host=here(), pid=ended.pid), "dead here")
    directory.stand_by(CorePlace("other", ("http://127.0.0.1:3",)), "of another pool")
    alive, over = CorePlace("", ("http://127.0.0.1:4",), host="elsewhere"), threading.Event()

    def beats() -> None:
        beat = 0
        while not over.wait(0.05):
            directory.stand_by(alive._replace(beat=(beat := beat + 1)), "alive")

    beating = threading.Thread(target=beats)
    beating.start()
    try:
        with server(file, store=store) as running:
            until(lambda: "standby//dead here" not in store.scan("standby/"))
            assert "standby//dead elsewhere" in store.scan("standby/")
            until(lambda: "standby//dead elsewhere" not in store.scan("standby/"))
            time.sleep(0.6)
            assert set(store.scan("standby/")) == {"standby//alive", "standby/other/of another pool"}
            assert is_ready(running)()
    finally:
        over.set()
        beating.join()
    held = directory.waiting("")["alive"]
    directory.stand_by(alive, "alive")
    directory.strike("", "alive", held[1])
    assert directory.waiting(""), "it has written since"


@pytest.mark.parametrize("has_ended", [True, False])
def test_the_lease_of_a_core_whose_process_has_ended_is_not_waited_for(file: Path, *, has_ended: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as core:
        store = MemoryStore()
        assert store.lease("core", "its holder", 3600.0)
        place = CorePlace("", ("http://127.0.0.1:1",), 1, host=here(), pid=core.pid, holder="its holder")
        Directory(store).announce(place)
        with server(file, store=store) as running:
            until(lambda: running.server.succession.own)
            if has_ended:
                core.kill()
                until(is_ready(running))
                assert running.server.lease.epoch == 2
            else:
                time.sleep(0.3)
                assert not is_ready(running)()
                core.kill()


def test_one_that_was_replaced_is_to_begin_again_where_it_is_a_standby(file: Path) -> None:
    store = MemoryStore()
    file.write_text(f"{file.read_text()}standby = true\ncore_lease_s = 0.6\n")
    with server(file, store=store) as running:
        until(is_ready(running))
        frozen = threading.Thread(target=running.call, args=(time.sleep, 1.0))
        frozen.start()
        until(lambda: store.lease("core", "another", 30.0))
        frozen.join()
        running.join()
        assert running.status == EXIT_REPLACED


def test_a_store_that_does_not_answer_is_asked_again(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store, gone = MemoryStore(), ["core", CORES]

    def failing(name: str) -> Callable[..., Any]:
        method = getattr(store, name)

        def asked(*about: Any, **more: Any) -> Any:
            if about[0] in gone:
                raise StoreUnavailable("the store is away")
            return method(*about, **more)

        return asked

    for name in ("lease", "watch"):
        monkeypatch.setattr(store, name, failing(name))
    with server(file, store=store) as running:
        until(lambda: "this core takes no calls: the store is away" in caplog.text)
        assert httpx.get(f"{running.url}/readyz").status_code == 503
        gone.clear()
        until(is_ready(running))
        until(lambda: running.server.succession.own == [running.url])
    assert caplog.text.count("this core takes no calls") == 1


def test_a_directory_that_could_not_be_read_once_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, faults = MemoryStore(), list[str]()
    scan = store.scan

    def scanned(prefix: str) -> Any:
        if faults and prefix == faults[0]:
            raise StoreUnavailable(f"no answer for {faults.pop(0)}")
        return scan(prefix)

    with server(file, store=store) as running:
        until(lambda: running.server.succession.own == [running.url])
        time.sleep(0.2)
        monkeypatch.setattr(store, "scan", scanned)
        faults.append(CORES)
        Directory(store).announce(CorePlace("other", ("http://127.0.0.1:3",), 1))
        until(lambda: not faults)
        until(lambda: "other" in running.server.succession.cores)


@pytest.mark.parametrize(("backends", "is_told"), [(("theirs",), True), (("theirs", "light"), False), ((), False)])
def test_a_standby_of_another_installations_core_says_so(
    file: Path, backends: tuple[str, ...], caplog: pytest.LogCaptureFixture, *, is_told: bool
) -> None:
    store = MemoryStore()
    assert store.lease("core", "its holder", 3600.0)
    Directory(store).announce(CorePlace("", ("http://127.0.0.1:1",), 1, backends, "elsewhere", 1, 0, "its holder"))
    with server(file, store=store):
        until(lambda: "takes over at its end" in caplog.text)
        time.sleep(0.1)
    assert ("('theirs') and none of this one's ('light')" in caplog.text) is is_told
