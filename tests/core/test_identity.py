from __future__ import annotations

import pytest

from orla_lg.core.identity import stage_key, standalone


@pytest.mark.parametrize(
    ("namespace", "stage"),
    [
        ("", ""),
        ("node:2a", "node"),
        ("sub:1f|node:2a", "sub|node"),
        ("node:1f|1|agent:2a", "node|agent"),
        ("node:1f|1", "node"),
    ],
)
def test_stage_keys_are_the_same_from_run_to_run(namespace: str, stage: str) -> None:
    assert stage_key(namespace) == stage


def test_a_call_outside_any_graph_is_a_workflow_of_its_own() -> None:
    alone = standalone("7", identified=False)
    assert (alone.workflow, alone.run, alone.stage, alone.identified) == ("call-7", None, "", False)
