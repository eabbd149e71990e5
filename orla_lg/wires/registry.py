"""Which wire a request is of: by how its path ends."""

from __future__ import annotations

from functools import lru_cache

from orla_lg.wires.chat import CHAT
from orla_lg.wires.completions import COMPLETIONS
from orla_lg.wires.embeddings import EMBEDDINGS
from orla_lg.wires.messages import MESSAGES
from orla_lg.wires.ollama import OLLAMA_CHAT, OLLAMA_EMBED, OLLAMA_EMBEDDINGS, OLLAMA_GENERATE
from orla_lg.wires.responses import RESPONSES
from orla_lg.wires.wire import Wire

WIRES: tuple[Wire, ...] = (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    RESPONSES,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_GENERATE,
    OLLAMA_EMBED,
    OLLAMA_EMBEDDINGS,
)

_BY_ENDING = {ending: wire for wire in WIRES for ending in wire.paths}


@lru_cache(maxsize=256)
def wire_at(path: str) -> Wire | None:
    """Return the wire whose requests go to *path*; the longest ending decides."""
    segments = path.partition("?")[0].rstrip("/").split("/")
    for length in range(len(segments) - 1, 0, -1):
        if (wire := _BY_ENDING.get("/" + "/".join(segments[-length:]))) is not None:
            return wire
    return None
