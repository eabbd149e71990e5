"""Keys taken out of text: an engine that refuses a key repeats it in its error, which is recorded and logged."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from orla_lg.core.boundary.bounded_dict import BoundedDict

MASK = "***"

LEAST_CHARS = 8
"""What is shorter (``none``, ``EMPTY``, ``ollama``) keeps no secret, and may be a word of any text."""

KEEP_CALLERS = 100
"""Callers' keys that are known at once; one that was not met for long may come back."""

SERVER_KEY_PREFIX, SERVER_KEY_CHARS = "orla-", 52
"""A key of ``orla-lg serve``: 256 bits in base 32."""

_LOOKS_SECRET = re.compile(
    rf"""(?ix) (\b bearer \s+) [\w.~+/=-]{{8,}}  # a header's value
    | (\b basic \s+) [a-z0-9+/]{{20,}}={{0,2}}  # another's: a name and a key
    | \b ((?: sk | pk | rk | hf | gsk | xai ) [-_]) [\w-]{{8,}}  # keys that say what they are
    | ({SERVER_KEY_PREFIX}) [a-z2-7]{{{SERVER_KEY_CHARS}}}
    """
)


class Masking(logging.Filter):
    """The keys that one core knows, and what looks like one; also a filter that takes them out of log lines."""

    def __init__(self, keys: Iterable[object] = ()) -> None:
        super().__init__()
        self._callers = BoundedDict[str, str](KEEP_CALLERS)
        self._own = frozenset(filter(None, map(_text_of, keys)))
        self._pattern: re.Pattern[str] | None = None
        self._latest: object = None
        """The caller's key that was met last: mostly the next one's too."""

    def add(self, *keys: object) -> None:
        """Take keys of ours out of all text to come."""
        self._own |= frozenset(filter(None, map(_text_of, keys)))
        self._pattern = None

    def learn(self, key: object) -> None:
        """Take a caller's key out of all text to come."""
        if key is self._latest:
            return
        text = _text_of(key)
        if text and text not in self._own and self._callers.get(text) is None:
            self._callers.set(text, text)
            self._pattern = None
        self._latest = key

    def mask(self, text: str) -> str:
        """Return *text* without keys."""
        pattern = self._pattern
        if pattern is None:
            keys = sorted({*self._own, *self._callers.values()}, key=len, reverse=True)
            pattern = self._pattern = re.compile("|".join(map(re.escape, keys)) or r"(?!)")
        return _LOOKS_SECRET.sub(_without, pattern.sub(MASK, text))

    def filter(self, record: logging.LogRecord) -> bool:
        """Let a line pass, without keys."""
        message = record.getMessage()
        if (masked := self.mask(message)) != message:
            record.msg, record.args = masked, None
        if record.exc_info and not record.exc_text:
            record.exc_text = self.mask(_FORMATTER.formatException(record.exc_info))
        return True


_FORMATTER = logging.Formatter()


def _text_of(key: object) -> str:
    reveal = getattr(key, "reveal", None)
    text = reveal() if callable(reveal) else key
    return text if isinstance(text, str) and len(text) >= LEAST_CHARS else ""


def _without(found: re.Match[str]) -> str:
    return f"{found[found.lastindex or 0]}{MASK}"
