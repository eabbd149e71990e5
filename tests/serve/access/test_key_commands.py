"""``orla-lg keys``, as its user sees it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from orla_lg.cli import main
from orla_lg.core.limits.limits import Limit
from orla_lg.errors import ConfigError
from orla_lg.serve.access.access import Access
from orla_lg.serve.access.commands import limit_of, store_file
from orla_lg.serve.access.keys import Keyring, KeyScope
from orla_lg.serve.store.sqlite import SqliteStore
from tests.redis_server import RedisServer
from tests.serve.access.test_budgets import spend, started
from tests.serve.fixtures import bearer

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def keys(capsys: Out, *words: str, fails: bool = False) -> str:
    assert main(["keys", *words]) == int(fails)
    out, err = capsys.readouterr()
    return err if fails else out


def as_json(capsys: Out, *words: str) -> Any:
    return json.loads(keys(capsys, *words, "--json"))


def test_a_key_is_made_shown_listed_and_revoked(capsys: Out, here: Path) -> None:
    assert "no keys; a server on 127.0.0.1 is open" in keys(capsys, "list")
    assert not (here / "state").exists()  # to look makes nothing
    assert main(["keys", "create", "ci", "--tenant", "acme", "--limit", "5 usd per 30d", "--concurrency", "4"]) == 0
    out, err = capsys.readouterr()
    secret = out.strip()
    assert out == f"{secret}\n" and secret.startswith("orla-")  # so that KEY=$(…) takes it
    assert "shown this once" in err and "the first key: from now on" in err and secret not in err
    assert main(["keys", "create", "second"]) == 0
    assert "first key" not in capsys.readouterr().err
    listed = keys(capsys, "list")
    assert [line.split()[1] for line in listed.splitlines()] == ["name", "ci", "second"]
    assert "acme" in listed and "$5 per 30d, 4 at once" in listed and secret not in listed
    assert {line.split()[2] for line in listed.splitlines()[1:]} == {"valid"}
    said = keys(capsys, "show", "ci")
    assert "$5 per 30d ($0 spent)" in said and "valid" in said and secret not in said
    (found,) = [key for key in as_json(capsys, "list") if key["name"] == "ci"]
    assert found["limits"] == [{"cost_usd": 5.0, "per_s": 2_592_000.0}] and "sha256" not in found
    assert as_json(capsys, "show", found["id"])["limits"][0]["spent"]["calls"] == 0
    assert keys(capsys, "revoke", "ci", "second").count("is revoked") == 2
    listed = keys(capsys, "list")
    assert [line.split()[2] for line in listed.splitlines()] == ["state", "revoked", "revoked"]
    assert as_json(capsys, "show", "ci")["revoked"] and as_json(capsys, "show", "ci")["state"] == "revoked"
    assert [key["state"] for key in as_json(capsys, "list")] == ["revoked", "revoked"]
    assert "open to this machine again" in keys(capsys, "revoke", "ci", "second", "--delete")
    assert as_json(capsys, "list") == []


def test_what_is_made_is_what_a_server_heeds(capsys: Out, here: Path) -> None:
    made = as_json(
        capsys, "create", "app", "--scope", "link", "--scope", "use", "--tenant", "a", "--tenant", "b",
        "--tag", "team=blue", "--tag", "x=", "--backend", "gpu-*", "--stage", "draft", "--limit", "60 calls/1m",
        "--expires", "12h",
    )  # fmt: skip
    store = SqliteStore(here / "state" / "orla-lg" / "serve.db")
    access = Access(keyring := Keyring(store))
    caller = access.admit(bearer(made["key"]), scope=KeyScope.LINK, loopback=False)
    assert (caller.tenants, dict(caller.tags)) == (("a", "b"), {"team": "blue", "x": ""})
    assert (caller.backends, caller.stages, set(caller.scopes)) == (
        ("gpu-*",), ("draft",), {KeyScope.LINK, KeyScope.USE},
    )  # fmt: skip
    assert [layer.whole for layer in access.layers(caller)] == [Limit(calls=60, per_s=60.0)]
    keyring.close()
    store.close()
    assert as_json(capsys, "create", "any", "--tenant", "*")["tenants"] is None
    assert as_json(capsys, "create", "none")["tenants"] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--limit", "5 bananas"], '"60 calls per 1m"'), (["--limit", "1.5 calls"], "whole calls"),
        (["--limit", "-5 usd"], "must be like"), (["--limit", "5 usd per"], "must be like"),
        (["--limit", "5 usd per 0d"], "must be a time"), (["--limit", "5 usd per year"], "must be a time"),
        (["--expires", "soon"], "12h, 90d or 2w, or a day as 2027-01-31"), (["--expires", "2001-01-31"], "is over"),
        (["--tag", "team"], "NAME=VALUE"), (["--tag", "=x"], "NAME=VALUE"), (["--concurrency", "0"], "concurrency"),
        (["--tenant", ""], "tenants"), (["--backend", "a\nb"], "backends"), (["--store", "a\0b"], "--store"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_and_nothing_is_made(capsys: Out, here: Path, words: list[str], said: str) -> None:
    assert said in keys(capsys, "create", "ci", *words, fails=True)
    assert not (here / "state").exists()


def test_a_scope_that_is_none_is_said_with_those_that_there_are(capsys: Out) -> None:
    with pytest.raises(SystemExit):
        main(["keys", "create", "ci", "--scope", "admin"])
    said = capsys.readouterr().err
    assert "KeyScope" not in said and re.search("use'?, '?link'?, '?gateway'?, '?view'?, '?control", said)


@pytest.mark.parametrize("name", ["show", "revoke"])
def test_a_key_that_is_not_there_is_said_so_and_a_key_itself_is_not_repeated(capsys: Out, name: str) -> None:
    secret = keys(capsys, "create", "ci").strip()
    assert "no key has the id or name 'cx'; known: " in keys(capsys, name, "cx", fails=True)
    assert secret not in keys(capsys, name, secret, fails=True)


def test_one_wrong_name_revokes_none(capsys: Out) -> None:
    keys(capsys, "create", "ci")
    keys(capsys, "revoke", "ci", "cx", fails=True)
    assert as_json(capsys, "show", "ci")["revoked"] is None


@pytest.mark.parametrize(
    ("said", "limit"),
    [
        ("60 calls per 1m", Limit(calls=60, per_s=60)), ("1 call", Limit(calls=1)),
        ("2M tokens/1d", Limit(tokens=2_000_000, per_s=86_400)),
        ("1_500 tokens", Limit(tokens=1500)), ("1.5k tokens", Limit(tokens=1500)), ("$0.5 per 2w", None),
        ("0.5 usd per 2w", Limit(cost_usd=0.5, per_s=1_209_600)), ("5$/1h", Limit(cost_usd=5, per_s=3600)),
        ("90 seconds per 1.5h", Limit(wall_s=90, per_s=5400)), (" 3CALLS ", Limit(calls=3)),
    ],
)  # fmt: skip
def test_limits_are_read_as_they_are_said(said: str, limit: Limit | None) -> None:
    if limit is None:
        with pytest.raises(ConfigError):
            limit_of(said)
    else:
        assert limit_of(said) == limit


def test_the_store_is_the_servers(capsys: Out, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store_file("x.db", None) == (Path("x.db"), "--store")
    assert store_file(None, None)[0] == here / "state" / "orla-lg" / "serve.db"
    folder = here / "app"
    (folder / "below").mkdir(parents=True)
    folder.chmod(0o700)
    (folder / "orla.toml").write_text('[serve]\nstore = "own/keys.db"\n[backends.x]\nurl = 1\n')
    monkeypatch.chdir(folder / "below")
    assert store_file(None, None) == (folder / "own" / "keys.db", f"{folder / 'orla.toml'}: serve.store")
    keys(capsys, "create", "ci")
    assert (folder / "own" / "keys.db").is_file()
    other = here / "other.toml"
    other.write_text("")
    assert store_file(None, str(other))[0] == here / "state" / "orla-lg" / "serve.db"
    monkeypatch.setenv("ORLA_CONFIG", str(folder / "orla.toml"))
    monkeypatch.chdir(here)
    assert as_json(capsys, "list")[0]["name"] == "ci"
    other.write_text("[serve")
    assert "cannot be read" in keys(capsys, "list", "--config", str(other), fails=True)
    other.write_text("[serve]\nstore = 5")
    assert "serve.store must be the path" in keys(capsys, "list", "--config", str(other), fails=True)


def test_show_says_what_was_spent(capsys: Out, here: Path) -> None:
    made = as_json(capsys, "create", "ci", "--limit", "5 usd per 1d")
    store = SqliteStore(here / "state" / "orla-lg" / "serve.db")
    access = Access(keyring := Keyring(store))
    caller = access.admit(bearer(made["key"]), scope=KeyScope.USE, loopback=False)
    book, spent, *_ = started(store, wall_s=time.time())
    spend(book, access.layers(caller))
    spent.close()
    keyring.close()
    store.close()
    assert "$5 per 1d ($0.1 spent)" in keys(capsys, "show", "ci")


@pytest.mark.parametrize("words", [(), ("create",), ("list",), ("show",), ("revoke",)])
def test_help_teaches(capsys: Out, words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit):
        main(["keys", *words, "--help"])
    said = capsys.readouterr().out
    assert "revoke" in said or words
    if words in ((), ("create",)):
        assert "scopes: use " in said and "Bearer" in said and "orla-lg keys create ci" in said


def test_keys_are_made_in_a_store_on_another_machine(
    capsys: Out, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer(here / "redis", "--requirepass", "w0rd") as server:
        assert "store_password_env" in keys(capsys, "list", "--store", server.url, fails=True)
        monkeypatch.setenv("ORLA_STORE_PASSWORD", "w0rd")
        assert "no keys" in keys(capsys, "list", "--store", server.url)
        monkeypatch.delenv("ORLA_STORE_PASSWORD")
        monkeypatch.setenv("ORLA_TEST_WORD", "w0rd")
        (here / "orla.toml").write_text(f'[serve]\nstore = "{server.url}"\nstore_password_env = "ORLA_TEST_WORD"\n')
        secret = keys(capsys, "create", "ci").strip()
        (made,) = as_json(capsys, "list", "--store", server.url)
        assert made["name"] == "ci" and secret not in json.dumps(made)
        keys(capsys, "revoke", "ci")
        assert as_json(capsys, "list")[0]["state"] == "revoked"
        (here / "orla.toml").write_text('[serve]\nstore = "redis://:w0rd@store.example/0"\n')
        refused = keys(capsys, "list", fails=True)
        assert "store_plain_text" in refused and "w0rd" not in refused
        (here / "orla.toml").write_text(f'[serve]\nstore = "{server.url}"\nstore_plain_text = 1\n')
        assert "store_plain_text must be true or false" in keys(capsys, "list", fails=True)
