"""The glob language of access policies: that of Go's ``filepath.Match``, in which ``*`` does not cross a ``/``.

Python's ``fnmatch`` is another language: there ``backend:*`` matches ``backend:org/model``, here it does not.

- ``*``: any number of characters that are no ``/``;
- ``?``: one character that is no ``/``;
- ``[a-z]``, ``[^a-z]``: one character of a class, or none of it; a ``/`` is a character like any other there;
- ``\\c``: the character ``c`` itself, also inside a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from orla_lg.errors import ConfigError, shown

SEPARATOR = "/"

MAGIC = frozenset("*?[\\")
"""A pattern without these is a plain text."""


class CharacterClass(NamedTuple):
    """One character of a set: ``[a-z0]``, or ``[^a-z0]``."""

    negated: bool
    ranges: tuple[tuple[str, str], ...]

    def matches(self, character: str) -> bool:
        """Whether *character* is of the class."""
        return self.negated != any(low <= character <= high for low, high in self.ranges)


ANY = CharacterClass(negated=True, ranges=((SEPARATOR, SEPARATOR),))
"""``?``"""

Token = str | CharacterClass


class GlobChunk(NamedTuple):
    """What stands between two stars of a pattern."""

    star: bool
    """A star stands before it."""
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Glob:
    """A pattern, read."""

    pattern: str
    chunks: tuple[GlobChunk, ...]
    literal: str | None
    """The one text that it matches, where it is a plain one."""

    def matches(self, name: str) -> bool:
        """Whether the whole of *name* matches."""
        if self.literal is not None:
            return name == self.literal
        at, last = 0, len(self.chunks) - 1
        for number, (star, tokens) in enumerate(self.chunks):
            if star and not tokens:
                return SEPARATOR not in name[at:]
            while True:
                end = _matched(tokens, name, at)
                if end is not None and (end == len(name) or number < last):
                    at = end
                    break
                if not star or at >= len(name) or name[at] == SEPARATOR:
                    return False
                at += 1
        return at == len(name)


def read_glob(pattern: str) -> Glob:
    """Return *pattern*, read.

    Raises:
        ConfigError: It is malformed: a class that is not closed, or empty, or a backslash at the end.
    """
    chunks, star, tokens, at = list[GlobChunk](), False, list[Token](), 0
    while at < len(pattern):
        character = pattern[at]
        if character == "*":
            if tokens:
                chunks.append(GlobChunk(star, tuple(tokens)))
            star, tokens, at = True, [], at + 1
        elif character == "?":
            tokens.append(ANY)
            at += 1
        elif character == "[":
            read, at = _class_at(pattern, at + 1)
            tokens.append(read)
        else:
            character, at = _character_at(pattern, at)
            tokens.append(character)
    if star or tokens:
        chunks.append(GlobChunk(star, tuple(tokens)))
    plain = all(not chunk.star and all(isinstance(token, str) for token in chunk.tokens) for chunk in chunks)
    literal = "".join(str(token) for chunk in chunks for token in chunk.tokens) if plain else None
    return Glob(pattern, tuple(chunks), literal)


def _matched(tokens: tuple[Token, ...], name: str, at: int) -> int | None:
    """Return where *tokens* end in *name* if they begin *at*; ``None`` if they do not."""
    if len(name) - at < len(tokens):
        return None
    for token in tokens:
        character = name[at]
        if token != character if isinstance(token, str) else not token.matches(character):
            return None
        at += 1
    return at


def _class_at(pattern: str, at: int) -> tuple[CharacterClass, int]:
    """Return the class that begins behind the bracket, and where it ends."""
    negated = pattern[at : at + 1] == "^"
    at += negated
    ranges: list[tuple[str, str]] = []
    while not (ranges and pattern[at : at + 1] == "]"):
        low, at = _bound_at(pattern, at)
        high = low
        if pattern[at : at + 1] == "-":
            high, at = _bound_at(pattern, at + 1)
        ranges.append((low, high))
    return CharacterClass(negated, tuple(ranges)), at + 1


def _bound_at(pattern: str, at: int) -> tuple[str, int]:
    """Return a character of a class and where the next begins; a class goes on behind it."""
    if pattern[at : at + 1] in ("", "-", "]"):
        found = "it is not closed" if at >= len(pattern) else f"a {pattern[at]} stands where a character is needed"
        raise ConfigError(f"pattern {shown(pattern)}: in a class, {found}; write \\[ \\] \\- for the characters")
    character, at = _character_at(pattern, at)
    if at >= len(pattern):
        raise ConfigError(f"pattern {shown(pattern)}: a class in it is not closed; write \\[ for the bracket itself")
    return character, at


def _character_at(pattern: str, at: int) -> tuple[str, int]:
    if pattern[at] != "\\":
        return pattern[at], at + 1
    if at + 1 == len(pattern):
        raise ConfigError(f"pattern {shown(pattern)} ends with a backslash; write \\\\ for one")
    return pattern[at + 1], at + 2
