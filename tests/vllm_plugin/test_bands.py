"""The free queue in bands, and the bands of a request's blocks."""

from __future__ import annotations

import pytest

from orla_lg_vllm.bands import Band, BandedQueue, Block
from orla_lg_vllm.segments import Labels, bands_of, labels_of
from tests.vllm_plugin.pool import FakeBlock

DEAD, SPARE, TOOL, HISTORY, SYSTEM, PINNED = Band


def queue_of(bands: list[Band]) -> tuple[BandedQueue, list[FakeBlock]]:
    """Return a queue of cached blocks, freed in this order, each in the band given for it."""
    blocks = [FakeBlock(number, block_hash=b"x") for number in range(len(bands))]
    queue = BandedQueue([], lambda block: bands[block.block_id], lambda block: None)
    queue.append_n(blocks)
    return queue, blocks


def order(queue: BandedQueue) -> list[int]:
    return [block.block_id for block in queue.get_all_free_blocks()]


def test_lower_bands_go_first_and_within_a_band_the_least_recently_used() -> None:
    queue, _ = queue_of([PINNED, HISTORY, TOOL, SYSTEM, HISTORY, DEAD, TOOL])
    assert order(queue) == [5, 2, 6, 1, 4, 3, 0]
    assert [block.block_id for block in queue.popleft_n(3)] == [5, 2, 6]
    assert queue.num_free_blocks == 4
    assert queue.evicted == [1, 0, 2, 0, 0, 0]
    queue.check_integrity()


def test_what_holds_nothing_goes_before_all() -> None:
    queue, _ = queue_of([DEAD, HISTORY])
    queue.prepend_n([FakeBlock(2), FakeBlock(3)])
    assert order(queue) == [2, 3, 0, 1]


def test_a_block_found_in_the_cache_leaves_and_comes_back_as_the_newest() -> None:
    queue, blocks = queue_of([HISTORY, HISTORY, SYSTEM])
    queue.remove(blocks[0])
    assert order(queue) == [1, 2] and blocks[0] not in queue and queue.reused == 1
    queue.append(blocks[0])
    assert order(queue) == [1, 0, 2]
    with pytest.raises(RuntimeError, match="block 7 is not in the free queue"):
        queue.remove(FakeBlock(7))


def test_walking_on_from_a_block_crosses_bands() -> None:
    queue, blocks = queue_of([TOOL, HISTORY, PINNED])
    assert [block.block_id for block in queue.iter_blocks_after(blocks[0])] == [1, 2]
    assert [block.block_id for block in queue.iter_blocks_after(None)] == [0, 1, 2]


def test_an_empty_queue_says_so_and_takes_blocks_again() -> None:
    queue, blocks = queue_of([HISTORY])
    queue.popleft()
    with pytest.raises(ValueError, match="no free blocks"):
        queue.popleft()
    queue.append(blocks[0])
    assert order(queue) == [0]


def test_who_is_told_of_a_taken_block_still_sees_what_it_held() -> None:
    seen: list[object] = []

    def taken(block: Block) -> None:
        seen.append((block.block_id, block.block_hash))

    queue = BandedQueue([], lambda block: HISTORY, taken)
    queue.append_n([FakeBlock(1, block_hash=b"x"), FakeBlock(2)])
    queue.popleft_n(2)
    assert seen == [(1, b"x")]  # and of the one that held nothing nobody needs to hear


# The bands of a request's blocks -----------------------------------------------------------------------


def test_ends_in_characters_are_scaled_to_the_prompts_tokens() -> None:
    labels = Labels("w", "", (400, 1000), (SYSTEM, HISTORY))
    # 1,000 characters are 100 tokens: the system prompt ends at token 40, in the third block of 16.
    assert bands_of(labels, 100, 6, 16) == [SYSTEM, SYSTEM, HISTORY, HISTORY, HISTORY, HISTORY]
    assert bands_of(labels, 200, 6, 16) == [SYSTEM] * 5 + [HISTORY]


def test_what_follows_a_tool_output_is_worth_no_more_than_it() -> None:
    labels = Labels("w", "", (16, 32, 48, 64), (SYSTEM, TOOL, HISTORY, SYSTEM))
    assert bands_of(labels, 64, 6, 16) == [SYSTEM, TOOL, TOOL, TOOL, TOOL, TOOL]


def test_without_segments_everything_is_history() -> None:
    assert bands_of(Labels("w"), 100, 3, 16) == [HISTORY] * 3


def test_the_answer_is_history() -> None:
    assert bands_of(Labels("w", "", (32,), (SYSTEM,)), 32, 4, 16) == [SYSTEM, SYSTEM, HISTORY, HISTORY]


def test_labels_are_read_from_flat_fields() -> None:
    said = {
        "orla_workflow": "w", "orla_stage": "plan", "orla_ends": [10, 30], "orla_bands": [4, 3], "orla_keep_s": 4,
        "another": 1,
    }  # fmt: skip
    assert labels_of(said) == Labels("w", "plan", (10, 30), (SYSTEM, HISTORY), 4.0)


@pytest.mark.parametrize("said", [None, {}, {"orla_workflow": 7}, {"orla_stage": "plan", "orla_keep_s": 3}])
def test_without_a_workflow_nothing_was_said(said: dict[str, object] | None) -> None:
    assert labels_of(said) == Labels()


@pytest.mark.parametrize(
    "wrong",
    [
        {"orla_ends": [10, 5], "orla_bands": [4, 3]},
        {"orla_ends": [10], "orla_bands": [4, 3]},
        {"orla_ends": [0], "orla_bands": [3]},
        {"orla_ends": [10], "orla_bands": [5]},  # nobody pins by a label
        {"orla_ends": ["a"], "orla_bands": [3]},
        {"orla_ends": 10, "orla_bands": 3},
        {"orla_ends": [float("nan")], "orla_bands": [3]},
        {"orla_stage": 3, "orla_keep_s": -1},
        {"orla_keep_s": "long"},
    ],
)
def test_what_is_not_as_it_should_be_counts_as_not_given(wrong: dict[str, object]) -> None:
    assert labels_of({"orla_workflow": "w", **wrong}) == Labels("w")
