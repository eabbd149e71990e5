"""Prompts to token ids, and answers in words of one token each.

Without a tokenizer of its own the simulation splits text into pieces and hashes them: token counts are then
about those of a real model, equal texts have equal tokens, and nothing needs to be downloaded. With the folder
of a real model (``tokenizer.json`` and its chat template) counts equal that model's.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Protocol

from orla_lg.errors import ConfigError, EngineError

Messages = Sequence[Mapping[str, Any]]

CHARS_PER_TOKEN = 4

_SHORT_WORDS = """
the and for one all new day see two way man boy old our out car dog cat sun red may ask has had him her how its let
now off own put run say she too top use war who why yes yet you air art bad big box
"""
"""Each is one token with and without the space before it, here and in the usual byte-pair vocabularies."""


class Tokenizer(Protocol):
    """Text to token ids."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        ...

    def pieces(self, text: str) -> list[str]:
        """Return the parts of *text* that its tokens stand for; together they are the text."""
        ...

    def prompt(self, messages: Messages, tools: Any = None, *, answer: bool = True) -> list[int]:
        """Return the tokens of a chat, *answer* telling whether an answer is asked for at its end."""
        ...


def content_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message, whose content may be missing, a string, or a list of parts."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


class WordTokenizer:
    """Pieces of words, hashed.

    Args:
        chars_per_token: The longest piece of a word in letters; a longer word has several tokens.
    """

    def __init__(self, chars_per_token: int = CHARS_PER_TOKEN) -> None:
        if chars_per_token < 1:
            raise ConfigError(f"characters per token must be at least 1, got {chars_per_token}")
        self._piece = re.compile(rf" ?\w{{1,{chars_per_token}}}|\s|[^\w\s]{{1,{chars_per_token}}}")

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return [zlib.crc32(piece.encode()) for piece in self.pieces(text)]

    def pieces(self, text: str) -> list[str]:
        """Return the parts of *text* that its tokens stand for."""
        return self._piece.findall(text)

    def prompt(self, messages: Messages, tools: Any = None, *, answer: bool = True) -> list[int]:
        """Return the tokens of a chat: around each message one that says who speaks and one that ends it."""
        tokens = self.encode(json.dumps(tools)) if tools else []
        for message in messages:
            tokens.append(_marker(str(message.get("role"))))
            tokens += self.encode(content_text(message))
            if calls := message.get("tool_calls"):
                tokens += self.encode(json.dumps(calls))
            tokens.append(_marker("end"))
        return [*tokens, _marker("assistant")] if answer else tokens


def _marker(name: str) -> int:
    return zlib.crc32(f"<|{name}|>".encode())


class FolderTokenizer:
    """The tokenizer and the chat template of a real model.

    Raises:
        ConfigError: The folder does not hold them.
        EngineError: ``tokenizers`` or ``jinja2`` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise EngineError("a model's own tokenizer needs: pip install 'orla-lg[sim]'") from error
        if not (file := folder / "tokenizer.json").is_file():
            raise ConfigError(f"{folder} holds no tokenizer.json; it must be a model's folder")
        self._tokenizer = Loaded.from_file(str(file))
        self._special = _special_tokens(folder)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = json.dumps
        self._template = environment.from_string(_chat_template(folder))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def pieces(self, text: str) -> list[str]:
        """Return the parts of *text* that its tokens stand for."""
        ends = [end for _, end in self._tokenizer.encode(text, add_special_tokens=False).offsets]
        cuts = [0, *ends[:-1], len(text)]
        return [text[start:end] for start, end in pairwise(cuts)] if ends else []

    def prompt(self, messages: Messages, tools: Any = None, *, answer: bool = True) -> list[int]:
        """Return the tokens of a chat in the model's own template."""
        plain = [{**message, "content": content_text(message)} for message in messages]
        text = self._template.render(messages=plain, tools=tools, add_generation_prompt=answer, **self._special)
        return self.encode(text)


def _refuse(message: str) -> None:
    raise ValueError(f"the chat template refuses: {message}")


def _special_tokens(folder: Path) -> dict[str, str]:
    said = _config(folder)
    found = {name: said.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return {
        name: value["content"] if isinstance(value, Mapping) else str(value)
        for name, value in found.items()
        if value is not None
    }


def _chat_template(folder: Path) -> str:
    own = folder / "chat_template.jinja"
    template = own.read_text(encoding="utf-8") if own.is_file() else _config(folder).get("chat_template")
    if not isinstance(template, str):
        raise ConfigError(
            f"{folder} has no chat template, neither as chat_template.jinja nor in tokenizer_config.json"
        )
    return template


def _config(folder: Path) -> dict[str, Any]:
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    return said if isinstance(said, dict) else {}


def tokenizer_of(folder: str | Path | None) -> Tokenizer:
    """Return the tokenizer of a model's folder, or the one that needs none."""
    return WordTokenizer() if folder is None else FolderTokenizer(Path(folder).expanduser())


def prose(random: Random, tokens: int) -> list[str]:
    """Return that many words; each is a token, and together they are a text."""
    words = random.choices(_SHORT_WORDS.split(), k=tokens)
    return [word if index == 0 else f" {word}" for index, word in enumerate(words)]
