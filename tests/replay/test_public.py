"""Public traces, in small files of the same forms."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from orla_lg.errors import ConfigError
from orla_lg.replay.prompts import block_hashes, chain_to
from orla_lg.replay.public import read
from orla_lg.replay.workload import workload_of


def mooncake(folder: Path, *rows: object) -> Path:
    path = folder / "trace.jsonl.gz"
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    return path


def row(at_ms: int, prompt: int, *ids: int) -> dict[str, object]:
    return {"timestamp": at_ms, "input_length": prompt, "output_length": 3, "hash_ids": list(ids)}


def test_mooncakes_blocks_are_prefixes(tmp_path: Path) -> None:
    rows = row(3000, 1100, 1, 2, 3), row(3000, 1100, 1, 2, 4), row(6000, 700, 1, 2), "x", {"timestamp": 1}
    seen = read(mooncake(tmp_path, *rows), "mooncake")
    assert [call.arrived_s for call in seen.calls] == [0.0, 1.5, 3.0], "those of one tick lie evenly within it"
    assert not seen.happened and seen.broken == 2 and seen.faults[0].startswith("line 4 ")
    made = workload_of(seen)
    one, other, third = (
        block_hashes(chain_to(each.seen.prompt), each.seen.prompt_tokens or 0, 128) for each in made.calls
    )
    assert one[:8] == other[:8] and not {*one[8:]} & {*other[8:]}
    assert third == one[:5], "a part of a block is found by a block of the engine"
    assert made.knows_prompts


@pytest.mark.parametrize(
    "head", ["TIMESTAMP,ContextTokens,GeneratedTokens", "timestamp_ms,input_tokens,output_tokens"]
)
def test_azures_lines_have_lengths_alone(tmp_path: Path, head: str) -> None:
    first, second = ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:04.0319600") if "TIME" in head else ("0", "52")
    path = tmp_path / "trace.csv"
    path.write_text(f"{head}\n{first},100,5\n{second},0,7\nno,1,2\n{first},1e99,2\n")
    seen = read(path, "azure")
    assert [(call.prompt_tokens, call.completion_tokens) for call in seen.calls] == [(100, 5), (1, 7)]
    assert seen.calls[1].arrived_s == pytest.approx(0.052) and seen.broken == 2


def test_a_file_of_another_form_says_so(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("hello\n")
    for form, right in (("mooncake", "line 1 is no arrival"), ("azure", "expected TIMESTAMP")):
        with pytest.raises(ConfigError, match=right):
            read(path, form)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none", "azure")
