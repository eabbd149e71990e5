"""What travels to an actor, and what becomes of it on a node."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from orla_lg.errors import ConfigError
from orla_lg.serve.ray.shipping import ShippedSettings

TEXT = '[backends.main]\nurl = "http://127.0.0.1:9/v1"\n[serve]\nstore = "s.db"\npool = "chat"\n'


def shipped(path: Path, **more: Any) -> ShippedSettings:
    return ShippedSettings(**{"path": str(path), "text": TEXT, "host": "127.0.0.1", "port": 9000, **more})


def test_the_same_file_is_used_where_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "orla.toml"
    file.write_text(TEXT)
    travelled = pickle.loads(pickle.dumps(shipped(file)))
    with travelled.opened("10.0.0.7") as chosen:
        assert chosen.source == str(file) and chosen.table.store == str(tmp_path / "s.db")
        assert str(chosen.listen) == "127.0.0.1:9000" and chosen.table.standby and chosen.table.pool == "chat"


def test_elsewhere_a_copy_is_as_long_as_its_server_runs(tmp_path: Path) -> None:
    with shipped(tmp_path / "not here" / "orla.toml", pool="code").opened("10.0.0.7") as chosen:
        copy = Path(chosen.source)
        assert copy.read_text() == TEXT and copy.stat().st_mode & 0o077 == 0
        assert chosen.table.pool == "code" and [each.name for each in chosen.core.backends] == ["main"]
    assert not copy.exists()


def test_a_node_listens_at_its_own_address_or_says_that_one(tmp_path: Path) -> None:
    with shipped(tmp_path / "x", host=None).opened("10.0.0.7") as chosen:
        assert str(chosen.listen) == "10.0.0.7:9000"
    with shipped(tmp_path / "x", host="0.0.0.0").opened("10.0.0.7") as chosen:
        assert chosen.table.advertise == ("http://10.0.0.7:9000",) and chosen.table.names == ("10.0.0.7",)


def test_a_key_does_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXT.replace("[serve]", 'api_key_env = "ENGINE_KEY"\n[serve]')
    monkeypatch.setenv("ENGINE_KEY", "secret-of-the-engine")
    sent = shipped(tmp_path / "x", text=text)
    assert b"secret-of-the-engine" not in pickle.dumps(sent) and TEXT not in repr(sent)
    monkeypatch.delenv("ENGINE_KEY")
    with pytest.raises(ConfigError, match="ENGINE_KEY"), sent.opened("10.0.0.7"):
        pass


def test_what_serves_alike_has_one_fingerprint(tmp_path: Path) -> None:
    assert shipped(tmp_path / "x").fingerprint == shipped(tmp_path / "x").fingerprint
    assert shipped(tmp_path / "x").fingerprint != shipped(tmp_path / "x", text=TEXT + " ").fingerprint
