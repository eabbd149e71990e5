"""What of the gateway can be configured: ``[serve.gateway]`` in orla.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from orla_lg.core.boundary import checked
from orla_lg.errors import ConfigError, did_you_mean, shown

SESSION_HEADERS = (
    "x-claude-code-session-id",  # Claude Code
    "session-id",  # Codex
    "thread-id",
    "x-dynamo-session-id",  # NVIDIA Dynamo
    "x-session-id",  # OpenCode, llm-d
    "x-session-affinity",
    "x-smg-routing-key",  # SGLang's gateway
    "x-litellm-session-id",  # LiteLLM
    "x-litellm-trace-id",
    "agent-session-id",  # Envoy AI Gateway
)
"""Headers by which coding agents and other routers name a session, the surest first."""

FINAL_HEADERS = ("x-dynamo-session-final",)
"""Headers by which a call is said to be the last one of its session."""

SESSION_FIELDS = ("program_id", "prompt_cache_key")
"""Fields of a request's body that name a session, the surest first."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """How the gateway knows sessions, and what it bears.

    Raises:
        ConfigError: A value is not allowed.
    """

    session_headers: tuple[str, ...] = SESSION_HEADERS
    """In lower case."""
    final_headers: tuple[str, ...] = FINAL_HEADERS
    session_fields: tuple[str, ...] = SESSION_FIELDS
    session_idle_s: float = 300.0
    """After so many seconds without calls a session is idle, as a thread is between two runs."""
    max_sessions: int = 10_000
    """So many are followed at once; of more, those that are without calls the longest are idle at once."""
    answer_timeout_s: float = 600.0
    """So long an engine may say nothing, before its first token and between two."""
    max_attempts: int = 3
    """Of each call, before its first token."""

    def __post_init__(self) -> None:
        for name in ("session_headers", "final_headers", "session_fields"):
            given = checked.texts(name, getattr(self, name))
            kept = given if name == "session_fields" else tuple(each.lower() for each in given)
            object.__setattr__(self, name, kept)
        for name in ("session_idle_s", "answer_timeout_s"):
            checked.number(name, getattr(self, name), above=0)
        for name in ("max_sessions", "max_attempts"):
            checked.whole(name, getattr(self, name), least=1)

    @classmethod
    def of(cls, table: object, where: str = "serve.gateway") -> Self:
        """Return the settings in a table of orla.toml.

        Raises:
            ConfigError: Naming the key, what was found and what is allowed.
        """
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}: expected a table, got {shown(table)}")
        known = [each.name for each in fields(cls)]
        for key in table:
            if key not in known:
                raise ConfigError(f"{checked.dotted(where, key)}: unknown key{did_you_mean(key, known)}")
        given: dict[str, Any] = dict(table)
        try:
            return cls(**given)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from error
