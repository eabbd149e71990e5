"""What only llama.cpp's adapter reads out of its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from orla_lg import Backend
from orla_lg_llamacpp.adapter import LlamaCppAdapter, _drawn_at_start
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings


@pytest.mark.parametrize(
    ("marker", "drawn"),
    [("<__media_Hs3SEXl3IDpiyQwjP2a1TSOa6x44F0lh__>", True), ("<__media__>", False), (None, False)],
)
def test_a_restart_is_told_by_what_the_server_draws_not_by_what_is_always_the_same(
    marker: str | None, drawn: bool
) -> None:
    assert _drawn_at_start({"media_marker": marker}) == (marker if drawn else "")
    assert _drawn_at_start({"media_marker": marker, "ui_settings": {"theme": "dark"}}) == (marker if drawn else "")


@pytest.mark.engine
async def test_an_embedded_engine_tells_its_starts_apart_and_the_folders_it_saves_to(tmp_path: Path) -> None:
    probes = []
    for folder in (tmp_path, tmp_path, None, None):
        with EmbeddedEngine(EngineSettings(slots=1, context_tokens=64, save_dir=folder)) as engine:
            adapter = LlamaCppAdapter(Backend("b", engine.url, engine="llamacpp"))
            probes.append(await adapter.probe())
            assert probes[-1].incarnation == (await adapter.probe()).incarnation
            await adapter.aclose()
    assert len({probe.incarnation for probe in probes}) == 4
    kept, again, made, made_again = (probe.weights for probe in probes)
    assert kept == again and len({kept, made, made_again}) == 3
