"""Which call follows which, after what time, and what their prompts have in common."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orla_lg.replay.prompts import block_hashes, chain_to, measure
from orla_lg.replay.traffic import Piece, RecordedCall, RecordedTraffic
from orla_lg.replay.workload import Workload, workload_of


def call(name: str, at_s: float, took_s: float = 1.0, **fields: Any) -> RecordedCall:
    return RecordedCall(
        **{"id": name, "workflow": "w", "run": "r", "stage": "s", "backend": "b", "arrived_s": at_s,
           "duration_s": took_s, "prompt_tokens": 10, "completion_tokens": 5, **fields}
    )  # fmt: skip


def workload(*calls: RecordedCall) -> Workload:
    return workload_of(RecordedTraffic("file", sorted(calls, key=lambda each: each.arrived_s)))


def after(made: Workload) -> dict[str, tuple[list[str], float]]:
    return {each.seen.id: ([before.seen.id for before in each.after], round(each.wait_s, 6)) for each in made.calls}


def test_a_call_follows_the_one_before_after_the_time_between() -> None:
    made = workload(call("a", 5.0, 2.0), call("b", 7.5), call("other", 6.0, workflow="v", run="q"))
    assert after(made) == {"a": ([], 0.0), "b": (["a"], 0.5), "other": ([], 1.0)}


def test_branches_follow_what_they_fork_from_and_a_join_follows_all_of_them() -> None:
    made = workload(
        call("plan", 0.0), call("x", 1.0, 3.0), call("y", 1.0, 1.0), call("late", 2.5, 1.0), call("end", 4.5)
    )
    found = after(made)
    assert found["x"] == found["y"] == (["plan"], 0.0)
    assert found["late"] == (["y"], 0.5)
    assert sorted(found["end"][0]) == ["late", "x"] and found["end"][1] == 0.5


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 9), st.sampled_from("uvw")), min_size=1, max_size=30))
def test_what_follows_had_to_wait_and_what_had_ended_is_waited_for(told: list[tuple[float, float, str]]) -> None:
    made = workload(*(call(str(n), at, took, workflow=flow) for n, (at, took, flow) in enumerate(told)))
    for each in made.calls:
        mine = [other for other in made.calls if other.seen.workflow == each.seen.workflow]
        ended = [other for other in mine if other.number < each.number and other.seen.ended_s <= each.seen.arrived_s]
        known, todo = set(each.after), list(each.after)
        while todo:
            for before in todo.pop().after:
                if before not in known:
                    known.add(before)
                    todo.append(before)
        assert known == set(ended), "directly, or through another one"
        assert each.wait_s >= 0 and all(each in before.followers for before in each.after)


def test_what_a_prompt_adds_has_the_tokens_that_it_added() -> None:
    system = Piece.after(None, 1, 300)
    first = Piece.after(system, 2, 100)
    answer = Piece.after(first, 3, 50, is_answer=True)
    second = Piece.after(answer, 4, 50)
    measure(first, 104)
    measure(second, 140)
    assert [piece.until_tokens for piece in chain_to(second)] == [78, 104, 122, 140]


def test_a_known_answer_has_as_many_tokens_as_were_generated() -> None:
    first = Piece.after(None, 1, 300)
    answer = Piece.after(first, 2, 10, is_answer=True)
    second = Piece.after(answer, 3, 90)
    made = workload(
        call("a", 0.0, prompt=first, prompt_tokens=100, completion_tokens=40),
        call("b", 2.0, prompt=second, prompt_tokens=160),
    )
    assert made.calls[0].answer is answer and answer.until_tokens == 140
    mine = block_hashes(chain_to(first), 100, 16, answer)
    theirs = block_hashes(chain_to(second), 160, 16)
    assert mine == theirs[: 140 // 16], "so the second finds the first one's answer in the cache, too"


def test_blocks_are_shared_as_far_as_prompts_begin_alike_and_no_further() -> None:
    system = Piece.after(None, 1, 400)
    one, other = Piece.after(system, 2, 100), Piece.after(system, 3, 100)
    measure(one, 125)
    measure(other, 125)
    mine, theirs = block_hashes(chain_to(one), 125, 10), block_hashes(chain_to(other), 125, 10)
    assert len(mine) == len(theirs) == 12
    assert [a == b for a, b in zip(mine, theirs, strict=True)] == [True] * 10 + [False] * 2
