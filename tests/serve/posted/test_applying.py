"""What is posted is applied to the running core, outlives it, and gives way to the configuration file."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg import ConfigError
from orla_lg.serve.posted.applying import NotPosted
from orla_lg.serve.posted.book import PostedBook
from orla_lg.serve.posted.items import PostedBackend, PostedMapping, PostedPolicy, PostedStage, read_item
from orla_lg.serve.posted.joining import NamedByFile
from orla_lg.serve.store.sqlite import SqliteStore
from orla_lg.serve.store.store import MemoryStore, Store
from tests.serve.fixtures import until
from tests.serve.in_thread import Running, server
from tests.stub_engine import StubEngine


def backend(name: str, engine: StubEngine, **more: Any) -> PostedBackend:
    return read_item(PostedBackend, {"name": name, "endpoint": engine.url, "max_concurrency": 2, **more})


def put(running: Running, item: Any, **more: Any) -> Any:
    async def posted() -> Any:
        return await running.server.posted.put(item, **more)

    return running.call(posted)


def remove(running: Running, model: Any, name: str) -> None:
    async def removed() -> None:
        await running.server.posted.remove(model, name)

    running.call(removed)


def ready(running: Running) -> Running:
    until(lambda: httpx.get(f"{running.url}/readyz").status_code == 200)
    return running


def chat(running: Running, stage: str = "", model: str = "auto", **headers: str) -> httpx.Response:
    said = {"X-Orla-Stage": stage} if stage else {}
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return httpx.post(f"{running.url}/v1/chat/completions", json=body, headers={**said, **headers}, timeout=10)


def ran_on(running: Running, stage: str = "", model: str = "auto", **headers: str) -> str:
    answer = chat(running, stage, model, **headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-orla-backend"]


@pytest.fixture
def store() -> Store:
    return MemoryStore()


def written(file: Path, engine: StubEngine, more: str = "", mapping: str = '"*" = "light"') -> Path:
    file.write_text(f'[backends.light]\nurl = "{engine.url}"\n{more}\n[mapping]\n{mapping}\n')
    return file


def test_what_is_posted_serves_and_is_there_again_after_a_restart(
    store: Store, engine: StubEngine, other_engine: StubEngine
) -> None:
    with server(store=store) as running:
        ready(running)
        put(running, backend("light", engine))
        put(running, backend("heavy", other_engine))
        put(running, PostedStage(id="solve", backend="heavy"))
        put(running, PostedMapping(name="cheap", overrides={"solve": "light"}))
        assert ran_on(running, "solve", "light") == "heavy"
        assert ran_on(running, "other", "light") == "light"
        assert ran_on(running, "solve", "light", **{"X-Orla-Mapping": "cheap"}) == "light"
    with server(store=store) as again:
        ready(again)
        assert ran_on(again, "solve", "light") == "heavy"
        assert ran_on(again, "solve", "light", **{"X-Orla-Mapping": "cheap"}) == "light"
        remove(again, PostedStage, "solve")
        remove(again, PostedMapping, "cheap")
        assert ran_on(again, "solve", "light") == "light"
        remove(again, PostedBackend, "heavy")
        assert chat(again, model="heavy").status_code == 404
        with pytest.raises(NotPosted):
            remove(again, PostedBackend, "heavy")
    assert list(PostedBook(store).items.of(PostedBackend)) == []


def test_what_the_file_names_is_not_changed_by_api(
    tmp_path: Path, engine: StubEngine, other_engine: StubEngine
) -> None:
    file = written(
        tmp_path / "orla.toml", engine, mapping='"*" = "light"\nsolve = "light"\n[variants.cheap]\nsolve = "light"'
    )
    with server(file) as running:
        ready(running)
        for item in (
            backend("light", other_engine),
            PostedStage(id="solve", backend="light"),
            PostedStage(id="*", backend="light"),
            PostedMapping(name="cheap", overrides={"solve": "light"}),
        ):
            with pytest.raises(NamedByFile, match=f"{file}.*is changed there"):
                put(running, item)
            with pytest.raises(NamedByFile):
                remove(running, type(item), item.key)
        put(running, PostedStage(id="solve", reasoning_effort="low"))  # of which the file says nothing
        put(running, backend("heavy", other_engine))
        put(running, PostedStage(id="more", backend="heavy"))
        assert (ran_on(running, "solve"), ran_on(running, "more"), ran_on(running, "x")) == (
            "light",
            "heavy",
            "light",
        )
        assert [each.body.get("reasoning_effort") for each in engine.requests[-2:]] == ["low", None]


def test_the_file_wins_when_it_is_loaded_again(
    tmp_path: Path, engine: StubEngine, other_engine: StubEngine, store: Store
) -> None:
    file = written(tmp_path / "orla.toml", engine)
    with server(file, store=store) as running:
        ready(running)
        put(running, backend("heavy", other_engine))
        put(running, PostedStage(id="solve", backend="heavy"))
        assert ran_on(running, "solve") == "heavy"
        written(file, engine, f'[backends.heavy]\nurl = "{engine.url}"', '"*" = "light"\nsolve = "light"')

        async def reload() -> str:
            return await running.server.reload(dry_run=False)

        assert "heavy" in running.call(reload)
        assert ran_on(running, "solve") == "light"
        before = len(engine.requests)
        assert ran_on(running, model="heavy") == "heavy" and len(engine.requests) > before
        written(file, engine)
        running.call(reload)
        assert ran_on(running, "solve") == "heavy"  # what was posted is still there
        before = len(other_engine.requests)
        assert ran_on(running, "solve") == "heavy" and len(other_engine.requests) > before


def test_a_standby_has_all_that_was_posted_when_it_takes_over(
    store: Store, engine: StubEngine, other_engine: StubEngine
) -> None:
    with server(store=store) as first:
        ready(first)
        with server(store=store) as second:
            put(first, backend("light", engine))
            put(first, PostedStage(id="solve", backend="light"))
            until(lambda: "light" in second.orla.statistics().backends)
            put(first, backend("light", other_engine))  # another engine under its name
            first.end()
            first.join()
            ready(second)
            before = len(other_engine.requests)
            assert ran_on(second, "solve") == "light" and len(other_engine.requests) > before


def test_what_is_refused_leaves_nothing_behind(store: Store, engine: StubEngine) -> None:
    with server(store=store) as running:
        ready(running)
        for item, said in (
            (read_item(PostedBackend, {"name": "x", "endpoint": "h"}), "is not http"),
            (backend("x", engine, type="nothing"), "unknown engine"),
            (backend("x", engine, api_key_env_var="PATH"), "must not be named"),
            (read_item(PostedBackend, {"name": "x", "endpoint": "http://169.254.169.254/v1"}), "credentials"),
            (read_item(PostedBackend, {"name": "x", "endpoint": running.url + "/v1"}), "orla_lg server"),
        ):
            with pytest.raises(ConfigError, match=said):
                put(running, item)
        assert not store.scan("posted/") and not running.orla.statistics().backends


def test_a_posted_backend_is_changed_while_it_serves(engine: StubEngine, other_engine: StubEngine) -> None:
    with server() as running:
        ready(running)
        put(running, backend("light", engine))
        put(running, backend("light", engine, quality=0.5, input_cost_per_mtoken=2.0, max_concurrency=7))
        scheduler = running.orla.core.serving.schedulers["light"]
        assert (scheduler.backend.quality, scheduler.backend.cost.input_per_mtoken) == (0.5, 2.0)
        assert scheduler.queue.max_concurrency == 7
        assert ran_on(running, model="light") == "light" and engine.requests
        put(running, backend("light", other_engine))
        before = len(other_engine.requests)
        assert ran_on(running, model="light") == "light" and len(other_engine.requests) > before
        until(lambda: not running.server.reloader.leaving)
        assert running.orla.core.serving.schedulers["light"].backend.url == other_engine.url
        running.orla.core.serving.check_integrity()


def test_calls_that_wait_on_a_paused_backend_go_on_when_it_is_replaced(
    engine: StubEngine, other_engine: StubEngine
) -> None:
    with server() as running:
        ready(running)
        put(running, backend("light", engine))
        steering, before = running.orla.core.serving.steering, running.orla.core.serving.schedulers["light"]
        steering.pause("light")
        with ThreadPoolExecutor(1) as calling:
            call = calling.submit(ran_on, running, "", "light")
            until(lambda: before.queue.waiting == 1)
            put(running, backend("light", other_engine))
            assert call.result(5) == "light"
        until(lambda: not running.server.reloader.leaving)
        running.orla.core.serving.check_integrity()


def test_posted_policies_and_labels_hold_at_once_and_after_a_restart(store: Store, engine: StubEngine) -> None:
    deny = {"name": "p", "subjects": ["backend:light"], "resources": ["data:pii"], "action": "deny"}
    with server(store=store) as running:
        ready(running)
        put(running, backend("light", engine))
        put(running, PostedStage(id="solve", labels=("pii",)))
        assert ran_on(running, "solve", "light") == "light"
        put(running, read_item(PostedPolicy, deny))
        assert chat(running, "solve", "light").status_code == 403 and ran_on(running, "x", "light") == "light"
        with pytest.raises(ConfigError, match="resource"):
            put(running, read_item(PostedPolicy, {**deny, "resources": ["nothing:pii"]}))
    with server(store=store) as again:
        ready(again)
        assert chat(again, "solve", "light").status_code == 403
        remove(again, PostedPolicy, "p")
        assert ran_on(again, "solve", "light") == "light"


def test_a_policy_that_cannot_be_read_closes_the_server_until_it_is_removed(store: Store, engine: StubEngine) -> None:
    store.put("posted/policies/p", b'{"from": "a newer version"}')
    with server(store=store) as running:
        ready(running)
        put(running, backend("org/light/x", engine))
        for headers in ({}, {"X-Orla-Tag-Team": "a/b"}):
            answer = chat(running, "solve", "org/light/x", **headers)
            assert (answer.status_code, "'p'" in answer.text) == (403, True), answer.text
        remove(running, PostedPolicy, "p")
        assert ran_on(running, "solve", "org/light/x") == "org/light/x"


def test_a_stage_that_cannot_be_read_takes_no_calls(store: Store, engine: StubEngine) -> None:
    store.put("posted/stages/solve", b'{"from": "a newer version"}')
    with server(store=store) as running:
        ready(running)
        put(running, backend("light", engine))
        assert "cannot be read" in chat(running, "solve", "light").text and ran_on(running, "x", "light") == "light"
        put(running, PostedStage(id="solve"))
        assert ran_on(running, "solve", "light") == "light"


def test_two_cores_on_one_file_have_the_same(tmp_path: Path, engine: StubEngine) -> None:
    with closing(SqliteStore(tmp_path / "serve.db")) as one, closing(SqliteStore(tmp_path / "serve.db")) as other:
        with server(store=one) as first, server(store=other) as second:
            ready(first)
            put(first, backend("light", engine))
            put(first, PostedStage(id="solve", backend="light"))
            until(lambda: second.server.posted.items.says_what(first.server.posted.items), 5)
            assert "light" in second.orla.statistics().backends
            remove(first, PostedBackend, "light")
            until(lambda: "light" not in second.orla.statistics().backends, 5)
    with closing(SqliteStore(tmp_path / "serve.db")) as again, server(store=again) as third:
        ready(third)
        assert set(third.server.posted.items.of(PostedStage)) == {"solve"}
