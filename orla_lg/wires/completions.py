"""OpenAI's completions: a text goes on. What a prompt says is one text, without roles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orla_lg.core.call import OBJECT, Ask
from orla_lg.wires import chat
from orla_lg.wires.reading import Garbage, count, list_in, object_in
from orla_lg.wires.wire import Body, ChunkReader, Untranslatable, Wire

_CARRIED = (
    "max_tokens", "temperature", "top_p", "seed", "stop", "presence_penalty", "frequency_penalty", "logit_bias",
    "user", "stream", "stream_options", "n",
)  # fmt: skip
"""Fields that chat completions have under the same name."""


class Completions(Wire):
    """``/completions``; every OpenAI-compatible engine is taken to speak it."""

    name = "completions"
    title = "completions"
    paths = ("/completions",)
    path = "v1/completions"
    templated = False
    counts_on_demand = True

    brings = staticmethod(chat.brings)
    usage_in = staticmethod(chat.usage_in)
    ends_well = staticmethod(chat.ends_well)
    is_over = staticmethod(chat.is_done)

    def ask_of(self, body: Body) -> Ask:  # noqa: D102
        body = body if isinstance(body, OBJECT) else {}
        return Ask(
            model=str(body.get("model") or "auto"),
            messages=[{"role": "user", "content": text} for text in _texts(body.get("prompt"))],
            stream=bool(body.get("stream")),
            max_tokens=count(body.get("max_tokens")) or None,
        )

    def to_chat(self, body: Body) -> dict[str, Any]:  # noqa: D102
        texts = _texts(body.get("prompt"))
        if len(texts) != 1:
            raise Untranslatable("prompt", "a prompt of tokens, or more than one")
        for name, value in body.items():
            if value and name not in _CARRIED and name not in ("prompt", "model"):
                raise Untranslatable(name, f"{value!r:.60}")
        said = {name: body[name] for name in _CARRIED if body.get(name) is not None}
        return {**said, "messages": [{"role": "user", "content": texts[0]}]}

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:  # noqa: D102
        choices = list_in(completion, "choices")
        if not choices:
            raise Garbage("the completion has no choices")
        return {**_rest(completion), "choices": [_choice(each, "message") for each in choices]}

    def reader(self, asked: Body) -> ChunkReader:  # noqa: D102
        return _Chunks()

    def error(self, status: int, message: str, *, kind: str | None = None) -> dict[str, Any]:  # noqa: D102
        return chat.error_of(status, message, kind)


def _texts(prompt: Any) -> Sequence[str]:
    """Return the texts of a prompt; none where it is tokens."""
    if isinstance(prompt, str):
        return (prompt,)
    listed = prompt if isinstance(prompt, list | tuple) else ()
    return [each for each in listed if isinstance(each, str)] if all(isinstance(e, str) for e in listed) else ()


def _rest(said: Body) -> dict[str, Any]:
    return {**{name: value for name, value in said.items() if name != "choices"}, "object": "text_completion"}


def _choice(choice: Any, part: str) -> dict[str, Any]:
    if not isinstance(choice, dict):
        raise Garbage(f"a choice is {type(choice).__name__}, expected an object")
    return {
        "index": choice.get("index") or 0,
        "text": object_in(choice, part).get("content") or "",
        "logprobs": None,
        "finish_reason": choice.get("finish_reason"),
    }


class _Chunks(chat.Chunks):
    """Chunks of a chat completion as those of a text."""

    def feed(self, chunk: Body) -> bytes:
        if chunk.get("error"):
            return super().feed(chunk)
        choices = [_choice(each, "delta") for each in list_in(chunk, "choices")]
        return super().feed({**_rest(chunk), "choices": choices})


COMPLETIONS = Completions()
