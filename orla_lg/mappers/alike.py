"""Prompts that say nearly the same: they stay together when data is parted for learning and for trying.

A text that stands there three times would else be tried on a mapper that has seen its twin, and every figure would
flatter. Two prompts are alike by the pairs of neighbouring words that they share (Broder's resemblance);
candidates are found by the smallest hashes of these pairs, so that not all are compared with all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import sqrt
from zlib import crc32

from orla_lg.core.boundary.plain import counted
from orla_lg.mappers.features import clipped

ALIKE = 0.7
"""The share of common pairs of words, of all that either has, from which on two prompts are near-duplicates."""

SKETCH = 8
"""So many of a prompt's smallest hashes find its candidates; two with a share of 0.7 hardly ever miss each other."""

MOST_COMPARED = 32
"""Candidates by each of these hashes: prompts of one template have some in common."""

FEW_OF_A_LABEL = 100
"""With fewer different prompts of a label the figures are said to be vague."""

_WORD = re.compile(r"[^\W_]+")


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """Return for each text the number of its group: that of the first text which says nearly the same."""
    sets = [_pairs(text) for text in texts]
    first = list(range(len(texts)))  # a forest: each points to one before it, or to itself
    found_by: dict[int, list[int]] = defaultdict(list)
    for number, pairs in enumerate(sets):
        for hashed in sorted(pairs)[:SKETCH]:
            for other in found_by[hashed]:
                one, two = sorted((_root(first, number), _root(first, other)))
                if one != two and _are_alike(pairs, sets[other]):
                    first[two] = one
            if len(found_by[hashed]) < MOST_COMPARED:
                found_by[hashed].append(number)
    return [_root(first, number) for number in range(len(texts))]


def different(groups: Iterable[int], labels: Iterable[bool]) -> tuple[int, int]:
    """Return how many different texts are simple, and how many complex."""
    seen = set(zip(groups, labels, strict=True))
    return sum(not label for _, label in seen), sum(label for _, label in seen)


def _pairs(text: str) -> frozenset[int]:
    words = _WORD.findall(clipped(text).lower())
    pairs = [f"{one} {two}" for one, two in pairwise(("^", *words))] or [text.strip()]
    return frozenset(crc32(pair.encode("utf-8", "replace")) for pair in pairs)


def _are_alike(one: frozenset[int], other: frozenset[int]) -> bool:
    if min(len(one), len(other)) < ALIKE * max(len(one), len(other)):
        return False
    common = len(one & other)
    return common >= ALIKE * (len(one) + len(other) - common)


def _root(first: list[int], number: int) -> int:
    while first[number] != number:
        first[number] = first[first[number]]
        number = first[number]
    return number


def of_the_data(groups: Sequence[int], labels: Sequence[bool], folds: int, accuracy: float) -> list[str]:
    """Return what must be known of the rows before figures from them are believed, a paragraph each."""
    simple, complex_ = different(groups, labels)
    notes, distinct = [], len(set(groups))
    if copies := len(groups) - distinct:
        notes.append(
            f"Near-duplicates: of {len(groups)} prompts {copies} say nearly the same as another one. Such prompts\n"
            "stay in one fold, so that none is tried on a mapper that learned from its copy.\n"
        )
    if both := simple + complex_ - distinct:
        stand = "stands" if both == 1 else "stand"
        notes.append(f"Labels: {counted(both, 'text')} {stand} there as simple and, nearly the same, as complex.\n")
    if min(simple, complex_) < FEW_OF_A_LABEL:
        low, high = likely(accuracy, distinct)
        notes.append(
            f"Few rows: {simple} simple and {complex_} complex prompts are different, {max(1, complex_ // folds)} "
            f"complex in each of {folds} folds.\n± is the spread over shuffles of these rows; on other prompts the "
            f"accuracy of {accuracy:.2f} may be\nanything from {low:.2f} to {high:.2f} (95 %). {FEW_OF_A_LABEL} of "
            "each label or more narrow that down.\n"
        )
    return notes


def likely(share: float, count: int) -> tuple[float, float]:
    """Return the bounds of a share that was seen in *count* trials, with a confidence of 95 % (Wilson's interval)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
