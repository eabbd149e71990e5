"""Cores of several pools on one store: what each serves, what it sees of the others, and how they know each other."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg import ConfigError, Orla, config
from orla_lg.core.placement.elsewhere import BackendElsewhere, ElsewhereBackends
from orla_lg.link.connection import Link
from orla_lg.link.dialing import addresses
from orla_lg.link.messages import PROTOCOL, Hello
from orla_lg.link.places import CorePlace
from orla_lg.serve.access.keys import AccessKey, KeyScope, create
from orla_lg.serve.pools.secret import KEY, MARK, CoreSecret
from orla_lg.serve.pools.viewing import OtherPools
from orla_lg.serve.store.store import MemoryStore
from tests.serve.pools.served import BY_LOAD, FREE, Pools, graph, hi, replicas, until


def views(pools: Pools, pool: str) -> dict[str, Any]:
    return {view.name: view for view in pools.core(pool).views()}


def test_a_core_serves_its_own_backends_and_sees_all(pools: Pools) -> None:
    pools.start()
    pools.seen()
    assert list(pools.core("fast").schedulers) == ["small-a", "small-b"]
    assert list(pools.core("large").schedulers) == ["big"]
    for pool in ("fast", "large"):
        seen = views(pools, pool)
        assert list(seen) == ["small-a", "small-b", "big"], "in the order of the configuration"
        assert all(view.probe is not None and view.models for view in seen.values())
        assert {name: view.pool for name, view in seen.items() if view.pool} == (
            {"big": "large"} if pool == "fast" else {"small-a": "fast", "small-b": "fast"}
        )


def test_what_a_core_sees_of_another_is_young(pools: Pools) -> None:
    pools.start()
    pools.seen()
    pools.running["large"].orla.set_limit("big", max_concurrency=7)
    began_s = time.monotonic()
    until(lambda: views(pools, "fast")["big"].max_concurrency == 7)
    assert time.monotonic() - began_s < 3.0, "they are pushed every 100 ms; the rest is a busy machine"
    pools.running["large"].orla.pause("big")
    until(lambda: views(pools, "fast")["big"].paused)


def test_the_backends_of_a_pool_without_a_core_are_shut_for_mappers(pools: Pools) -> None:
    pools.say(FREE, BY_LOAD)
    pools.start("fast")
    assert views(pools, "fast")["big"].shut
    pools.start("large")
    pools.seen()
    pools.end("large")
    until(lambda: views(pools, "fast")["big"].shut)
    pools.start("large")
    pools.seen()


def test_the_gateway_of_a_core_names_the_core_of_another_pool(pools: Pools) -> None:
    pools.start()
    pools.seen()
    body = {"model": "big", "messages": [{"role": "user", "content": "hi"}]}
    answer = httpx.post(f"{pools.running['fast'].url}/v1/chat/completions", json=body)
    assert answer.status_code == 421
    assert pools.running["large"].url in answer.json()["error"]["message"]
    answer = httpx.post(f"{pools.running['large'].url}/v1/chat/completions", json=body)
    assert answer.status_code == 200 and len(pools.engines["big"].chats) == 1


def test_cores_know_each_other_where_there_are_keys(pools: Pools) -> None:
    scopes = (KeyScope.LINK, KeyScope.CONTROL)
    _, secret = create(pools.store, lambda id, hashed: AccessKey(id, "app", hashed, scopes))
    pools.start()
    pools.seen()
    with replicas(pools, key=secret) as (orla,):
        orla.wrap(graph("draft", "think")).invoke(hi())
    with pytest.raises(ConfigError, match="wants a key"):
        Orla.remote(pools.running["fast"].url)


def test_the_secret_of_cores_lets_one_look_and_no_more(pools: Pools) -> None:
    pools.start("large")
    create(pools.store, lambda id, hashed: AccessKey(id, "app", hashed, (KeyScope.LINK,)))
    secret = CoreSecret(pools.store).get()
    assert secret.startswith(MARK) and secret == CoreSecret(pools.store).get()
    where = addresses(pools.running["large"].url)
    link = Link(where, secret)
    welcome = link.open(Hello(PROTOCOL, "looks"), 10.0)
    assert [each["name"] for each in welcome.backends] == ["big"]
    assert not pools.running["large"].server.host.replicas, "it is no replica"
    link.stop()
    wrong = Link(where, f"{MARK}another")
    with pytest.raises(ConfigError, match="does not take the key"):
        wrong.open(Hello(PROTOCOL, "looks"), 10.0)
    for path in ("/v1/models", "/v1/orla/state"):
        answer = httpx.get(f"{pools.running['large'].url}{path}", headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code == 401


def test_the_secret_is_made_once() -> None:
    store = MemoryStore()
    one = CoreSecret(store).get()
    assert CoreSecret(store).get() == one == store.scan(KEY)[KEY].value.decode()


def test_the_secret_goes_to_no_core_elsewhere_in_plain_text(caplog: pytest.LogCaptureFixture) -> None:
    seen = ElsewhereBackends({"large": [config.Backend("big", "http://127.0.0.1:9/v1")]}, ["big"])
    others = OtherPools("fast", seen, CoreSecret(MemoryStore()), "")
    place = CorePlace("large", ("http://127.0.0.1:9", "http://10.0.0.9:8081"), 1, ("big",), "another machine", 1)
    with caplog.at_level(logging.WARNING, "orla_lg"):
        for _ in range(2):
            others.follow([place])
    assert others.connected() == {"large": False} and caplog.text.count("behind TLS") == 1
    error = seen.error("big")
    assert isinstance(error, BackendElsewhere) and "http://127.0.0.1:9" in str(error)


def test_a_link_of_one_pool_is_refused_by_the_core_of_another(pools: Pools) -> None:
    pools.start("large")
    link = Link(addresses(pools.running["large"].url), None, pool="fast")
    with pytest.raises(Exception, match="decides for pool 'large'"):
        link.open(Hello(PROTOCOL, "lost", pool="fast"), 0.5)
    link.stop()
    assert not pools.running["large"].server.host.replicas


def test_posted_backends_are_of_the_pool_where_they_are_posted(pools: Pools) -> None:
    pools.start()
    said = {"name": "more", "endpoint": pools.engines["big"].url, "type": "openai", "model_id": "openai:stub-model"}
    until(lambda: httpx.get(f"{pools.running['large'].url}/readyz").is_success)
    answer = httpx.post(f"{pools.running['large'].url}/api/v1/backends", json=said)
    assert answer.status_code < 300, answer.text
    until(lambda: "more" in pools.core("large").schedulers)
    assert "more" not in pools.core("fast").schedulers
    assert not [key for key in pools.store.scan("posted/") if "more" in key]
    answer = httpx.post(f"{pools.running['fast'].url}/api/v1/backends", json={**said, "name": "big"})
    assert answer.status_code >= 400 and "big" in answer.text


def test_a_reload_takes_a_backend_into_a_pool_and_refuses_to_move_one(pools: Pools) -> None:
    pools.start()
    pools.seen()
    before = pools.file.read_text()
    more = before.replace(
        "[pools]", f'[backends.new]\nurl = "{pools.engines["big"].url}/"\nmodel = "stub-model"\n\n[pools]'
    ).replace('large = ["big"]', 'large = ["big", "new"]')
    pools.file.write_text(more)
    for running in pools.running.values():
        running.call(lambda running=running: running.server.reload(dry_run=False))
    assert list(pools.core("large").schedulers) == ["big", "new"]
    assert "new" in views(pools, "fast")
    pools.file.write_text(
        before.replace('["small-a", "small-b"]', '["small-a"]').replace('["big"]', '["big", "small-b"]')
    )
    for running in pools.running.values():
        with pytest.raises(ConfigError, match=r"small-b.*stop both"):
            running.call(lambda running=running: running.server.reload(dry_run=False))


WRONG = {
    'fast = ["small-a", "small-b"]': {
        "in none": ('fast = ["small-a"]', "'small-b' in none of them"),
        "in two": ('fast = ["small-a", "small-b", "big"]', "'big' is in pools.fast and in pools.large"),
        "twice": ('fast = ["small-a", "small-b", "small-b"]', "'small-b' is twice in pools.fast"),
        "unknown": ('fast = ["small-a", "small-b", "smal"]', "'smal' does not exist"),
        "empty": ('fast = ["small-a", "small-b"]\nempty = []', "pools.empty: it has no backend"),
        "no name": ('"f/ast" = ["small-a", "small-b"]', "cannot be the name of a pool"),
        "no list": ("fast = 1", "pools.fast"),
    }
}


@pytest.mark.parametrize("kind", next(iter(WRONG.values())))
def test_what_is_wrong_with_pools_is_named(pools: Pools, kind: str) -> None:
    (right, table) = next(iter(WRONG.items()))
    wrong, said = table[kind]
    pools.file.write_text(pools.file.read_text().replace(right, wrong))
    with pytest.raises(ConfigError, match=said.replace("'", ".")):
        config.load(pools.file)


def test_a_core_says_which_pool_it_is_of(pools: Pools) -> None:
    with pytest.raises(ConfigError, match="say which one this core decides for: --pool"):
        config.load(pools.file, pool="")
    with pytest.raises(ConfigError, match=r"no pool 'fats'.*'fast'"):
        config.load(pools.file, pool="fats")
    mine = config.load(pools.file, pool="large")
    assert [each.name for each in mine.backends] == ["big"]
    assert [each.name for each in mine.elsewhere] == ["small-a", "small-b"]
    assert [each.name for each in config.load(pools.file).backends] == ["small-a", "small-b", "big"]


def test_a_core_needs_the_keys_of_its_own_engines_only(pools: Pools, tmp_path: Path) -> None:
    text = pools.file.read_text().replace("[backends.big]", '[backends.big]\napi_key_env = "NO_SUCH_VARIABLE"')
    pools.file.write_text(text)
    assert config.load(pools.file, pool="fast").elsewhere[0].api_key is None
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        config.load(pools.file, pool="large")


def test_policies_by_backend_are_each_pools_own(pools: Pools) -> None:
    pools.file.write_text('stage_policy = {big = "priority", "*" = "fcfs"}\n' + pools.file.read_text())
    pools.start()
    for pool, name in (("fast", "Fcfs"), ("large", "Priority")):
        (first, *_) = pools.core(pool).schedulers.values()
        assert type(first.queue.policies.stage).__name__ == name
