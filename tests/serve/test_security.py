"""The server against those that mean it ill: over real sockets, with uvicorn, by bytes where it matters."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orla_lg.core.boundary.masking import Masking
from orla_lg.core.limits.limits import Limit
from orla_lg.serve.access.access import Denied
from orla_lg.serve.access.keys import KeyScope, revoke
from orla_lg.serve.http import protocol as http_protocol
from orla_lg.serve.http.guard import LOOPBACK_NAMES, MIB, HttpGuard, is_loopback, scope_of
from orla_lg.serve.http.protocol import MOST_HEAD_BYTES, MOST_HEADERS
from orla_lg.serve.store.sqlite import SqliteStore
from orla_lg.serve.store.store import MemoryStore, Store
from tests.serve.fixtures import Served, make, until
from tests.timed import within

GUARD = HttpGuard(max_body_bytes=1000, body_timeout_s=30.0)


@pytest.fixture(scope="module")
def opened() -> Iterator[Served]:
    """A server without any key."""
    with Served(guard=GUARD) as served:
        yield served


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    """A server with keys."""
    store: Store = MemoryStore()
    make(store, "another's")
    with Served(store, GUARD) as served:
        yield served


def auth(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


# Keys

ROUTES = [
    ("POST", "/v1/chat/completions"), ("POST", "/v1/messages"), ("GET", "/v1/models"), ("GET", "/metrics"),
    ("GET", "/v1/orla/statistics"), ("POST", "/v1/orla/reload"), ("POST", "/api/v1/backends"), ("GET", "/"),
    ("DELETE", "/api/v1/backends/x"), ("GET", "/v1/orla/link"), ("GET", "/anything"), ("OPTIONS", "/v1/models"),
    ("GET", "/healthz/"), ("GET", "/healthz/../v1/models"), ("GET", "//healthz"), ("GET", "/%68ealthz/x"),
    ("HEAD", "/"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_health_needs_a_key_once_one_exists(locked: Served, method: str, path: str) -> None:
    before = len(locked.app.seen)
    answer = locked.ask(method, path)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == 'Bearer realm="orla-lg"'
    assert locked.ask(method, path, headers=auth("orla-" + "a" * 52)).status_code == 401
    assert len(locked.app.seen) == before


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/api/v1/health"])
def test_health_needs_no_key_and_no_name(locked: Served, path: str) -> None:
    assert locked.ask("GET", path, headers={"host": "10.1.2.3:8081"}).status_code == 200


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_key_opens_the_routes_of_its_scope_alone(locked: Served, method: str, path: str) -> None:
    needed = scope_of(method, path)
    for scope in KeyScope:
        _, secret = make(locked.store, scopes=(scope,))
        answer = locked.ask(method, path, headers=auth(secret))
        opens = scope is needed or (scope is KeyScope.GATEWAY and needed is KeyScope.LINK)  # a gateway has a link
        assert answer.status_code == (200 if opens else 403), (scope, needed)


def test_what_needs_which_scope() -> None:
    assert scope_of("POST", "/v1/chat/completions") is scope_of("GET", "/w/a/v1/models") is KeyScope.USE
    assert scope_of("GET", "/v1/orla/link") is KeyScope.LINK
    assert scope_of("GET", "/api/v1/backends") is scope_of("GET", "/metrics") is KeyScope.VIEW
    assert scope_of("DELETE", "/api/v1/backends/x") is scope_of("POST", "/v1/orla/reload") is KeyScope.CONTROL


def test_a_key_made_or_revoked_by_another_process_counts_within_a_second(tmp_path: Path) -> None:
    file = tmp_path / "state" / "serve.db"
    server, command = SqliteStore(file), SqliteStore(file, durable=True)
    with Served(server) as served:
        assert served.ask().status_code == 200
        assert served.ask().status_code == 200

        def made_and_revoked_s() -> float:
            begun_s = time.monotonic()
            made, secret = make(command)
            until(lambda: served.ask().status_code == 401)
            until(lambda: served.ask(headers=auth(secret)).status_code == 200)
            revoke(command, made, 1.0)
            until(lambda: served.ask(headers=auth(secret)).status_code == 401)
            return time.monotonic() - begun_s

        within(2.0, made_and_revoked_s)
    server.close()
    command.close()


def test_an_expired_key_lets_nothing_in(locked: Served) -> None:
    _, secret = make(locked.store, expires_s=time.time() + 0.1)
    assert locked.ask(headers=auth(secret)).status_code == 200
    time.sleep(0.15)
    answer = locked.ask(headers=auth(secret))
    assert answer.status_code == 401 and "expired" in answer.json()["error"]["message"]


def test_the_app_is_given_the_caller(locked: Served) -> None:
    _, secret = make(locked.store, "of acme", tenants=("acme",))
    locked.ask(headers={**auth(secret), "x-orla-tenant": "zenith"})
    caller = locked.app.scopes[-1]["orla.caller"]
    assert caller.name == "of acme"
    with pytest.raises(Denied, match="no calls of tenant 'zenith'"):
        caller.tenant_of("zenith")


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "x-real-ip", "via", "x-forwarded-host"])
def test_a_proxy_on_this_machine_does_not_open_the_server_to_others(opened: Served, header: str) -> None:
    assert opened.ask(headers={header: "127.0.0.1"}).status_code == 401


def test_behind_a_proxy_no_request_is_from_this_machine() -> None:
    with Served(guard=HttpGuard(behind_proxy=True)) as served:
        assert served.ask().status_code == 401


def test_which_peers_are_of_this_machine() -> None:
    assert is_loopback(None) and is_loopback(("127.8.0.1", 1)) and is_loopback(("::1", 1))
    assert is_loopback(("::ffff:127.0.0.1", 1))
    assert not any(
        map(is_loopback, [("10.0.0.1", 1), ("::ffff:10.0.0.1", 1), ("localhost", 1), ("127.0.0.1.nip.io", 1)])
    )


# Names and other sites


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8081", "localhost.evil.example", "127.0.0.1.nip.io", "localhost:x", "[::1", "",
     ":80", "127.0.0.1@evil.example", "127.0.0.2", "0.0.0.0", "2130706433", "localhost,evil.example", "localhost/x"],
)  # fmt: skip
def test_a_host_that_is_not_this_server_is_misdirected(opened: Served, locked: Served, host: str) -> None:
    for served in (opened, locked):
        request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        assert served.raw(request.encode()) == ([421], True)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8081", "127.0.0.1:1", "[::1]:8081", "[::1]", "localhost."])
def test_a_host_that_is_this_server_is_answered(opened: Served, host: str) -> None:
    request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert opened.raw(request.encode()) == ([200], True)


def test_names_of_the_configuration_and_the_address_that_a_connection_came_to() -> None:
    guard = HttpGuard(names=LOOPBACK_NAMES | {"orla.example"})
    assert guard.is_name("orla.example:443", "10.0.0.7") and guard.is_name("10.0.0.7:8081", "10.0.0.7")
    assert guard.is_name("[fe80::1]:8081", "fe80::1%eth0")
    assert not guard.is_name("10.0.0.8", "10.0.0.7") and not guard.is_name("10.0.0.8", None)
    assert not guard.is_name("x.orla.example", "10.0.0.7")


SIMPLE = [
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonx",
    "text/plain; application/json", "application/json-seq",
]  # fmt: skip
"""What a page of another site may have a browser send without asking first."""


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize("path", ["/api/v1/backends", "/v1/orla/reload", "/v1/chat/completions"])
def test_a_cross_site_post_is_no_json_and_changes_nothing(opened: Served, path: str, kind: str) -> None:
    before = len(opened.app.seen)
    answer = opened.ask("POST", path, content=b'{"a": 1}', headers={"content-type": kind} if kind else {})
    assert answer.status_code == 415
    assert opened.ask("POST", path, content=b"", headers={"content-type": kind} if kind else {}).status_code == 415
    assert len(opened.app.seen) == before


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_is_taken(opened: Served, kind: str) -> None:
    assert opened.ask("POST", "/v1/orla/reload", content=b"{}", headers={"content-type": kind}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://localhost.evil.example"},
        {"origin": "x"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "http://[::1"},
        {"origin": "http://localhost", "sec-fetch-site": "cross-site"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT"])
def test_another_sites_page_controls_nothing(opened: Served, method: str, headers: dict[str, str]) -> None:
    assert opened.ask(method, "/api/v1/backends/x", headers=headers).status_code == 403


def test_a_page_of_its_own_does(opened: Served) -> None:
    headers = {"origin": opened.url, "sec-fetch-site": "same-origin"}
    assert opened.ask("POST", "/v1/orla/reload", headers=headers).status_code == 200


def test_no_answer_invites_other_sites(opened: Served, locked: Served) -> None:
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    for served in (opened, locked):
        answer = served.ask("OPTIONS", "/v1/orla/reload", headers=headers)
        assert not [name for name in answer.headers if name.startswith("access-control")]


# Bodies

POST = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def test_a_body_of_the_largest_size_is_taken_and_a_larger_one_is_not(opened: Served) -> None:
    json = {"content-type": "application/json"}
    assert opened.ask(content=b"x" * 1000, headers=json).status_code == 200
    assert opened.app.seen[-1][2] == b"x" * 1000
    answer = opened.ask(content=b"x" * 1001, headers=json)
    assert answer.status_code == 413 and answer.headers["connection"] == "close"
    assert opened.ask(content=iter([b"x" * 600, b"x" * 400]), headers=json).status_code == 200
    assert opened.app.seen[-1][2] == b"x" * 1000
    assert opened.ask(content=iter([b"x" * 600, b"x" * 401]), headers=json).status_code == 413


def test_a_large_body_is_refused_before_it_comes(opened: Served) -> None:
    for length in (b"1001", b"9" * 18):
        assert opened.raw(POST + b"Content-Length: " + length + b"\r\n\r\n") == ([413], True)


def test_without_a_key_no_body_is_read(locked: Served) -> None:
    head = POST + b"Expect: 100-continue\r\nContent-Length: 900\r\n\r\n"
    assert locked.raw(head) == ([401], True)  # and no 100


def test_a_body_that_comes_slowly_is_given_up() -> None:
    with Served(guard=replace(GUARD, body_timeout_s=0.4)) as opened:
        _comes_slowly(opened)


def _comes_slowly(opened: Served) -> None:
    for parts in ((POST + b"Content-Length: 100\r\n\r\n", *[b"a"] * 20), (CHUNKED, *[b"1\r\na\r\n"] * 20)):
        before = len(opened.app.seen)
        assert opened.raw(*parts, pause_s=0.05) == ([408], True), "before its end, which never comes"
        assert len(opened.app.seen) == before


def test_a_body_that_breaks_off_reaches_no_app(opened: Served) -> None:
    before = len(opened.app.seen)
    with opened.connect() as sent:
        sent.sendall(POST + b'Content-Length: 100\r\n\r\n{"a": 1}')
    assert opened.ask().status_code == 200
    assert len(opened.app.seen) == before + 1


def test_a_disconnect_is_seen_by_the_app_after_the_body() -> None:
    gone: list[str] = []

    async def app(scope: object, receive: object, send: object) -> None:
        assert (await receive())["more_body"] is False  # type: ignore[operator]
        gone.append((await receive())["type"])  # type: ignore[operator]

    with Served(app=app) as served:
        with served.connect() as sent:
            sent.sendall(POST + b"Content-Length: 2\r\n\r\n{}")
            time.sleep(0.05)
        until(lambda: gone == ["http.disconnect"])


# Heads


@pytest.mark.parametrize(
    "head",
    [
        b"X: " + b"a" * MOST_HEAD_BYTES, b"X: a\r\n" * (MOST_HEADERS + 1), b"X" * (MOST_HEAD_BYTES + 1) + b": a",
    ],
    ids=["long", "many", "name"],
)  # fmt: skip
def test_a_head_that_is_too_large_is_refused(opened: Served, head: bytes) -> None:
    assert opened.raw(b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n" + head + b"\r\n\r\n") == ([431], True)


def test_a_head_without_an_end_is_refused_as_it_grows(opened: Served) -> None:
    endless = [b"GET /" + b"a" * 30_000, *[b"a" * 30_000] * 3]
    assert opened.raw(*endless, pause_s=0.01) == ([431], True)
    assert opened.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", *[b"a" * 30_000] * 3, pause_s=0.01) == (
        [431],
        True,
    )


def test_a_head_that_comes_slowly_or_not_at_all_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.2)
    with Served() as served:
        assert served.raw(b"GET / HTTP/1.1\r\n", *[b"X: a\r\n"] * 10, pause_s=0.05) == ([408], True)
        assert served.raw(waits=True) == ([], True)
        whole = b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with served.connect() as idle:
            assert served.raw(whole, whole[:9], waits=True) == ([200, 408], True)
            assert idle.recv(1) == b"", "nothing was sent"
    monkeypatch.setattr(http_protocol, "HEAD_S", 30.0)
    with Served() as served, served.connect() as kept:
        for _ in range(2):
            kept.sendall(whole)
            assert kept.recv(65536).startswith(b"HTTP/1.1 200 ")
            monkeypatch.setattr(http_protocol, "HEAD_S", 0.05)
            time.sleep(0.1)  # between two requests there may be more


# Shapes of request smuggling

NEXT = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
END = b"0\r\n\r\n"


def with_(headers: bytes, body: bytes, first: bytes = POST) -> tuple[bytes, bytes]:
    return first + headers + b"\r\n\r\n", body


SHAPES: dict[str, tuple[bytes, bytes]] = {
    "length and coding": with_(b"Content-Length: 6\r\nTransfer-Encoding: chunked", END + b"X"),
    "coding and length": with_(b"Transfer-Encoding: chunked\r\nContent-Length: 5", END + NEXT),
    "two lengths": with_(b"Content-Length: 2\r\nContent-Length: 44", b"{}" + NEXT),
    "the same length twice": with_(b"Content-Length: 2\r\nContent-Length: 2", b"{}"),
    "a list of lengths": with_(b"Content-Length: 2, 2", b"{}"),
    "length with a sign": with_(b"Content-Length: +2", b"{}"),
    "negative length": with_(b"Content-Length: -2", b"{}" + NEXT),
    "hexadecimal length": with_(b"Content-Length: 0x2", b"{}"),
    "length with a blank": with_(b"Content-Length: 1 2", b"{}"),
    "empty length": with_(b"Content-Length:", NEXT),
    "immense length": with_(b"Content-Length: 99999999999999999999999", b"{}"),
    "blank before the colon": with_(b"Content-Length : 2", b"{}"),
    "blank before the coding's colon": with_(b"Transfer-Encoding : chunked", END + NEXT),
    "unknown coding": with_(b"Transfer-Encoding: xchunked", NEXT),
    "identity": with_(b"Transfer-Encoding: identity", NEXT),
    "chunked and then identity": with_(b"Transfer-Encoding: chunked, identity", END + NEXT),
    "compressed and chunked": with_(b"Transfer-Encoding: gzip, chunked", END + NEXT),
    "two codings": with_(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", END + NEXT),
    "two codings, chunked last": with_(b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked", END + NEXT),
    "chunked twice": with_(b"Transfer-Encoding: chunked, chunked", END + NEXT),
    "coding after a tabulator": with_(b"Transfer-Encoding: \x0bchunked", END + NEXT),
    "coding in quotes": with_(b'Transfer-Encoding: "chunked"', END + NEXT),
    "coding on the next line": with_(b"Transfer-Encoding:\r\n chunked", END + NEXT),
    "a header over two lines": with_(b"X: a\r\n b\r\nContent-Length: 2", b"{}"),
    "coding in HTTP/1.0": with_(b"Transfer-Encoding: chunked", END + NEXT, POST.replace(b"1.1", b"1.0")),
    "line feeds alone": (POST.replace(b"\r\n", b"\n") + b"Content-Length: 2\n\n", b"{}"),
    "a header behind a line feed": with_(b"A: b\nTransfer-Encoding: chunked", END + NEXT),
    "a header behind a carriage return": with_(b"A: b\rTransfer-Encoding: chunked", END + NEXT),
    "NUL": with_(b"A: b\x00c\r\nContent-Length: 2", b"{}"),
    "chunk size with 0x": with_(b"Transfer-Encoding: chunked", b"0x2\r\n{}\r\n" + END),
    "chunk size with a sign": with_(b"Transfer-Encoding: chunked", b"-2\r\n{}\r\n" + END),
    "chunk size with a blank": with_(b"Transfer-Encoding: chunked", b"2 \r\n{}\r\n" + END),
    "immense chunk": with_(b"Transfer-Encoding: chunked", b"fffffffffffffffff\r\n{}\r\n" + END),
    "chunks with line feeds alone": with_(b"Transfer-Encoding: chunked", b"2\n{}\n0\n\n"),
    "chunk longer than it says": with_(b"Transfer-Encoding: chunked", b"1\r\n{}\r\n" + END),
    "a link with a body": with_(b"Connection: upgrade\r\nUpgrade: orla-link\r\nContent-Length: 44", NEXT),
    "a link with chunks": with_(
        b"Connection: upgrade\r\nUpgrade: orla-link\r\nTransfer-Encoding: chunked", END + NEXT
    ),
    "CONNECT": (b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", NEXT),
    "two hosts": (b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b""),
    "no host": (b"GET /v1/x HTTP/1.1\r\n\r\n", b""),
    "another host in the target": (b"GET http://evil.example/v1/x HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
    "no path": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
    "HTTP/0.9": (b"GET /v1/x\r\n\r\n", b""),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b""),
    "a blank in the target": (b"GET /v1/x y HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
    "a control character in the target": (b"GET /v1/\x01x HTTP/1.1\r\nHost: localhost\r\n\r\n", b""),
    "two keys": (b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\nAuthorization: a\r\nAuthorization: b\r\n\r\n", b""),
    "two kinds": with_(b"Content-Type: text/plain\r\nContent-Length: 2", b"{}"),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", ["at once", "in parts"])
def test_a_head_of_which_two_readers_may_think_differently_ends_the_connection(
    opened: Served, shape: str, parts: str
) -> None:
    head, body = SHAPES[shape]
    before = len(opened.app.seen)
    statuses, closed = opened.raw(head + body) if parts == "at once" else opened.raw(head, body)
    assert closed and statuses in ([400], [505]), statuses
    assert opened.app.seen[before:] == []


JAVA = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\nUpgrade: h2c\r\n"
"""What Java's own client sends with each request to a server that it does not know yet."""


def test_another_upgrade_is_ignored_and_the_body_is_the_requests(opened: Served) -> None:
    body = b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT
    for upgrade in (
        JAVA,
        b"Connection: upgrade\r\nupgrade:websocket\r\n",
        b"UPGRADE: orla-linked\r\nConnection: upgrade\r\n",
    ):
        request = POST + upgrade + body
        for sent in ((request + NEXT,), (request[:-9], request[-9:] + NEXT)):
            before = len(opened.app.seen)
            assert opened.raw(*sent) == ([200, 200], False)
            assert opened.app.seen[before:] == [("POST", "/v1/x", NEXT), ("GET", "/smuggled", b"")]
        assert opened.raw(request, request, request) == ([200] * 3, False)
        assert opened.app.seen[-3:] == [("POST", "/v1/x", NEXT)] * 3


def test_an_upgrade_that_is_seen_late_takes_no_body(opened: Served) -> None:
    head = POST + JAVA + b"Content-Length: %d\r\n\r\n" % len(NEXT)
    found = []
    for at in range(head.index(b"\r\nUpgrade"), head.index(b"Upgrade: h2c") + 9):
        before = len(opened.app.seen)
        found.append(opened.raw(head[:at], head[at:] + NEXT))
        assert found[-1] in (([400], True), ([200], False))  # parts may meet on their way, on a busy machine
        assert opened.app.seen[before:] == ([] if found[-1][1] else [("POST", "/v1/x", NEXT)])
    assert ([400], True) in found


def test_what_follows_an_upgrade_that_is_seen_late_is_not_read(opened: Served) -> None:
    head = b"GET /v1/x HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
    for sent in ((head[:-19], head[-19:] + NEXT), (head[:-19], head[-19:], NEXT)):
        before = len(opened.app.seen)
        statuses, closed = opened.raw(*sent)
        assert (statuses, closed) in (([200], True), ([200, 200], False))
        assert [path for _, path, _ in opened.app.seen[before:]] == ["/v1/x", "/smuggled"][: len(statuses)]


def test_a_header_behind_the_body_is_none_of_the_request(locked: Served) -> None:
    _, secret = make(locked.store)
    trailer = b"2\r\n{}\r\n0\r\nAuthorization: Bearer " + secret.encode() + b"\r\nX-Late: 1\r\n\r\n"
    assert locked.raw(CHUNKED + trailer)[0] == [401]
    good = CHUNKED.replace(b"Host", b"X-Api-Key: " + secret.encode() + b"\r\nHost", 1)
    for sent in ((good + trailer,), (good, trailer)):
        assert locked.raw(*sent) == ([200], False)
        assert not [name for name, _ in locked.app.scopes[-1]["headers"] if name in (b"x-late", b"authorization")]


def test_requests_one_after_another_on_a_connection_are_answered_in_order(opened: Served) -> None:
    before = len(opened.app.seen)
    first = POST + b"Content-Length: 2\r\n\r\n{}"
    assert opened.raw(first + CHUNKED + b"2\r\n{}\r\n" + END + NEXT + first) == ([200] * 4, False)
    assert [path for _, path, _ in opened.app.seen[before:]] == ["/v1/x", "/v1/x", "/smuggled", "/v1/x"]
    assert opened.raw(first + POST + b"Content-Length: x\r\n\r\n")[1]


# No key anywhere


def test_no_key_is_in_logs_errors_or_the_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("uvicorn", "uvicorn.error"):  # another test's server may have set up uvicorn's own logging
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
        monkeypatch.setattr(logging.getLogger(name), "disabled", False)
        caplog.set_level(logging.DEBUG, name)
    folder = tmp_path / "state"
    before = os.umask(0)
    try:
        store = SqliteStore(folder / "serve.db")
        made, secret = make(store, "of acme", tenants=("acme",), limits=(Limit(calls=1),), concurrency=1)
        secrets, texts = [secret, "orla-" + "b" * 52], []
        with caplog.at_level(logging.DEBUG), Served(store, GUARD) as served:
            for each in secrets:
                for headers in (auth(each), {"x-api-key": each}, {"authorization": f"Basic {each}"}):
                    for path in ("/v1/x", "/boom", "/v1/orla/reload", "/v1/x?key=1"):
                        texts.append(served.ask(path=path, headers=headers).text)
                        texts.append(served.ask(path=path, content=b"x", headers=headers).text)
                texts.append(served.ask(path="/v1/x", headers={"host": "evil", **auth(each)}).text)
                served.raw(b"GET / HTTP/1.1\r\nAuthorization: Bearer " + each.encode() + b"\r\nX y: z\r\n\r\n")
        files = [file for file in folder.iterdir() if file.is_file()]
        assert {file.name for file in files} == {"serve.db", "serve.db-wal", "serve.db-shm"}
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
        stored = b"".join(file.read_bytes() for file in files)
        store.close()
    finally:
        os.umask(before)
    assert made.sha256.encode() in stored  # they were searched
    assert "the app fails" in caplog.text
    for each in secrets:
        assert each.encode() not in stored and each[5:].encode() not in stored
        assert each not in caplog.text and not any(each in text for text in texts)


def test_a_server_key_in_any_text_is_masked() -> None:
    _, secret = make(MemoryStore())
    said = Masking().mask(f"no such key: {secret}, or Basic {'QWxhZGRpbjpvcGVu' * 2}==; orla-lg check helps")
    assert said == "no such key: orla-***, or Basic ***; orla-lg check helps"


def test_the_layer_has_bounds_by_itself() -> None:
    assert HttpGuard().max_body_bytes == 64 * MIB and HttpGuard().body_timeout_s == 60.0
