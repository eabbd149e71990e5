"""Names that are no more are told apart from names that never were."""

from __future__ import annotations

from pathlib import Path

import pytest

from orla_lg import config
from orla_lg.core.boundary import removed
from orla_lg.core.policies import policy
from orla_lg.errors import ConfigError


def test_a_removed_policy_says_so_and_why() -> None:
    with pytest.raises(ConfigError, match=r"policy 'critical_path' was removed: .*'shortest_remaining'"):
        policy("critical_path")
    with pytest.raises(ConfigError, match="unknown scheduling policy 'critical_paths'"):
        policy("critical_paths")


def test_a_removed_policy_in_a_file_says_so_and_where(tmp_path: Path) -> None:
    file = tmp_path / "orla.toml"
    file.write_text("stage_policy = 'critical_path'\n[backends.b]\nurl = 'http://127.0.0.1:1/v1'")
    with pytest.raises(ConfigError, match=r"orla\.toml: stage_policy: .*was removed"):
        config.load(file)


@pytest.mark.parametrize("name", ["kv_events", "kv_replay"])
def test_a_removed_key_in_a_file_says_so_and_where(tmp_path: Path, name: str) -> None:
    file = tmp_path / "orla.toml"
    file.write_text(f"[backends.b]\nurl = 'http://127.0.0.1:1/v1'\n{name} = 'tcp://h:1'")
    with pytest.raises(ConfigError, match=rf"backends.b.{name}: key '{name}' was removed: "):
        config.load(file)


def test_only_names_are_looked_up() -> None:
    assert removed.reason("policy", ["critical_path"]) is None and removed.reason("memory", "critical_path") is None
