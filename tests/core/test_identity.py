from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.boundary.stage_keys import stage_key
from orla_lg.core.identity import TENANT_MARK, standalone, tenant_of, workflow_key, workflow_name


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


NAMES = st.one_of(
    st.text(), st.sampled_from(["", "1", TENANT_MARK, f"{TENANT_MARK}4:acme1", "a\0b", "\ud800"]),
    st.builds(workflow_key, st.text(max_size=3), st.text(max_size=3)),
)  # fmt: skip
"""Threads and tenants as hostile users choose them, keys of others among them."""


@given(NAMES, NAMES, NAMES, NAMES)
def test_no_two_workflows_have_one_key(name: str, tenant: str, other: str, others: str) -> None:
    key = workflow_key(name, tenant)
    assert (tenant_of(key), workflow_name(key)) == (tenant, name)
    assert (key == workflow_key(other, others)) == ((name, tenant) == (other, others))
    assert workflow_key(tenant + name, "") != key or not tenant
    assert workflow_key(key, "") != key or not tenant


@given(st.text().filter(lambda name: not name.startswith(TENANT_MARK)))
def test_without_a_tenant_a_threads_id_is_its_key(name: str) -> None:
    assert workflow_key(name) == workflow_key(name, "") == name
