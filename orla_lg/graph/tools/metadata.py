"""What a tool declares of itself, under ``tool.metadata["orla"]``."""

from __future__ import annotations

from collections.abc import Mapping

from langchain_core.tools import BaseTool

from orla_lg.core.boundary import checked
from orla_lg.errors import ConfigError, did_you_mean, shown

SAFE = "safe"
FINAL_PREFIX = "final_prefix"

_FLAGS = (SAFE, FINAL_PREFIX)


def check(tool: BaseTool) -> None:
    """Refuse a declaration that means nothing.

    Raises:
        ConfigError: It is none of the known ones.
    """
    own = (tool.metadata or {}).get("orla")
    if own is None:
        return
    where = f"tool {shown(tool.name)}: metadata['orla']"
    if not isinstance(own, Mapping):
        raise ConfigError(f"{where} must be a dict such as {{'safe': True}}, got {shown(own)}")
    for key, value in own.items():
        if key not in _FLAGS:
            raise ConfigError(f"{where}: unknown key {shown(key)}{did_you_mean(key, _FLAGS)}")
        checked.flag(f"{where}[{key!r}]", value)
