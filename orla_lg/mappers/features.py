"""Numbers that a prompt's text gives away: how long, how formal, how mathematical, what it asks for.

Two blocks. The *dense* block is a few dozen counts and shares, each with a name, so that a decision can be
explained. The *hashed* block is words and pairs of words, folded into a fixed number of buckets. Standard library
only, about 100 µs for 500 characters; nothing here raises, whatever the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import log1p, sqrt
from zlib import crc32

from orla_lg.core.call import Call
from orla_lg.mappers.one_bit import last_user_text

MAX_CHARS = 4_000
"""Of a longer text the two ends are read: that bounds the time, and the question stands at one of them."""


@dataclass(frozen=True, slots=True)
class UserPrompt:
    """What features are made of: the last user message, and what surrounds it."""

    text: str
    system_chars: int = 0
    turns: int = 1
    """User messages so far, this one included."""
    tools: bool = False
    json_schema: bool = False


def prompt_of(call: Call) -> UserPrompt | None:
    """Return what a call's features are made of; ``None`` without a user's message."""
    messages = call.ask.messages
    text = last_user_text(messages)
    if not text:
        return None
    texts = [(message.get("role"), message.get("content")) for message in messages if isinstance(message, Mapping)]
    system = sum(len(content) for role, content in texts if role == "system" and isinstance(content, str))
    turns = sum(role == "user" for role, _ in texts)
    return UserPrompt(text, system, turns, call.ask.tools, call.ask.json_schema)


_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_OPTION = re.compile(r"^\s*(?:\(?[A-Ea-e][.)]|\(?[ivx]{1,4}[.)]|[-*•]|\d{1,2}[.)])\s", re.M)
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")
_VARIABLE = re.compile(r"\b[b-hj-zB-HJ-Z]\b")
_CAPITALISED = re.compile(r"(?<=[a-z,;] )[A-Z][a-z]+")
_MATH_SIGNS = frozenset("=+^<>≤≥∞∑∫√×÷∀∃∨∧⊃→←∈≠±*/|")
_CODE_SIGNS = frozenset("{}[];`_#")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CUES: Mapping[str, frozenset[str]] = {
    "asks": _set("what which who whom whose when where why how"),
    "asks_why": _set("why how explain reason reasons describe discuss justify"),
    "computes": _set("find compute calculate determine evaluate solve simplify express"),
    "proves": _set("prove proof show verify derive theorem lemma"),
    "creates": _set("write create design compose draft develop generate imagine"),
    "codes": _set("implement code program function algorithm array python html class script debug"),
    "transforms": _set("rewrite edit translate summarize extract classify identify list convert correct"),
    "plays": _set("act pretend assume role persona embody imagine suppose"),
    "supposes": _set("if suppose let given assume such assuming provided where"),
    "negates": _set("not no never none except without neither nor isn't doesn't false least"),
    "quantifies": _set("all every each any both only exactly distinct possible least most some"),
    "compares": _set("than more less fewer greater larger twice half times third double triple"),
    "counts": _set("ways choose arrangements combinations probability random number integers integer"),
    "algebra": _set("polynomial equation equations function roots root real positive complex variables matrix"),
    "geometry": _set("triangle circle square radius angle area volume plane point line sides length"),
    "proposes": _set("statement statements true following scenario scenarios"),
    "money": _set("cost costs price pay paid buy bought spend earns dollars cents money sell sold"),
    "time": _set("day days week weeks month year years hour hours minutes monday per"),
    "speaks": _set("i you he she they we my your his her their our me"),
    "links": _set("because therefore however although since while whereas thus then after before"),
    "quality": _set("concise detailed step creative compelling thorough brief json format table"),
}  # fmt: skip
_CUE_OF: Mapping[str, tuple[str, ...]] = {
    word: tuple(name for name, words in _CUES.items() if word in words) for word in frozenset().union(*_CUES.values())
}


def clipped(text: str) -> str:
    """Return *text*, or its two ends if it is long."""
    if len(text) <= MAX_CHARS:
        return text
    return f"{text[: MAX_CHARS // 2]}\n{text[-MAX_CHARS // 2 :]}"


def sendable(text: str) -> str:
    """Return *text* as an embedding engine gets it: its ends, and nothing that UTF-8 cannot say."""
    return clipped(text).encode("utf-8", "replace").decode()


def words_of(text: str) -> list[str]:
    """Return the words of *text* in small letters."""
    return _WORD.findall(text.lower())


def features(prompt: UserPrompt, buckets: int) -> tuple[list[float], dict[int, float]]:
    """Return the values of ``DENSE``, in that order, and the hashed words; no *buckets*, no words."""
    text = clipped(prompt.text)
    words = words_of(text)
    return _dense(prompt, text, words), hashed(words, buckets) if buckets else {}


def _dense(prompt: UserPrompt, text: str, words: list[str]) -> list[float]:
    values = _shape(prompt, text, words)
    values += _notation(text)
    values += _cues(words)
    latex, options, numbers = values[_LATEX] > 0, values[_OPTIONS] > 0, values[_NUMBERS]
    size = values[_SIZE]
    # A linear model cannot learn that length means one thing in a formula and another in a list of options.
    values += [
        size * latex,
        size * options,
        numbers * (not latex and not options),
        size * (not latex and not options),
    ]
    return values


def _shape(prompt: UserPrompt, text: str, words: list[str]) -> list[float]:
    count = len(words)
    many = max(count, 1)
    sentences = len(_SENTENCE_END.findall(text))
    return [
        log1p(len(prompt.text)),
        log1p(count),
        log1p(sentences),
        log1p(count / max(sentences, 1)),
        sum(map(len, words)) / many,
        len(set(words)) / sqrt(many),  # Guiraud's index: unlike types / tokens it does not fall with length
        sum(len(word) > 8 for word in words) / many,
        log1p(text.count("\n")),
        log1p(text.count("?")),
        log1p(text.count(",")),
        log1p(text.count('"') + text.count("“")),
        len(_CAPITALISED.findall(text)) / many,
        0.0 if text.isascii() else sum(map("\x7f".__lt__, text)) / len(text),
        log1p(prompt.system_chars),
        log1p(max(prompt.turns - 1, 0)),
        float(prompt.tools),
        float(prompt.json_schema),
    ]


def _notation(text: str) -> list[float]:
    numbers = _NUMBER.findall(text)
    size = max(len(text), 1)
    return [
        log1p(len(numbers)),
        log1p(max(map(len, numbers), default=0)),
        sum(map(len, numbers)) / size,
        log1p(text.count("%") + text.count("percent")),
        log1p(sum(map(_MATH_SIGNS.__contains__, text))),
        log1p(sum(map(_CODE_SIGNS.__contains__, text))),
        log1p(text.count("\\")) if _LATEX_COMMAND.search(text) else 0.0,
        log1p(text.count("$")),
        log1p(text.count("^") + text.count("_")),
        log1p(text.count("=")),
        log1p(len(_VARIABLE.findall(text))),
        log1p(len(_OPTION.findall(text))),
    ]


def _cues(words: list[str]) -> list[float]:
    counts = dict.fromkeys(_CUES, 0)
    for word in words:
        for name in _CUE_OF.get(word, ()):
            counts[name] += 1
    return [log1p(found) for found in counts.values()]


_SHAPE = (
    "chars", "words", "sentences", "words_per_sentence", "word_length", "variety", "long_words", "lines",
    "question_marks", "commas", "quotes", "names", "beyond_ascii", "system_chars", "earlier_turns", "tools",
    "json_schema",
)  # fmt: skip
_NOTATION = (
    "numbers", "longest_number", "digits", "percents", "math_signs", "code_signs", "latex", "dollars", "powers",
    "equations", "variables", "options",
)  # fmt: skip
_CROSSED = ("words_if_latex", "words_if_options", "numbers_in_prose", "words_in_prose")
DENSE: tuple[str, ...] = (*_SHAPE, *_NOTATION, *(f"cue_{name}" for name in _CUES), *_CROSSED)
"""The dense features' names. Their order and meaning belong to ``VERSION``."""
VERSION = 1
"""Counted up when a feature changes its meaning: weights of another version are refused."""
_SIZE, _NUMBERS, _LATEX, _OPTIONS = (DENSE.index(name) for name in ("words", "numbers", "latex", "options"))


def hashed(words: list[str], buckets: int) -> dict[int, float]:
    """Return the words and pairs of *words* as bucket → weight; the squares of the weights sum to 1."""
    counts: dict[int, int] = {}
    before = "^"
    for word in words:
        for term in (word, f"{before} {word}"):
            bucket = crc32(term.encode("utf-8", "replace")) % buckets
            counts[bucket] = counts.get(bucket, 0) + 1
        before = word
    norm = sqrt(sum(count * count for count in counts.values()))
    return {bucket: count / norm for bucket, count in counts.items()}
