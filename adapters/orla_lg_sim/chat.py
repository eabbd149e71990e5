"""OpenAI's chat completions on the simulated engine: bodies in, answers and chunks out. No HTTP here."""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from orla_lg_sim.answers import SimulatedAnswer, Unanswerable, answer_to
from orla_lg_sim.blocks import Hash, chain
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import Event, SimRequest
from orla_lg_sim.text import Tokenizer

USUAL_ANSWER_TOKENS = 48
"""In the middle, where a request does not say how long its answer must be."""


class BadRequest(ValueError):
    """A request that is wrong; the message is for its sender."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code

    def as_body(self) -> dict[str, Any]:
        """Return OpenAI's form of an error."""
        kind = "NotFoundError" if self.status == 404 else "BadRequestError"
        said = {"message": str(self), "type": kind, "param": self.param, "code": self.code or self.status}
        return {"error": said}


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat completion, understood."""

    request: SimRequest
    name: str
    """What its sender calls it, or its id: for ``abort``."""
    answer: SimulatedAnswer
    model: str
    stream: bool
    include_usage: bool
    created: int

    def usage(self, end: Event) -> dict[str, Any]:
        """Return the token counts at the end of it."""
        completion = max(0, end.tokens)
        return {
            "prompt_tokens": self.request.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.request.prompt_tokens + completion,
            "prompt_tokens_details": {"cached_tokens": end.cached_tokens},
        }

    def completion(self, end: Event, said: int, reason: str) -> dict[str, Any]:
        """Return the whole answer in one piece, of which *said* tokens came out."""
        text = "".join(self.answer.pieces[:said])
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.answer.tool is not None:
            message = {"role": "assistant", "content": None, "tool_calls": [self._tool_call(text)]}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage(end)}

    def opening(self) -> dict[str, Any]:
        """Return the chunk that says who speaks."""
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        if self.answer.tool is not None:
            delta = {"role": "assistant", "content": None, "tool_calls": [{"index": 0, **self._tool_call("")}]}
        return self._chunk(delta, None)

    def token(self, number: int) -> dict[str, Any]:
        """Return the chunk of one token, the first being 1."""
        piece = self.answer.pieces[number - 1]
        if self.answer.tool is not None:
            return self._chunk({"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}, None)
        return self._chunk({"content": piece}, None)

    def closing(self, reason: str) -> dict[str, Any]:
        """Return the chunk that says why it ends."""
        return self._chunk({}, reason)

    def usage_chunk(self, end: Event) -> dict[str, Any]:
        """Return the extra chunk that ``stream_options.include_usage`` brings."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(end)}

    def _tool_call(self, arguments: str) -> dict[str, Any]:
        function = {"name": self.answer.tool, "arguments": arguments}
        return {"id": f"call-{self.request.id}", "type": "function", "function": function}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request.id, "object": kind, "created": self.created, "model": self.model}

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}


class ChatReader:
    """Understands bodies of chat completions for one model.

    Args:
        model: The name it is served under.
        parameters: The engine's limits and seed.
        tokenizer: Counts its tokens.
        answer_tokens: See ``USUAL_ANSWER_TOKENS``.
    """

    def __init__(
        self,
        model: str,
        parameters: EngineParameters,
        tokenizer: Tokenizer,
        answer_tokens: int = USUAL_ANSWER_TOKENS,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._parameters = parameters
        self._answer_tokens = answer_tokens

    def read(self, body: Any, workflow: str | None = None) -> Chat:
        """Return what a body asks for.

        Raises:
            BadRequest: It asks for what cannot be.
        """
        self._check(body)
        prompt = self.prompt(body)
        limit = self._limit(body, len(prompt))
        random = Random(f"{self._parameters.seed} {zlib.crc32(repr(prompt).encode())}")
        try:
            answer = answer_to(body, self.tokenizer, random, limit, self._answer_tokens)
        except (Unanswerable, AttributeError, TypeError, ValueError) as error:
            raise BadRequest(f"the request cannot be answered: {error}") from error
        streams = bool(body.get("stream"))
        request = SimRequest(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            prompt_tokens=len(prompt),
            output_tokens=max(1, len(answer.pieces)),
            hashes=self._hashes(prompt, answer),
            priority=_whole(body, "priority", 0),
            workflow=_named(body, "workflow") or workflow,
            watched=streams,
        )
        usage = bool((body.get("stream_options") or {}).get("include_usage"))
        name = _named(body, "request_id") or request.id
        return Chat(request, name, answer, self.model, streams, usage, int(time.time()))

    def prompt(self, body: Mapping[str, Any], *, answer: bool = True) -> list[int]:
        """Return the tokens of a body's prompt.

        Raises:
            BadRequest: There is no prompt in it.
        """
        messages = body.get("messages")
        right = isinstance(messages, list) and messages and all(isinstance(message, Mapping) for message in messages)
        if not right or not all(message.get("role") for message in messages or ()):
            raise BadRequest("messages must be a list of at least one message, each with a role", param="messages")
        try:
            return self.tokenizer.prompt(messages or (), body.get("tools"), answer=answer)
        except (ValueError, TypeError, KeyError) as error:
            raise BadRequest(f"the messages do not fit the chat template: {error}", param="messages") from error

    def prefix(self, body: Mapping[str, Any]) -> list[Hash]:
        """Return the hashes of the blocks that every request beginning with this body's messages has.

        Raises:
            BadRequest: There are no messages in it.
        """
        return chain(self.prompt(body, answer=False), self._parameters.block_tokens)

    def _hashes(self, prompt: Sequence[int], answer: SimulatedAnswer) -> list[Hash]:
        # The answer's tokens too: when it comes back as part of the next prompt, its blocks are found.
        said = [token for piece in answer.pieces for token in self.tokenizer.encode(piece)[:1]]
        return chain([*prompt, *said], self._parameters.block_tokens)

    def _check(self, body: Any) -> None:
        if not isinstance(body, Mapping):
            raise BadRequest("the body must be a JSON object")
        model = body.get("model")
        if model not in (None, "", self.model):
            raise BadRequest(f"the model {model!r} does not exist", param="model", status=404, code="model_not_found")
        if _whole(body, "n", 1) != 1:
            raise BadRequest("n must be 1: the simulation gives one answer", param="n")
        for name, least, most in (("temperature", 0, 2), ("top_p", 0, 1)):
            value = body.get(name)
            if value is not None and not (isinstance(value, int | float) and least <= value <= most):
                raise BadRequest(f"{name} must lie in [{least}, {most}], got {value!r}", param=name)
        if body.get("stream_options") and not body.get("stream"):
            raise BadRequest("stream_options may only be given with stream", param="stream_options")
        if not isinstance(body.get("stream_options") or {}, Mapping):
            raise BadRequest("stream_options must be an object", param="stream_options")

    def _limit(self, body: Mapping[str, Any], prompt: int) -> int:
        """Return the most tokens that may be answered."""
        longest = self._parameters.longest_tokens
        asked = _whole(body, "max_completion_tokens", 0) or _whole(body, "max_tokens", 0)
        wrong = [name for name in ("max_tokens", "max_completion_tokens") if body.get(name) == 0 or asked < 0]
        if wrong:
            raise BadRequest(f"{wrong[0]} must be at least 1", param=wrong[0])
        if prompt + max(asked, 1) > longest:
            raise BadRequest(
                f"This model's maximum context length is {longest} tokens, but the prompt has {prompt} and "
                f"{max(asked, 1)} were asked for the answer; shorten the messages or the answer",
                param="messages",
                code="context_length_exceeded",
            )
        return asked or longest - prompt


def _whole(body: Mapping[str, Any], name: str, default: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise BadRequest(f"{name} must be a whole number, got {value!r}", param=name)
    return value


def _named(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{name} must be a string, got {value!r}", param=name)
    return value or None
