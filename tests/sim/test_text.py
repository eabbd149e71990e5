"""Tokens: stable, composable, and those of a real model where one is given."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.errors import ConfigError
from orla_lg_sim.text import FolderTokenizer, WordTokenizer, content_text, prose, tokenizer_of


@given(st.text())
def test_pieces_are_the_text(text: str) -> None:
    words = WordTokenizer()
    assert "".join(words.pieces(text)) == text
    assert len(words.encode(text)) == len(words.pieces(text))


@given(st.integers(1, 200), st.integers())
def test_prose_has_a_token_for_each_word(tokens: int, seed: int) -> None:
    words = prose(Random(seed), tokens)
    assert WordTokenizer().pieces("".join(words)) == words and len(words) == tokens


def test_a_longer_chat_begins_as_the_shorter_one() -> None:
    words = WordTokenizer()
    first = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    longer = [*first, {"role": "assistant", "content": "hi there"}, {"role": "user", "content": "more"}]
    asked, whole = words.prompt(first), words.prompt(longer)
    assert whole[: len(asked)] == asked
    said = words.encode("hi there")
    assert whole[len(asked) :][: len(said)] == said
    assert words.prompt(first, answer=False) == asked[:-1]


def test_roles_and_tools_count() -> None:
    words, message = WordTokenizer(), [{"role": "user", "content": "hello"}]
    assert words.prompt(message) != words.prompt([{"role": "system", "content": "hello"}])
    assert len(words.prompt(message, tools=[{"type": "function"}])) > len(words.prompt(message))


def test_about_four_characters_are_a_token() -> None:
    text = "The passenger asks whether the reservation may be changed to an earlier flight on the same day. " * 5
    assert 3 < len(text) / len(WordTokenizer().encode(text)) < 5


def test_content_in_parts_is_read() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url"}, {"type": "text", "text": "b"}]
    assert content_text({"content": parts}) == "a\n\nb"
    assert content_text({"content": None}) == content_text({}) == ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder: a word-level tokenizer and a template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {"[unk]": 0, "user": 1, "hello": 2, "<": 3, ">": 4, "assistant": 5, "world": 6}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[unk]"))
    made.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    made.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    return tmp_path


def test_a_models_own_tokenizer_and_template(folder: Path) -> None:
    own = tokenizer_of(folder)
    assert own.prompt([{"role": "user", "content": "hello"}]) == [3, 1, 4, 2, 3, 5, 4]
    assert own.prompt([{"role": "user", "content": None}], answer=False) == [3, 1, 4]
    assert own.pieces("hello world") == ["hello", " world"]


def test_a_folder_without_a_model_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        FolderTokenizer(tmp_path_factory.mktemp("empty"))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        FolderTokenizer(folder)
    assert isinstance(tokenizer_of(None), WordTokenizer)
