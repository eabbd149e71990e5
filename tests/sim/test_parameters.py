"""Parameters: kept, read back, and refused where they cannot be right."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.errors import ConfigError
from orla_lg_sim.parameters import EngineParameters, load, parameters_of


@given(st.floats(0, 10, allow_subnormal=False), st.integers(1, 10**6), st.booleans())
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, cost: float, blocks: int, flag: bool
) -> None:
    path = tmp_path_factory.mktemp("saved") / "engine.toml"
    written = EngineParameters(prefill_token_s=cost, kv_blocks=blocks, priority=flag)
    written.save(path)
    assert load(path) == written


def test_what_is_not_said_keeps_its_default(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text("kv_blocks = 7\nstep_s = 1\n", encoding="utf-8")
    assert load(path) == EngineParameters(kv_blocks=7, step_s=1.0)
    assert load(path).kv_tokens == 7 * 32 == load(path).longest_tokens


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"kv_block": 3}, "unknown engine parameters"),
        ({"kv_blocks": 0}, "at least 1"),
        ({"kv_blocks": "many"}, "type int"),
        ({"kv_blocks": True}, "type int"),
        ({"step_s": -1.0}, "0 or more"),
        ({"step_s": float("nan")}, "0 or more"),
        ({"watermark": 1.0}, "below 1"),
        ({"max_running": 64, "max_batch_tokens": 32}, "must not exceed"),
    ],
)
def test_what_cannot_be_right_is_refused(said: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parameters_of(said)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("kv_blocks = ", encoding="utf-8")
    for path in (broken, tmp_path / "missing.toml"):
        with pytest.raises(ConfigError, match=str(path)):
            load(path)
