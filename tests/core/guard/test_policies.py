"""The evaluator against a naive one, written again from v1's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg import AccessPolicy, ConfigError
from orla_lg.core.guard.globs import read_glob
from orla_lg.core.guard.guard import Guard
from orla_lg.core.guard.policies import KINDS, NO_TAGS, PolicyEvaluator
from orla_lg.core.guard.subject import AccessSubject

SUBJECTS = ["*", "team:red", "team:*", "team:[r-z]ed", "role:admin", "role:*", "backend:strong", "backend:*", "t*"]
RESOURCES = [
    "backend:strong", "backend:*", "backend:org/*", "backend:w?ak", "tool:search", "tool:*", "data:pii", "data:*",
    "data:sec*", "skill:writing",
]  # fmt: skip
NAMES = {
    "backend": ["strong", "weak", "org/model", "external"], "tool": ["search", "mail"], "data": ["pii", "secret"],
    "skill": ["writing"],
}  # fmt: skip
TAGS = st.dictionaries(
    st.sampled_from(["team", "role"]), st.sampled_from(["red", "blue", "admin", "a/b"]), max_size=2
)


@st.composite
def policies(draw: Any) -> list[AccessPolicy]:
    made = []
    for number in range(draw(st.integers(0, 6))):
        subjects = draw(st.lists(st.sampled_from(SUBJECTS), min_size=1, max_size=3))
        resources = draw(st.lists(st.sampled_from(RESOURCES), min_size=1, max_size=3))
        made.append(AccessPolicy(f"p{number}", subjects, resources, draw(st.sampled_from(["allow", "deny"]))))
    return made


def matches(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(read_glob(pattern).matches(name) for pattern in patterns for name in names)


def naive(given: Sequence[AccessPolicy], subjects: Sequence[str], resource: str) -> tuple[bool, str]:
    """Return whether a resource is allowed, and the policy that decides."""
    kind = resource.partition(":")[0] + ":"
    mine = [each for each in given if matches(each.subjects, subjects)]
    for action in ("deny", "allow"):
        for each in mine:
            if each.action == action and matches(each.resources, [resource]):
                return action == "allow", each.name
    for each in mine:
        if any(pattern.startswith(kind) for pattern in each.resources):
            return False, each.name
    return True, ""


@given(policies(), TAGS, st.sampled_from([(kind, name) for kind in KINDS for name in NAMES[kind]]))
def test_as_the_naive_evaluator(made: list[AccessPolicy], tags: dict[str, str], asked: tuple[str, str]) -> None:
    subjects = frozenset(f"{key}:{value}" for key, value in tags.items()) or NO_TAGS
    evaluator = PolicyEvaluator(made)
    for _ in range(2):  # the second time from what is remembered
        said = evaluator.verdict(subjects, *asked)
        assert (said.allowed, said.rule) == naive(made, sorted(subjects), ":".join(asked))
        assert said.allowed or said.rule in said.reason


def whole(made: list[AccessPolicy], sets: Sequence[Sequence[str]], backend: str, tool: str, label: str) -> bool:
    """Return whether a call is allowed, naively: for each set of tags, and its label at its backend."""
    asked = [f"backend:{backend}", f"tool:{tool}", f"data:{label}"]
    return (
        all(naive(made, subjects, each)[0] for subjects in sets for each in asked)
        and (naive(made, [f"backend:{backend}"], f"data:{label}")[0])
    )


def listed(tags: dict[str, str]) -> list[str]:
    return sorted(f"{key}:{value}" for key, value in tags.items()) or ["*"]


CALLS = (st.sampled_from(NAMES["backend"]), st.sampled_from(NAMES["tool"]), st.sampled_from(NAMES["data"]))


@given(policies(), TAGS, TAGS, st.booleans(), *CALLS)
def test_a_call_is_allowed_for_its_keys_tags_and_with_its_claims(
    made: list[AccessPolicy], key: dict[str, str], claimed: dict[str, str], is_open: bool, backend: str, tool: str,
    label: str,
) -> None:  # fmt: skip
    guard = Guard()
    guard.set_policies(made, "code")
    both = [f"{k}:{v}" for k, v in key.items()] + [f"{k}:{v}" for k, v in claimed.items()]
    sets = [sorted(set(both)) or ["*"]] if is_open else [listed(key), sorted(set(both)) or ["*"]]
    subject = AccessSubject.of(key, claimed, trusted=is_open)
    said = guard.verdict(subject, backend=backend, tools=[tool], labels=[label])
    assert said.allowed == whole(made, sets, backend, tool, label)


@given(policies(), TAGS, TAGS, *CALLS)
def test_claimed_tags_never_widen_and_leaving_them_out_gives_no_more_than_the_key_has(
    made: list[AccessPolicy], key: dict[str, str], claimed: dict[str, str], backend: str, tool: str, label: str
) -> None:
    guard = Guard()
    guard.set_policies(made, "code")
    asked: Any = {"backend": backend, "tools": [tool], "labels": [label]}
    of_key = whole(made, [listed(key)], backend, tool, label)
    assert guard.verdict(AccessSubject.of(key), **asked).allowed == of_key
    assert of_key or not guard.verdict(AccessSubject.of(key, claimed), **asked).allowed


@given(policies(), TAGS, st.sampled_from(NAMES["backend"]))
def test_any_label_is_allowed_only_where_every_label_is(
    made: list[AccessPolicy], tags: dict[str, str], backend: str
) -> None:
    guard = Guard()
    guard.set_policies(made, "code")
    subject = AccessSubject.of(tags)
    if guard.verdict(subject, backend=backend, labels=["*"]).allowed:
        for label in ("pii", "secret", "anything"):
            assert guard.verdict(subject, backend=backend, labels=[label]).allowed


def test_no_tags_at_all_are_a_subject() -> None:
    evaluator = PolicyEvaluator([AccessPolicy("nobody", ["\\*"], ["backend:*"], "deny")])
    assert evaluator.verdict(NO_TAGS, "backend", "strong").rule == "nobody"
    assert evaluator.verdict(frozenset({"team:red"}), "backend", "strong").allowed


def test_the_same_name_from_several_sources() -> None:
    guard, here = Guard(), list[Guard | None]()
    guard.installed_by(here.append)
    guard.set_policies([AccessPolicy("a", ["*"], ["tool:x"], "deny")], "posted")
    guard.set_policies([AccessPolicy("a", ["*"], ["tool:x"], "allow")], "file")
    assert [each.action for each in guard.policies] == ["allow"] and guard.source_of("a") == "file"
    assert [each.action for each in guard.of_source("posted")] == ["deny"]
    guard.set_policies([], "file")
    assert guard.source_of("a") == "posted" and guard.policies[0].action == "deny"
    guard.set_policies([])
    assert guard.source_of("a") is None and here[-1] is None and here[0] is None and here[1] is guard


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        (("", ["*"], ["tool:x"]), "name"), (("a", [], ["tool:x"]), "subjects"), (("a", "*", ["tool:x"]), "list"),
        (("a", ["*"], ["model:x"]), "must begin with"), (("a", ["*"], ["*"]), "must begin with"),
        (("a", ["["], ["tool:x"]), "class"), (("a", ["*"], ["tool:[x-"]), "class"),
        (("a", ["*"], ["tool:x"], "permit"), "action"), (("a", ["*"], [3]), "resources"),
    ],
)  # fmt: skip
def test_what_is_no_policy_is_refused(said: Any, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        AccessPolicy(*said)


def test_a_policy_is_a_value() -> None:
    made = AccessPolicy("a", ["team:red"], ["tool:x"])
    assert made == AccessPolicy("a", ("team:red",), ("tool:x",), "allow") and hash(made)
    for wrong in ("a", {"a": made}, [made, made], [3]):
        with pytest.raises(ConfigError, match="policies"):
            Guard().set_policies(wrong)  # type: ignore[arg-type]
