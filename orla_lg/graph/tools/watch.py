"""The watch over one call's answer: starts what is safe as soon as it is whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orla_lg.wires.watching import AnswerWatch


def watch_for(core: Any, come_from: Any, call: Any, body: Mapping[str, Any]) -> AnswerWatch | None:
    """Return what hears the answer to *body*; ``None`` where it offers no tool that is safe."""
    return None
