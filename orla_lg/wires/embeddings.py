"""OpenAI's embeddings: texts become vectors. There is no answer to stream, and chat completions cannot say it."""

from __future__ import annotations

from typing import Any

from orla_lg.core.call import OBJECT, Ask
from orla_lg.wires import chat
from orla_lg.wires.reading import Garbage
from orla_lg.wires.wire import Body, ChunkReader, Untranslatable, Wire


class Embeddings(Wire):
    """``/embeddings``; every OpenAI-compatible engine is taken to speak it."""

    name = "embeddings"
    title = "embeddings"
    paths = ("/embeddings",)
    path = "v1/embeddings"
    embeds = True

    usage_in = staticmethod(chat.usage_in)

    def ask_of(self, body: Body) -> Ask:  # noqa: D102
        body = body if isinstance(body, OBJECT) else {}
        return Ask(model=str(body.get("model") or "auto"), messages=(), max_tokens=0, embeds=True)

    def streams(self, body: Body) -> bool:  # noqa: D102
        return False

    def brings(self, event: bytes) -> bool:  # noqa: D102
        raise Garbage("embeddings have no stream")

    def ends_well(self, tail: bytes) -> bool:  # noqa: D102
        return True

    def to_chat(self, body: Body) -> dict[str, Any]:  # noqa: D102
        raise Untranslatable("input", "an embedding")

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:  # noqa: D102
        raise Garbage("a chat completion has no embedding in it")

    def reader(self, asked: Body) -> ChunkReader:  # noqa: D102
        raise Garbage("embeddings have no stream")

    def error(self, status: int, message: str, *, kind: str | None = None) -> dict[str, Any]:  # noqa: D102
        return chat.error_of(status, message, kind)


EMBEDDINGS = Embeddings()
