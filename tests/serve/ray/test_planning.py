"""Which actors there are to be, at which ports, and what no cluster could run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orla_lg.errors import ConfigError
from orla_lg.serve.ray.planning import ANY, NODE_ID, PlannedActor, RayNode, ServersAsked, matches, planned, spread

BACKEND = '[backends.main]\nurl = "http://127.0.0.1:9/v1"\n'


def node(number: int = 1, address: str = "127.0.0.1", **labels: str) -> RayNode:
    return RayNode(f"{number:02x}", address, labels, {"CPU": 2.0, "chat": 1.0})


def plan(folder: Path, text: str, *nodes: RayNode, **said: Any) -> list[PlannedActor]:
    file = folder / "orla.toml"
    file.write_text(text)
    return planned(ServersAsked(str(file), **said), nodes or (node(),))


def test_a_core_and_a_standby_at_ports_one_after_the_other(tmp_path: Path) -> None:
    core, standby = plan(tmp_path, BACKEND + '[serve]\nstore = "s.db"\n')
    assert (core.name, core.shipped.port, core.shipped.host) == ("orla-core-0", 8081, "127.0.0.1")
    assert (standby.name, standby.shipped.port) == ("orla-core-1", 8082)


def test_without_a_configuration_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (core, _) = planned(ServersAsked(port=0), [node()])
    assert (core.shipped.path, core.shipped.port) == ("", 0)


POOLS = """
[backends.small]
url = "http://127.0.0.1:8/v1"
[backends.coder]
url = "http://127.0.0.1:9/v1"
[pools]
chat = ["small"]
code = ["coder"]
[serve]
store = "s.db"
[ray]
labels = { zone = "a" }
standbys = 0
[ray.pools.chat]
standbys = 1
[ray.pools.code]
labels = { zone = "in(b, c)" }
resources = { chat = 1 }
"""


def test_each_pool_has_its_place_and_its_ports(tmp_path: Path) -> None:
    found = plan(tmp_path, POOLS, node(1, zone="a"), node(2, zone="c"))
    assert [(each.name, each.shipped.port, each.shipped.pool) for each in found] == [
        ("orla-core-chat-0", 8081, "chat"), ("orla-core-chat-1", 8082, "chat"), ("orla-core-code-0", 8083, "code"),
    ]  # fmt: skip
    assert [each.labels[-1] for each in found[1:]] == [{"zone": "a"}, {"zone": "in(b, c)"}]
    assert [each.labels[0][NODE_ID] for each in found] == ["01", "01", "02"]
    assert found[2].resources == {"chat": 1} and found[0].resources == {}
    (only,) = plan(tmp_path, POOLS, node(2, zone="c"), pool="code")
    assert (only.name, only.shipped.port) == ("orla-core-code-0", 8081)
    with only.shipped.opened("127.0.0.1") as chosen:
        assert chosen.table.pool == "code" and [each.name for each in chosen.core.backends] == ["coder"]


@pytest.mark.parametrize(
    ("text", "nodes", "said"),
    [
        ('[serve]\nstore = "s.db"', (node(1, "10.0.0.1"), node(2, "10.0.0.2")), "a file of one machine"),
        ("", (node(1, "10.0.0.1"), node(2, "10.0.0.2")), "that of this user's state folder is a file of one machine"),
        ('[serve]\nlisten_address = "unix:/tmp/x"', (node(),), "it is HOST:PORT"),
        ('[serve]\nlisten_address = "0.0.0.0:0"', (node(),), "a port of its own"),
        ('[serve]\nstore = "s.db"\n[ray]\nlabels = { zone = "a" }', (node(zone="b"),), "nodes have zone=b"),
        ('[serve]\nstore = "s.db"\n[ray]\nlabels = { zone = "a" }', (node(),), "--labels=zone=a"),
        ('[serve]\nstore = "s.db"\n[ray]\nresources = { chat = 2 }', (node(),), "has the resources chat=2"),
    ],
)  # fmt: skip
def test_what_a_cluster_cannot_run_is_refused_at_once(
    text: str, nodes: tuple[RayNode, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=said):
        plan(tmp_path, BACKEND + text, *nodes)


def test_on_several_machines_a_server_listens_at_its_nodes_address_with_keys_and_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orla_lg.serve.ray.planning.is_shared", lambda where: True)
    nodes = node(1, "10.0.0.1"), node(2, "10.0.0.2")
    stored = BACKEND + '[serve]\nstore = "s.db"\n'
    with pytest.raises(ConfigError, match="there is no key yet"):
        plan(tmp_path, stored, *nodes)
    with pytest.raises(ConfigError, match="reached from its own machine only, and the cluster has 2"):
        plan(tmp_path, stored + 'listen_address = "127.0.0.1:8081"', *nodes)
    monkeypatch.setattr("orla_lg.serve.settings.ServeSettings.check", lambda self, has_keys: None)
    assert [each.shipped.host for each in plan(tmp_path, stored, *nodes)] == [None, None]


def test_a_table_is_of_a_pool_that_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ray\.pools\.chta: there is no pool 'chta'; did you mean 'chat'"):
        plan(tmp_path, POOLS.replace("ray.pools.chat", "ray.pools.chta"), node(zone="a"))


@pytest.mark.parametrize(
    ("said", "fits"),
    [("a", True), ("b", False), ("!b", True), ("!a", False), ("in(a, b)", True), ("!in(a,b)", False)],
)
def test_labels_select_as_ray_selects(said: str, fits: bool) -> None:
    assert matches({"zone": "a"}, {"zone": said}) is fits
    assert matches({}, {"zone": said}) is said.startswith("!")


def test_each_actor_has_a_node_of_its_own_as_long_as_there_are_enough() -> None:
    core, standby = spread({"zone": "a"}, [node(1), node(2), node(3)], 2)
    assert list(core) == [{"zone": "a", NODE_ID: "01"}, {"zone": "a", NODE_ID: "!in(02)"}, {"zone": "a"}]
    assert standby[0] == {"zone": "a", NODE_ID: "02"}
    alone = spread({}, [node(1)], 2)
    assert alone == [({NODE_ID: "01"}, ANY)] * 2 and matches({NODE_ID: "01"}, ANY)


def test_gateways_find_cores_at_their_ports_or_in_the_store(tmp_path: Path) -> None:
    text = POOLS.replace("[ray]", "[ray]\ngateways = 2")
    nodes = node(1, zone="a"), node(2, zone="c")
    found = plan(tmp_path, text, *nodes)[-2:]
    assert [(each.name, each.shipped.port) for each in found] == [("orla-gateway-0", 8084), ("orla-gateway-1", 8085)]
    urls = [f"http://127.0.0.1:{port}" for port in (8081, 8082, 8083)]
    assert found[0].shipped.before == ",".join(urls)
    assert [each.labels[0][NODE_ID] for each in found] == ["01", "02"]
    with pytest.raises(ConfigError, match="a free one is not known"):
        plan(tmp_path, text, *nodes, port=0)


def test_ports_beyond_the_last_one_are_refused_before_anything_is_started(tmp_path: Path) -> None:
    text = BACKEND + '[serve]\nstore = "s.db"\nlisten_address = "127.0.0.1:65535"\n'
    assert [each.shipped.port for each in plan(tmp_path, text + "[ray]\nstandbys = 0\n")] == [65535]
    for table in ("standbys = 1", "standbys = 0\ngateways = 1"):
        with pytest.raises(ConfigError, match="none is beyond 65535"):
            plan(tmp_path, f"{text}[ray]\n{table}\n")
