"""What only llama.cpp's adapter reads out of its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orla_lg import Backend
from orla_lg.testing.faults.answers import in_common, words_of
from orla_lg_llamacpp.adapter import LlamaCppAdapter, _drawn_at_start
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from tests.stub_engine import StubEngine
from tests.wire.asking import fields


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


async def test_where_tenants_are_isolated_nothing_is_reused_that_may_be_anybodys() -> None:
    with StubEngine(slots=2) as stub:
        plain = LlamaCppAdapter(Backend("b", stub.url, engine="llamacpp"))
        apart = LlamaCppAdapter(Backend("b", stub.url, engine="llamacpp", isolate_tenants=True))
        assert not fields(apart, slot=0)["cache_prompt"], "whether it keeps copies is not known yet"
        await plain.probe()
        await apart.probe()
        assert fields(plain)["cache_prompt"] and fields(plain, slot=0)["cache_prompt"]
        assert fields(apart, slot=0)["cache_prompt"]
        assert not fields(apart)["cache_prompt"], "it takes the slot with the most similar prompt, whosever it was"
        assert not fields(apart, slot=0, fresh=True)["cache_prompt"]


async def test_an_engine_that_keeps_copies_reuses_nothing_where_tenants_are_isolated() -> None:
    with KeepsCopies(slots=2) as stub:
        apart = LlamaCppAdapter(Backend("b", stub.url, engine="llamacpp", isolate_tenants=True))
        await apart.probe()
        assert not fields(apart, slot=0)["cache_prompt"]


class KeepsCopies(StubEngine):
    """A server with ``--cache-ram``: a prompt that left its slot is found again."""

    def __init__(self, **settings: int) -> None:
        super().__init__(**settings)
        self.copies: list[list[str]] = []

    def _cached(self, slot: int | None, body: dict[str, Any]) -> int:
        words = words_of(body["messages"])
        self.copies.append(words)
        return max(super()._cached(slot, body), *(in_common(words, each) for each in self.copies[:-1]), 0)
