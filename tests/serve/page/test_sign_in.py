"""Signing in: what opens the stream, and what another site, another port and an old cookie do not."""

from __future__ import annotations

import base64
import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from orla_lg.serve.access import sessions
from orla_lg.serve.access.keys import KeyScope, revoke
from orla_lg.serve.access.sessions import SignIns, cookie_name
from orla_lg.serve.page.files import files
from orla_lg.serve.store.store import MemoryStore
from tests.serve.fixtures import make, until
from tests.serve.in_thread import Running
from tests.serve.page.reading import served
from tests.stub_engine import StubEngine

BOTH = (KeyScope.VIEW, KeyScope.CONTROL)
PAUSE = {"do": "pause", "backend": "other"}


class House:
    def __init__(self, running: Running, store: MemoryStore) -> None:
        self.running, self.store, self.url = running, store, running.url

    def key(self, *scopes: KeyScope) -> str:
        return make(self.store, scopes=scopes)[1]

    @contextlib.contextmanager
    def browser(self, key: str | None = None) -> Iterator[httpx.Client]:
        """Yield a client that keeps cookies, signed in with a key."""
        with httpx.Client(base_url=self.url, timeout=10.0) as browser:
            if key is not None:
                answer = browser.post("/page/sign-in", json={"key": key}, headers={"origin": self.url})
                assert answer.status_code == 200, answer.text
            yield browser


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    store = MemoryStore()
    make(store, "another's")
    with StubEngine() as engine, served(tmp_path_factory.mktemp("page"), engine, store) as running:
        yield House(running, store)


def status(browser: httpx.Client, **headers: str) -> int:
    with browser.stream("GET", "/v1/orla/events", headers=headers) as answer:
        return answer.status_code


def test_the_page_and_its_files_need_no_key_and_say_nothing(house: House) -> None:
    page = httpx.get(house.url, headers={"accept": "text/html,*/*"})
    assert page.status_code == 200 and page.text.startswith("<!doctype html>")
    for name in files():
        answer = httpx.get(f"{house.url}/page/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    for path in ("/page/none.js", "/page/../server.py", "/page/%2e%2e%2fserver.py", "/page/..%2froutes.py"):
        assert httpx.get(house.url + path).status_code in (401, 404)
    for path in ("/", "/v1/models", "/v1/orla/state", "/v1/orla/events"):
        assert httpx.get(house.url + path).status_code == 401
    assert httpx.get(house.url, headers={"accept": "text/html", "host": "evil.example"}).status_code == 421
    assert httpx.get(f"{house.url}/page/app.js", headers={"host": "evil.example"}).status_code == 421


def test_html_css_and_scripts_hold_nothing_inline() -> None:
    page = files()["index.html"][1].decode()
    assert (
        "<style" not in page and " style=" not in page and "javascript:" not in page and " on" + "click" not in page
    )
    for name, (_, content) in files().items():
        text = content.decode()
        assert "innerHTML" not in text and "eval(" not in text
        assert name == "icon.svg" or "http://www.w3.org" in text or "http:" not in text, name


def test_a_key_signs_a_browser_in_and_is_not_its_cookie(house: House) -> None:
    key = house.key(KeyScope.VIEW)
    with house.browser() as browser:
        answer = browser.post("/page/sign-in", json={"key": key})
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Path=/" in cookie and "Secure" not in cookie
        assert key not in answer.text + cookie and key.removeprefix("orla-") not in cookie
        assert status(browser) == 200
        assert browser.get("/v1/orla/state").status_code == 200
        assert browser.post("/page/sign-out", json={}).status_code == 200
        assert status(browser) == 401


def test_the_old_cookie_is_worth_nothing_after_signing_out(house: House) -> None:
    with house.browser(house.key(KeyScope.VIEW)) as browser:
        kept = dict(browser.cookies)
        browser.post("/page/sign-out", json={})
        assert httpx.get(f"{house.url}/v1/orla/state", cookies=kept).status_code == 401


@pytest.mark.parametrize("scopes", [(KeyScope.USE,), (KeyScope.LINK,), (KeyScope.CONTROL,)])
def test_a_key_that_may_not_view_signs_nothing_in(house: House, scopes: tuple[KeyScope, ...]) -> None:
    answer = httpx.post(f"{house.url}/page/sign-in", json={"key": house.key(*scopes)})
    assert answer.status_code == 403 and "view is needed" in answer.json()["message"]
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "sent", [{"key": "orla-" + "a" * 52}, {"key": ""}, {"key": 7}, [], {}, "x", {"key": "\ud800"}]
)
def test_what_is_no_key_signs_nothing_in(house: House, sent: object) -> None:
    answer = httpx.post(
        f"{house.url}/page/sign-in", content=json.dumps(sent), headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 401) and "set-cookie" not in answer.headers


def test_signing_in_takes_no_large_body_and_no_other_sites_page(house: House) -> None:
    url, key = f"{house.url}/page/sign-in", house.key(KeyScope.VIEW)
    assert httpx.post(url, json={"key": "x" * 5000}).status_code == 413
    assert httpx.post(url, data={"key": key}).status_code == 415
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}, {"origin": "null"}):
        for path in ("sign-in", "sign-out"):
            assert httpx.post(f"{house.url}/page/{path}", json={"key": key}, headers=headers).status_code == 403


def test_a_cookie_changes_something_for_its_own_page_alone(house: House) -> None:
    own = {"origin": house.url}
    with house.browser(house.key(*BOTH)) as browser:
        assert browser.post("/v1/orla/control", json=PAUSE, headers=own).status_code == 200
        assert browser.post("/v1/orla/control", json={**PAUSE, "do": "resume"}, headers=own).status_code == 200
        port = int(house.url.rpartition(":")[2])
        for headers in (
            {}, {"origin": f"http://127.0.0.1:{port + 1}"}, {"origin": "http://127.0.0.1"}, {"origin": "null"},
            {"origin": "http://evil.example"}, {**own, "sec-fetch-site": "same-site"},
            {**own, "sec-fetch-site": "cross-site"}, {"origin": f"http://localhost:{port}"},
        ):  # fmt: skip
            assert browser.post("/v1/orla/control", json=PAUSE, headers=headers).status_code == 403, headers
        assert browser.post("/v1/orla/control", content=b"{}", headers=own).status_code == 415
        assert status(browser, **{"sec-fetch-site": "cross-site"}) == 403
        assert status(browser, **{"sec-fetch-site": "same-site"}) == 403
        assert status(browser, **{"sec-fetch-site": "same-origin"}) == 200
    assert not house.running.orla.statistics().backends["other"].queue.paused


def test_a_cookie_opens_what_the_page_needs_and_no_model(house: House) -> None:
    with house.browser(make(house.store, scopes=tuple(KeyScope))[1]) as browser:
        own = {"origin": house.url}
        assert browser.post("/v1/chat/completions", json={"model": "main"}, headers=own).status_code == 401
        assert browser.get("/v1/models").status_code == 401
        assert browser.get("/v1/orla/link", headers=own).status_code == 401


def test_a_view_changes_nothing(house: House) -> None:
    with house.browser(house.key(KeyScope.VIEW)) as browser:
        assert browser.post("/v1/orla/control", json=PAUSE, headers={"origin": house.url}).status_code == 403


def test_a_session_ends_with_its_key(house: House) -> None:
    made, secret = make(house.store, scopes=BOTH)
    with house.browser(secret) as browser:
        revoke(house.store, made, time.time())
        until(lambda: browser.get("/v1/orla/state").status_code == 401, 2.0)


def test_basic_is_asked_for_on_one_path_and_becomes_a_cookie(house: House) -> None:
    with house.browser() as browser:
        asked = browser.get("/page/basic")
        assert asked.status_code == 401 and asked.headers["www-authenticate"].startswith("Basic ")
        wrong = browser.get("/page/basic", auth=("me", "orla-" + "a" * 52))
        assert wrong.status_code == 401 and wrong.headers["www-authenticate"].startswith("Basic ")
        key = house.key(KeyScope.VIEW)
        led_here = browser.get("/page/basic", auth=("me", key), headers={"sec-fetch-site": "cross-site"})
        assert led_here.status_code == 403
        answer = browser.get("/page/basic", auth=("me", key))
        assert answer.status_code == 303 and answer.headers["location"] == "/"
        assert status(browser) == 200
    assert httpx.get(f"{house.url}/v1/orla/state").headers["www-authenticate"].startswith("Bearer")
    encoded = base64.b64encode(f"me:{key}".encode()).decode()
    assert httpx.get(f"{house.url}/v1/orla/state", headers={"authorization": f"Basic {encoded}"}).status_code == 200


def test_without_keys_this_machine_needs_none(tmp_path: Path) -> None:
    with StubEngine() as engine, served(tmp_path, engine) as running:
        answer = httpx.post(f"{running.url}/page/sign-in", json={"key": "x"})
        assert answer.status_code == 409
        with httpx.stream("GET", f"{running.url}/v1/orla/events") as stream:
            assert stream.status_code == 200
        through = {"x-forwarded-for": "10.0.0.1"}
        assert httpx.get(f"{running.url}/v1/orla/state", headers=through).status_code == 401


def test_behind_a_proxy_the_cookie_is_for_tls_and_the_origin_is_a_name(tmp_path: Path) -> None:
    store = MemoryStore()
    secret = make(store, scopes=BOTH)[1]
    said = 'behind_proxy = true\nnames = ["orla.example"]'
    with StubEngine() as engine, served(tmp_path, engine, store, serve=said) as running:
        own = {"origin": "https://orla.example"}
        answer = httpx.post(f"{running.url}/page/sign-in", json={"key": secret}, headers=own)
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-orla-session-") and "Secure" in cookie
        sent = {"cookie": cookie.partition(";")[0], "x-forwarded-for": "10.0.0.1"}
        for host in ("orla.example", running.url.removeprefix("http://")):
            asked = {**sent, **own, "host": host}
            assert httpx.post(f"{running.url}/v1/orla/control", json=PAUSE, headers=asked).status_code == 200
            asked["origin"] = "https://evil.example"
            assert httpx.post(f"{running.url}/v1/orla/control", json=PAUSE, headers=asked).status_code == 403


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def cookie(token: str, name: str = cookie_name(8081, secure=False)) -> list[bytes]:
    return [f"other=1; {name}={token}; last=2".encode()]


def test_sign_ins_end_with_their_age_and_are_bounded() -> None:
    clock = Clock()
    signed = SignIns(clock)
    first = signed.begin("a")
    assert (found := signed.find(cookie(first))) is not None and found.key_id == "a"
    clock.now = sessions.AGE_S
    assert signed.find(cookie(first)) is None and not signed.holds(found.digest)
    kept = [signed.begin("a") for _ in range(sessions.MOST_OF_A_KEY + 3)]
    assert len(signed) == sessions.MOST_OF_A_KEY
    assert signed.find(cookie(kept[0])) is None and signed.find(cookie(kept[-1])) is not None
    for number in range(sessions.MOST_OF_ALL + 10):
        signed.begin(f"key-{number}")
    assert len(signed) == sessions.MOST_OF_ALL


@pytest.mark.parametrize("name", ["orla-session-8081", "orla-session", "__Host-orla-session-443"])
def test_a_cookie_is_found_among_those_of_other_ports(name: str) -> None:
    signed = SignIns()
    token = signed.begin("a")
    assert signed.find([b"orla-session-9=else; " + f"{name}={token}".encode()]) is not None
    assert signed.find([f"x{name}={token}".encode()]) is None
    assert cookie_name(443, secure=True) == "__Host-orla-session-443"
