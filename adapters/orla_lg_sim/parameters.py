"""What is to be simulated, in numbers: written by hand, or by ``orla-lg sim calibrate`` from a live engine."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any

from orla_lg.errors import ConfigError

_HEAD = "# Parameters of a simulated engine (orla_lg). Times are in seconds.\n"
_AT_LEAST_ONE = ("block_tokens", "kv_blocks", "context_tokens", "max_running", "max_batch_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParameters:
    """An engine with continuous batching, in numbers. The defaults are those of a small model on two CPU cores.

    One step of the engine takes::

        step_s + prefill_token_s * prefilled tokens + prefill_attention_s * (token, earlier token) pairs of prefill
               + prefill_s * prefilled requests
               + decode_sequence_s * decoding sequences + decode_context_s * tokens in their contexts
               + held_token_s * tokens in blocks held, those that several share once

    Raises:
        ConfigError: A value cannot be right.
    """

    block_tokens: int = 32
    """Tokens in one block of the KV cache: cached together or not at all."""
    kv_blocks: int = 1455
    """Blocks in the pool; vLLM keeps one of those it reports for itself."""
    context_tokens: int = 8192
    """The longest prompt plus answer."""
    max_running: int = 16
    """Sequences in one batch."""
    max_batch_tokens: int = 2048
    """Tokens in one step; a longer prefill goes in chunks."""
    priority: bool = True
    """Lower numbers first, as vLLM has it; else first come, first served."""
    prefix_caching: bool = True
    async_scheduling: bool = False
    """The next step is composed when the present one starts: what arrives meanwhile waits one step longer."""
    keep_whole: float = 0.0
    """Above 0, calls of suspended workflows are held back (``residents``) until this part of the pool stays spare."""
    watermark: float = 0.0
    """The part of the pool that must stay free when a waiting request is admitted, 0 to 1."""
    step_s: float = 0.022
    prefill_token_s: float = 0.0009
    prefill_attention_s: float = 1.0e-8
    prefill_s: float = 0.0
    """Beginning a prefill, for each request that is in a step with more than one token."""
    decode_sequence_s: float = 0.0012
    decode_context_s: float = 1.0e-6
    held_token_s: float = 0.0
    """Reading the KV cache from memory: what several sequences share is read for all of them at once."""
    request_s: float = 0.008
    """What the server does for a request before it can be scheduled, one request after another."""
    request_token_s: float = 0.0
    """The same, for each token of the prompt."""
    jitter: float = 0.0
    """How much step times vary: the standard deviation of their logarithm."""
    seed: int = 0
    """Of the jitter, and of the answers' texts."""

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ConfigError(f"engine parameter {name} must be at least 1, got {getattr(self, name)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not (isfinite(value) and value >= 0):
                raise ConfigError(f"engine parameter {field.name} must be 0 or more, got {value}")
        for name in ("watermark", "keep_whole"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"engine parameter {name} must be below 1, got {getattr(self, name)}")
        if self.max_running > self.max_batch_tokens:
            raise ConfigError(
                f"engine parameter max_running ({self.max_running}) must not exceed max_batch_tokens "
                f"({self.max_batch_tokens}): every running sequence decodes one token in a step"
            )

    @property
    def kv_tokens(self) -> int:
        """What the whole KV cache holds, in tokens."""
        return self.kv_blocks * self.block_tokens

    @property
    def longest_tokens(self) -> int:
        """The longest prompt plus answer that can ever run."""
        return min(self.context_tokens, self.kv_tokens)

    def save(self, path: Path) -> None:
        """Write the parameters as TOML."""
        lines = [f"{name} = {_toml(value)}\n" for name, value in asdict(self).items()]
        path.write_text(_HEAD + "".join(lines), encoding="utf-8")


def load(path: Path) -> EngineParameters:
    """Read parameters that ``save`` or a user wrote; what is not there keeps its default.

    Raises:
        ConfigError: The file cannot be read, or holds what is no parameter.
    """
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"engine parameters cannot be read from {path}: {error}") from error
    return parameters_of(said)


def parameters_of(said: dict[str, Any]) -> EngineParameters:
    """Return the parameters in *said*, a mapping from names to values.

    Raises:
        ConfigError: A name is no parameter, or a value is not of its type.
    """
    kinds = {field.name: type(field.default) for field in fields(EngineParameters)}
    if unknown := sorted(set(said) - set(kinds)):
        raise ConfigError(f"unknown engine parameters {unknown}; known: {sorted(kinds)}")
    return EngineParameters(**{name: _typed(name, value, kinds[name]) for name, value in said.items()})


def _typed(name: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"engine parameter {name} must be of type {kind.__name__}, got {value!r}")
    return value


def _toml(value: bool | float | int) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
