"""Prompts as an engine and the core see them: blocks of tokens with hashes, and pieces with lengths; without text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from orla_lg.core.call import Ask, scoped
from orla_lg.replay.traffic import Piece


@dataclass(frozen=True)
class PieceAsk(Ask):
    """What a replayed call asks for: its prompt is known by hashes and lengths."""

    chain: tuple[Piece, ...] = field(default=(), repr=False)

    @cached_property
    def prompt_chars(self) -> int:
        """The length of the prompt's text."""
        return self.chain[-1].until_chars if self.chain else 0

    @cached_property
    def tools_chars(self) -> int:
        """Nothing: what tools' schemas take is among the tokens that were counted."""
        return 0

    @cached_property
    def images(self) -> bool:
        """Whether the prompt shows images; a record does not say."""
        return False

    @cached_property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """For each message its chained hash and its length."""
        return scoped([(each.name, each.chars) for each in self.chain], self.scope)

    def is_answer(self, index: int) -> bool:
        """Whether a message is what a model said."""
        return self.chain[index].is_answer


def chain_to(last: Piece | None) -> tuple[Piece, ...]:
    """Return a prompt's pieces, the first one first."""
    found: list[Piece] = []
    while last is not None:
        found.append(last)
        last = last.before
    return tuple(reversed(found))


def measure(last: Piece | None, tokens: int) -> None:
    """Give the pieces of a prompt that has so many *tokens* their share; those of earlier prompts keep theirs.

    So what a prompt adds to the one before it gets exactly what it added in tokens; only among the pieces that one
    call adds are tokens shared out by length.
    """
    fresh: list[Piece] = []
    while last is not None and not last.until_tokens:
        fresh.append(last)
        last = last.before
    known_tokens, known_chars = (last.until_tokens, last.until_chars) if last is not None else (0, 0)
    added, chars = max(0, tokens - known_tokens), sum(each.chars for each in fresh)
    for each in reversed(fresh):
        part = (each.until_chars - known_chars) / chars if chars else 1.0
        each.until_tokens = max(1, known_tokens + round(added * part))


def block_hashes(chain: Sequence[Piece], tokens: int, block_tokens: int, answer: Piece | None = None) -> list[int]:
    """Return the hashes of a prompt's full blocks, and past it those of the answer that a later prompt repeats.

    A block is known by the piece in which it ends and by how far in: a piece's name stands for all before it.

    Args:
        chain: The prompt's pieces.
        tokens: The prompt's length.
        block_tokens: Of one block.
        answer: The piece of a later prompt with this call's answer; ``None``: none repeats it.
    """
    return list(_blocks([*chain, *(() if answer is None else (answer,))], tokens, block_tokens, answer))


def _blocks(chain: Sequence[Piece], tokens: int, block_tokens: int, answer: Piece | None) -> Iterator[int]:
    end, begin = block_tokens, 0
    for each in chain:
        until = each.until_tokens if each is answer else min(each.until_tokens, tokens)
        while end <= until:
            yield hash((each.name, end - begin))
            end += block_tokens
        begin = until
