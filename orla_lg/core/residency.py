"""What we believe an engine's prefix cache holds: pieces of prompts, in the order in which it would give them up.

Engines with a prefix cache (vLLM, SGLang) evict what was used longest ago, and never what a running call uses. So we
believe the same: *pieces*, one for each message after all messages before it, are in use, or idle in the order of
their last use. A prefix that several workflows share is one piece and counted once. Whoever counts on a piece has a
claim on it; claims change nothing about what the engine evicts, they say what would be missed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from orla_lg.core.call import CHARS_PER_TOKEN, Ask

MAX_PIECES = 100_000
"""Known of an engine that does not say what it holds; the oldest are forgotten."""


LEARNING = 0.3
"""Weight of the newest answer in how many tokens a character makes."""


@dataclass(eq=False, slots=True)
class Piece:
    """The tokens of one message after certain others."""

    key: object
    """Its chained hash; for an answer that no prompt repeated yet, something of its own."""
    parent: Piece | None
    tokens: float
    counted: bool = False
    """The engine counted them; else they are an estimate."""
    users: int = 0
    """Calls in flight through it."""
    claims: int = 0
    """Workflows that count on it."""
    filled: bool = False
    """Its prefill is done: a call through it had its first token, or ended."""
    alive: bool = True
    idle_from: float = 0.0
    """What ``Residency.flow_tokens`` was when it was used last."""
    answer: Piece | None = None
    """What a model said after it."""

    def path(self) -> Iterator[Piece]:
        """Return this piece and all before it, the nearest first."""
        piece: Piece | None = self
        while piece is not None:
            yield piece
            piece = piece.parent


@dataclass(eq=False, slots=True)
class Stay:
    """A call's pieces while it is in flight."""

    path: list[Piece]
    """From the first message to the last."""
    answer: Piece
    fresh: list[Piece]
    """Of the path, those that were not there before."""
    expected_tokens: float
    """Of the prompt, what should be found in the cache."""
    enough_tokens: float
    """A cache of this size would not have given up any of that."""


@dataclass(eq=False)
class Residency:
    """The pieces of one engine. ``check_integrity`` asserts what the parts promise."""

    tokens_per_char: float = 1 / CHARS_PER_TOKEN
    in_use_tokens: float = 0.0
    """Of calls in flight, with the answers that are expected."""
    idle_tokens: float = 0.0
    wanted_tokens: float = 0.0
    """In use or claimed, whether it is still there or not."""
    flow_tokens: float = 0.0
    """All that ever went out of use."""
    pieces: dict[object, Piece] = field(default_factory=dict)
    _idle: OrderedDict[Piece, None] = field(default_factory=OrderedDict)
    """Used longest ago first."""

    @property
    def tokens(self) -> float:
        """All that is believed to be there."""
        return self.in_use_tokens + self.idle_tokens

    # Looking

    def find(self, ask: Ask) -> list[Piece]:
        """Return the pieces of the longest beginning of a prompt that is known."""
        found: list[Piece] = []
        for index, (key, _) in enumerate(ask.pieces):
            piece = self.pieces.get(key)
            if piece is None:
                said = found[-1].answer if found and ask.is_answer(index) else None
                if said is None or not said.alive:
                    break
                piece = said
            found.append(piece)
        return found

    def adds(self, ask: Ask, answer_tokens: float) -> tuple[float, float]:
        """Return by how much ``in_use_tokens`` and ``wanted_tokens`` would grow if the call went now."""
        found = self.find(ask)
        fresh = self._estimate(ask, len(found)) + answer_tokens
        use = sum(piece.tokens for piece in found if not piece.users)
        want = sum(piece.tokens for piece in found if not piece.users and not piece.claims)
        return use + fresh, want + fresh

    def tokens_of(self, ask: Ask) -> float:
        """Return how long a prompt is: what is known of it as counted, the rest by its length."""
        found = self.find(ask)
        return sum(piece.tokens for piece in found) + self._estimate(ask, len(found))

    def _estimate(self, ask: Ask, start: int) -> float:
        return sum(chars for _, chars in ask.pieces[start:]) * self.tokens_per_char

    # Calls

    def begin(self, ask: Ask, answer_tokens: float) -> Stay:
        """Take a call's prompt and expected answer into use."""
        found = self.find(ask)
        expected = [piece for piece in found if piece.filled]
        since_tokens = self._used_since(expected[-1]) if expected else 0.0
        path, fresh = found, list[Piece]()
        for index, (key, chars) in enumerate(ask.pieces):
            if index < len(found):
                self._name(found[index], key)
                continue
            piece = Piece(key, path[-1] if path else None, chars * self.tokens_per_char)
            self.pieces[key] = piece
            path.append(piece)
            fresh.append(piece)
        answer = Piece(object(), path[-1] if path else None, answer_tokens)
        self.pieces[answer.key] = answer
        for piece in (*path, answer):
            self._use(piece)
        enough = min(self.tokens, since_tokens + answer_tokens + sum(piece.tokens for piece in fresh))
        return Stay(path, answer, fresh, sum(piece.tokens for piece in expected), enough)

    def _used_since(self, piece: Piece) -> float:
        """Return how many tokens were used since a piece was, its own included; rather too many than too few."""
        return self.in_use_tokens + (0.0 if piece.users else self.flow_tokens - piece.idle_from)

    def _name(self, piece: Piece, key: object) -> None:
        """Know an answer by its place in a prompt from now on."""
        if piece.key is not key and piece.key != key:
            del self.pieces[piece.key]
            self.pieces[key] = piece
            piece.key = key
            if piece.parent is not None and piece.parent.answer is piece:
                piece.parent.answer = None

    def _use(self, piece: Piece) -> None:
        if piece.users == 0:
            if piece in self._idle:
                del self._idle[piece]
                self.idle_tokens -= piece.tokens
            self.in_use_tokens += piece.tokens
            if not piece.claims:
                self.wanted_tokens += piece.tokens
        piece.users += 1

    def filled(self, stay: Stay) -> None:
        """Note that a call's prompt is prefilled."""
        for piece in stay.path:
            piece.filled = True

    def end(self, stay: Stay, prompt_tokens: int | None, answer_tokens: int | None) -> None:
        """Give back what a call used; it is now what was used last. Token counts as the engine reported them."""
        if prompt_tokens is not None:
            self._count(stay, prompt_tokens)
        self._resize(stay.answer, stay.answer.tokens if answer_tokens is None else answer_tokens)
        stay.answer.filled = True
        self.filled(stay)
        if stay.path:
            stay.path[-1].answer = stay.answer
        for piece in stay.answer.path():  # its end first: an engine gives up the end of a prompt before its beginning
            self._unuse(piece)

    def undo(self, stay: Stay) -> None:
        """Give back what a call used that never reached the engine: what it would have added is not there."""
        for piece in stay.answer.path():
            self._unuse(piece)
            if piece is stay.answer or (not piece.users and not piece.filled):
                self._lose(piece)

    def _unuse(self, piece: Piece) -> None:
        piece.users -= 1
        if piece.users == 0:
            self.in_use_tokens -= piece.tokens
            if not piece.claims:
                self.wanted_tokens -= piece.tokens
            piece.idle_from = self.flow_tokens
            self.flow_tokens += piece.tokens
            if piece.alive:
                self.idle_tokens += piece.tokens
                self._idle[piece] = None

    def _count(self, stay: Stay, prompt_tokens: int) -> None:
        """Let the pieces of a prompt add up to what the engine counted; what was estimated gives way."""
        guessed = [piece for piece in stay.path if not piece.counted]
        before = sum(piece.tokens for piece in guessed)
        left = prompt_tokens - sum(piece.tokens for piece in stay.path if piece.counted)
        if guessed and left > 0:
            if before > 0:
                self.tokens_per_char *= 1 + LEARNING * (min(left / before, 2.0) - 1)
            for piece in guessed:
                self._resize(piece, left * piece.tokens / before if before > 0 else left / len(guessed))
                piece.counted = True

    def _resize(self, piece: Piece, tokens: float) -> None:
        more = tokens - piece.tokens
        piece.tokens = tokens
        if piece.users:
            self.in_use_tokens += more
        elif piece in self._idle:
            self.idle_tokens += more
        if piece.users or piece.claims:
            self.wanted_tokens += more

    # Claims

    def claim(self, piece: Piece) -> None:
        """Count on a piece and all before it."""
        for each in piece.path():
            if not (each.users or each.claims):
                self.wanted_tokens += each.tokens
            each.claims += 1

    def disclaim(self, piece: Piece) -> None:
        """Count on them no more."""
        for each in piece.path():
            each.claims -= 1
            if not (each.users or each.claims):
                self.wanted_tokens -= each.tokens

    # What the engine gave up

    def shrink(self, limit_tokens: float) -> None:
        """Believe that the engine gave up its oldest pieces until what is left fits."""
        while self._idle and (self.tokens > limit_tokens or len(self.pieces) > MAX_PIECES):
            self._lose(next(iter(self._idle)))

    def _lose(self, piece: Piece) -> None:
        if piece in self._idle:
            del self._idle[piece]
            self.idle_tokens -= piece.tokens
        piece.alive = False
        if self.pieces.get(piece.key) is piece:
            del self.pieces[piece.key]

    def clear(self) -> None:
        """Believe nothing any more: the engine came back empty. Calls in flight end as they will."""
        for piece in list(self.pieces.values()):
            self._lose(piece)

    def check_integrity(self) -> None:
        """Assert the invariants."""
        idle = set(self._idle)
        assert all(piece.alive and not piece.users for piece in idle)
        assert all(piece.alive and (piece.users or piece in idle) for piece in self.pieces.values())
        assert idle <= set(self.pieces.values())
        assert abs(sum(piece.tokens for piece in idle) - self.idle_tokens) < 1e-3 * (1 + self.idle_tokens)
