"""What a request says of itself, and which band each of its blocks belongs to.

A request carries flat fields in ``vllm_xargs``, which vLLM hands on unread:

    orla_workflow  whose KV cache this becomes
    orla_stage     which of its stages calls; a later call of the same stage makes an earlier one obsolete
    orla_ends      where the prompt's segments end, in characters from its beginning: whoever sends this has no
                   tokenizer, so the ends are scaled to the prompt's true number of tokens
    orla_bands     each segment's band, by number
    orla_keep_s    for how many seconds after its end the call's cache is expected to be of use; 0 if nobody will
                   come back for it

A field that is not as it should be counts as not given: a request is never refused for its labels.
This file runs inside the engine: it imports the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from orla_lg_vllm.bands import Band

WORKFLOW, STAGE, ENDS, BANDS, KEEP_S = "orla_workflow", "orla_stage", "orla_ends", "orla_bands", "orla_keep_s"


@dataclass(frozen=True, slots=True)
class Labels:
    """What a request said of itself."""

    workflow: str = ""
    """Empty where nothing was said: such a request competes as history, and nobody can flush it."""
    stage: str = ""
    ends: tuple[int, ...] = ()
    """Characters from the prompt's beginning to the end of each segment; never falling."""
    bands: tuple[Band, ...] = ()
    """Of each segment."""
    keep_s: float | None = None


def labels_of(said: Mapping[str, Any] | None) -> Labels:
    """Return the labels in a request's ``extra_args``."""
    if not said or not isinstance(said.get(WORKFLOW), str):
        return Labels()
    stage, keep_s = said.get(STAGE), said.get(KEEP_S)
    ends, bands = _segments(said.get(ENDS), said.get(BANDS))
    return Labels(
        workflow=said[WORKFLOW],
        stage=stage if isinstance(stage, str) else "",
        ends=ends,
        bands=bands,
        keep_s=float(keep_s) if isinstance(keep_s, int | float) and isfinite(keep_s) and keep_s >= 0 else None,
    )


def _segments(ends: Any, bands: Any) -> tuple[tuple[int, ...], tuple[Band, ...]]:
    right = (
        isinstance(ends, list)
        and isinstance(bands, list)
        and len(ends) == len(bands) > 0
        and all(isinstance(end, int | float) and isfinite(end) for end in ends)
        and all(later >= earlier for earlier, later in zip([0, *ends], ends, strict=False))
        and ends[-1] > 0
        and all(band in (Band.TOOL, Band.HISTORY, Band.SYSTEM) for band in bands)
    )
    return (tuple(map(int, ends)), tuple(map(Band, bands))) if right else ((), ())


def bands_of(labels: Labels, prompt_tokens: int, blocks: int, block_tokens: int) -> list[Band]:
    """Return the band of each of a request's first *blocks* blocks; none is above the one before it.

    A block without those before it is of no use to anybody. So it is worth no more than they are: what follows
    the first tool output is in its band, and goes before any history does. Thus what is lost under pressure are
    the ends of many conversations, not the whole of some.

    Args:
        labels: As the request said.
        prompt_tokens: How many tokens its prompt has.
        blocks: How many blocks of it are cached, prompt and answer.
        block_tokens: The size of a block, in tokens.
    """
    ends = _token_ends(labels.ends, prompt_tokens)
    found, lowest, segment = [], Band.SYSTEM if ends else Band.HISTORY, 0
    for block in range(blocks):
        last = (block + 1) * block_tokens - 1
        while segment < len(ends) and ends[segment] <= last:
            segment += 1
        # The block that a segment's end falls into holds some of the next one, too; the answer is history.
        lowest = min(lowest, labels.bands[segment] if segment < len(ends) else Band.HISTORY)
        found.append(lowest)
    return found


def _token_ends(ends: Sequence[int], prompt_tokens: int) -> list[int]:
    return [round(end * prompt_tokens / ends[-1]) for end in ends] if ends else []
