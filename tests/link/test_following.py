"""A link goes where cores follow one another, and its key only where it may be sent."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from orla_lg import BackendUnavailable, Orla
from orla_lg.link import connection
from orla_lg.link.dialing import addresses
from orla_lg.link.following import CoreAddresses
from orla_lg.link.messages import Enter, Hello, Ready
from orla_lg.link.places import MOST_URLS, CorePlace, read_place, text_of, urls_by_pool
from orla_lg.link.whereabouts import here
from tests.link.scripted import ScriptedCore, eventually
from tests.link.test_calls import graph
from tests.link.test_reconnect import Run
from tests.stub_engine import StubEngine

Replica = Callable[..., Orla]

TLS, PLAIN, LOCAL, UNIX = "https://core:8081", "http://core:8081", "http://127.0.0.1:8081", "unix:/run/orla.sock"


def following(named: str, *, has_key: bool = True) -> CoreAddresses:
    return CoreAddresses(addresses(named), has_key=has_key)


@pytest.mark.parametrize(
    ("named", "given", "follows"),
    [
        (TLS, "https://next:8081", True),
        (TLS, "http://next:8081", False),
        (f"{TLS},{PLAIN}", "http://next:8081", True),
        (TLS, LOCAL, False),
        (TLS, "http://localhost:1", False),
        (TLS, UNIX, False),
        (LOCAL, "http://127.0.0.1:8082", True),
        (LOCAL, UNIX, True),
        (UNIX, LOCAL, True),
        (LOCAL, "https://next:8081", True),
        (LOCAL, "http://next:8081", False),
        (PLAIN, "http://next:8081", False),
        (PLAIN, "https://next:8081", False),
        (PLAIN, PLAIN, True),
        (TLS, "ftp://next", False),
        (TLS, "https://next:8081,https://other:8081", False),
        (TLS, "https://user:secret@next:8081", False),
    ],
)
def test_the_key_goes_where_what_is_believed_sends_it(named: str, given: str, follows: bool) -> None:
    where = following(named)
    giver = addresses(named)[0]
    where.met(giver, "", {"": [given]})
    learned = [each.text for each in where.addresses() if each not in where.named]
    assert learned == ([given] if follows and given != named else [])


def test_what_a_tunnel_leads_to_names_no_address_of_this_machine() -> None:
    where, giver = following(LOCAL), addresses(LOCAL)[0]
    said = {"": [LOCAL, "http://127.0.0.1:8082", "https://next:1"], "b": []}
    where.met(giver, "", said, "another machine")
    assert [each.text for each in where.addresses()] == [LOCAL, "https://next:1"]
    other = where.of_pool("b")
    other.hinted(giver, ["http://127.0.0.1:8083", "https://next:2"])
    assert [each.text for each in other.addresses()] == ["https://next:2"]
    where = following(LOCAL)
    where.met(giver, "", said, here())
    assert [each.port for each in where.addresses()] == [8081, 8082, 1]


def test_without_a_key_what_is_not_believed_is_followed_too() -> None:
    where = following(PLAIN, has_key=False)
    where.met(addresses(PLAIN)[0], "", {"": ["http://next:8081", "https://next:8443", LOCAL]})
    assert [each.text for each in where.addresses()] == [PLAIN, "http://next:8081", "https://next:8443"]


def test_what_is_refused_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "orla_lg")
    where = following(TLS)
    for _ in range(3):
        where.met(addresses(TLS)[0], "", {"": ["http://next:8081"]})
    assert caplog.text.count("which is not followed: it is in plain text") == 1


def test_the_last_core_is_tried_first_then_what_it_said_then_what_was_named() -> None:
    where = following("https://one:1,https://two:2")
    two = addresses("https://two:2")[0]
    where.met(two, "a", {"a": ["https://two:2", "https://three:3"], "b": ["https://four:4"]})
    assert [each.port for each in where.addresses()] == [2, 3, 1]
    where.met(two, "a", {"a": ["https://five:5"]})
    assert [each.port for each in where.addresses()] == [2, 5, 1], "what was said before is over"
    where.met(two, "a", {})
    assert [each.port for each in where.addresses()] == [2, 5, 1], "a core that says nothing takes nothing back"
    where.hinted(two, ["https://six:6"])
    assert [each.port for each in where.addresses()] == [2, 6, 5, 1]


@pytest.mark.parametrize("said", [None, "https://next:1", 3, [3, None, {}], {"https://next:1": 1}])
def test_nonsense_is_passed_by(said: object) -> None:
    where = following(TLS)
    where.met(addresses(TLS)[0], "", {"": said})
    assert [each.text for each in where.addresses()] == [TLS]


class Source:
    """A store that names cores."""

    text = "redis://store"

    def __init__(self, *found: CorePlace, is_believed: bool = True, is_local: bool = False) -> None:
        self.found, self.is_believed, self.is_local = found, is_believed, is_local

    def read(self) -> Sequence[CorePlace]:
        return self.found


def test_a_store_names_cores_the_newest_first() -> None:
    source = Source(CorePlace("a", ("https://old:1",), 3), CorePlace("a", ("https://new:2",), 4),
                    CorePlace("b", ("https://other:3",), 9), CorePlace("a", ("https://standby:4",)))  # fmt: skip
    where = CoreAddresses((), [source], has_key=True, pool="a")
    assert where.read(source) == 3
    assert [each.port for each in where.addresses()] == [2, 1, 4]
    assert where.text == "redis://store"


def test_a_store_that_is_not_believed_sends_no_key_anywhere() -> None:
    source = Source(CorePlace("", ("https://core:1", "http://core:2"), 1), is_believed=False)
    assert CoreAddresses((), [source], has_key=True).read(source) == 0
    assert CoreAddresses((), [source], has_key=False).read(source) == 2
    believed = Source(CorePlace("", ("https://core:1", "http://core:2"), 1))
    assert CoreAddresses((), [believed], has_key=True).read(believed) == 1, "plain text was not asked for"


def test_addresses_of_this_machine_count_on_this_machine() -> None:
    there, mine = CorePlace("", (LOCAL,), 1, host="elsewhere boot ns"), CorePlace("", (LOCAL,), 1, host=here())
    for place, read in ((there, 0), (mine, 1)):
        source = Source(place)
        assert CoreAddresses((), [source], has_key=True).read(source) == read


# The directory's entries


def test_an_entry_is_read_as_it_was_written() -> None:
    place = CorePlace("a", ("https://one:1",), 4, ("heavy",), here(), 7, 2, "holder")
    assert read_place("core/a", text_of(place)) == place
    older = {"pool": "a", "urls": ["https://one:1"], "epoch": 4}
    assert read_place("core/a", json.dumps(older).encode()) == CorePlace("a", ("https://one:1",), 4)
    for wrong in (b"{", b"[]", b'{"pool": 3}', b"\xff"):
        assert read_place("core/a", wrong) is None


def test_urls_of_other_machines_own_are_left_out() -> None:
    found = urls_by_pool([
        CorePlace("a", (LOCAL, "https://b:1"), 0, host="elsewhere"), CorePlace("a", (LOCAL,), 2, host=here()),
        CorePlace("a", ("unix:/run/x", "http://[::1]:1", "http://localhost:1"), 0, host="elsewhere"),
        CorePlace("b", tuple(f"https://c:{n}" for n in range(99)), 1),
    ])  # fmt: skip
    assert found["a"] == [LOCAL, "https://b:1"] and len(found["b"]) == MOST_URLS


# Cores


@contextmanager
def unanswering() -> Iterator[str]:
    """Give the URL of what takes connections and never answers, as a process that is frozen."""
    with socket.socket() as frozen:
        frozen.bind(("127.0.0.1", 0))
        frozen.listen(64)
        yield f"http://127.0.0.1:{frozen.getsockname()[1]}"


def test_a_replica_goes_to_the_core_that_its_core_named(
    core: ScriptedCore, engine: StubEngine, replica: Replica
) -> None:
    with ScriptedCore(*core.backends, epoch=2, key_env=core.key_env) as second, unanswering() as frozen:
        core.cores, core.grants = {"": [core.url, frozen, second.url], "other": ["http://127.0.0.1:9"]}, False
        orla = replica(core.url, key="key-of-this-link")
        run = Run(orla.wrap(graph(engine)))
        call = core.wait(Enter).call
        began_s = time.monotonic()
        core.gone()
        assert second.wait(Enter).call == call and second.all(Hello)[0].epoch == 1
        assert time.monotonic() - began_s < 2.0, "one that is frozen keeps no other one waiting"
        assert run.result() and "Bearer key-of-this-link" in second.heads[0]
        orla.close()


def test_what_changes_in_the_directory_is_followed(core: ScriptedCore, replica: Replica) -> None:
    orla = replica()
    with ScriptedCore(*core.backends, epoch=2, key_env=core.key_env) as second:
        core.cores = {"": [core.url, second.url]}
        core.line.send(core.welcome())
        link = orla.core.serving.link  # type: ignore[attr-defined]
        eventually(lambda: len(link.places.addresses()) == 2)
        core.gone()
        second.wait(Ready)
        orla.close()


def test_a_standby_says_where_the_core_is(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    with ScriptedCore() as standby:
        standby.answer = (
            b"HTTP/1.1 503 Service Unavailable\r\nx-orla-cores: " + core.url.encode() + b", http://core:1\r\n"
            b"Content-Length: 0\r\n\r\n"
        )
        orla = replica(standby.url, key="key")
        assert Run(orla.wrap(graph(engine))).result()
        assert [each.text for each in orla.core.serving.link.places.addresses()] == [core.url, standby.url]  # type: ignore[attr-defined]


def test_two_addresses_of_one_core_make_one_connection(core: ScriptedCore, replica: Replica) -> None:
    port = core.url.rpartition(":")[2]
    orla = replica(f"{core.url},http://localhost:{port}")
    for times in range(1, 4):
        core.wait(Ready, times)
        core.drop()
    core.wait(Ready, 4)
    time.sleep(0.3)
    assert len(core.connections) == 4
    orla.close()


def test_a_frozen_server_does_not_keep_the_next_one_waiting(core: ScriptedCore, replica: Replica) -> None:
    with unanswering() as frozen:
        began_s = time.monotonic()
        replica(f"{frozen},{core.url}")
        assert time.monotonic() - began_s < 2.0
        with pytest.raises(BackendUnavailable, match="does not answer"):
            Orla.remote(frozen, core_patience_s=0.3)


def test_a_core_of_another_pool_is_none(core: ScriptedCore, replica: Replica) -> None:
    core.pool = "a"
    orla = replica()
    link = orla.core.serving.link  # type: ignore[attr-defined]
    core.pool = "b"
    core.drop()
    eventually(lambda: "for pool 'b', not for 'a'" in link.fault)
    core.pool = "a"
    eventually(lambda: link.up)


def test_a_search_leaves_no_thread_behind(core: ScriptedCore, replica: Replica) -> None:
    def searching() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "orla-link-dial"]

    eventually(lambda: not searching())
    orla = replica()
    core.gone()
    eventually(searching)
    orla.close()
    eventually(lambda: not searching())


def test_a_core_that_confirms_nothing_is_left_for_another_one(
    core: ScriptedCore, replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that lost its store: it goes on saying things, and holds no lease."""
    monkeypatch.setattr(connection, "UNCONFIRMED_S", 0.3)
    monkeypatch.setattr(connection, "RENEW_S", 0.05)
    with ScriptedCore(*core.backends, epoch=2, key_env=core.key_env) as second:
        orla = replica()
        core.line.silent = True
        until_s = time.monotonic() + 0.6
        while time.monotonic() < until_s:
            core.line.send(core.welcome())  # the only one that there is, as far as it says
            time.sleep(0.02)
        assert len(core.connections) == 1 and not second.connections
        core.cores = {"": [core.url, second.url]}
        core.line.send(core.welcome())
        core.answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
        second.wait(Ready)
        orla.close()
