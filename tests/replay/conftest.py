"""Records of agents under three policies, written in virtual time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.pressure.workflows import LocalWords, Shape, load_of, made_up
from bench.replay.turns import POLICIES, arm, of_different_lengths, simulated_turn
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.text import WordTokenizer

SESSIONS, CAP = 12, 4
BLOCK_TOKENS, BLOCKS = 32, 150


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By policy, the records of the same agents."""
    folder, words = tmp_path_factory.mktemp("records"), LocalWords(WordTokenizer())
    engine = replace(EngineParameters(jitter=0.1, held_token_s=3e-6), kv_blocks=BLOCKS, block_tokens=BLOCK_TOKENS)
    load = of_different_lengths(load_of(made_up(SESSIONS, 2100), Shape(SESSIONS), words, 0))
    files = {policy: folder / f"{policy}.jsonl" for policy in POLICIES}
    for policy, file in files.items():
        simulated_turn(engine, words, arm(policy, file), load, CAP)
    return files
