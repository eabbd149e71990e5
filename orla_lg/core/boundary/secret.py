"""A key: given and used as text, and shown as neither text nor length wherever a value may be printed."""

from __future__ import annotations

from typing import NoReturn, Self

from orla_lg.errors import ConfigError

MASK = "Secret('…')"


class Secret:
    """A key that only ``reveal`` shows; printing, formatting and JSON do not, and pickling is refused.

    Raises:
        ConfigError: It holds what no HTTP header can carry. The message does not show it.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str, where: str = "a key") -> None:
        if not isinstance(text, str):
            raise ConfigError(f"{where} must be text, got {type(text).__name__}")
        if not all("!" <= character <= "~" for character in text):
            raise ConfigError(
                f"{where} holds a character that no HTTP header can carry (a line end, a blank, or beyond ASCII); "
                "it is not shown here"
            )
        self._text = text

    def reveal(self) -> str:
        """Return the key."""
        return self._text

    def __repr__(self) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a key is not pickled: build the Backend where it is used, from api_key_env or a vault")
