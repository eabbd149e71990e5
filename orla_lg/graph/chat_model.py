"""The second way in: ``ChatOrla``, a ``ChatOpenAI`` whose requests are served by an ``Orla``.

Message conversion, streaming, tools and schemas are LangChain's and the SDK's business. ``ChatOrla`` gives
them an SDK client whose ``request`` goes through our core, tells it which model run is asking, and puts the
record on the answer.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from contextlib import aclosing, closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import Any, Self, cast

import openai
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.messages import AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables.config import var_child_runnable_config
from langchain_openai import ChatOpenAI
from openai.resources.chat.completions import Completions
from pydantic import Field, SecretStr, model_validator

from orla_lg.core.call import NO_HINTS, Hints
from orla_lg.core.mapping import AUTO
from orla_lg.core.record import Record
from orla_lg.core.steps import adrive, drive
from orla_lg.errors import ArgumentError, ConfigError, OrlaError
from orla_lg.graph.context import Core, ModelRun, Origin, binding_among, completed, followed, origin
from orla_lg.graph.interception import CHAT_COMPLETIONS, chat_steps
from orla_lg.graph.running_node import node_around
from orla_lg.openai_api.client import NO_KEY
from orla_lg.openai_api.home import headers_of, query_of

RunManager = CallbackManagerForLLMRun | AsyncCallbackManagerForLLMRun

_HINTS = frozenset(hint.name for hint in fields(Hints))


@dataclass(eq=False, slots=True)
class _Asking:
    """What ``ChatOrla`` knows of the request that the SDK is about to make."""

    manager: RunManager | None
    said: Hints
    assemble: bool
    shows_counts: bool = False
    record: Record | None = None

    def note(self, record: Record) -> None:
        self.record = record


_ASKING: ContextVar[_Asking | None] = ContextVar("orla_asking", default=None)
_MANAGER: ContextVar[RunManager | None] = ContextVar("orla_manager", default=None)
"""The run manager of ``_generate_with_cache``, which LangChain does not pass on when it streams inside."""


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def _origin_of(manager: RunManager | None) -> Origin | None:
    """Return where the model run of *manager* comes from: its own metadata, and the node's config."""
    if manager is None:
        return origin()
    config = var_child_runnable_config.get() or {}
    run = ModelRun(manager.run_id, manager.parent_run_id, manager.metadata, manager.handlers)
    return completed(
        binding_among(manager.handlers, manager.parent_run_id), manager.metadata, manager.parent_run_id, config, run,
        node_around(manager.metadata),
    )  # fmt: skip


class _ServedClient(openai.OpenAI):
    """An SDK client without an address of its own: every chat completion goes through the core."""

    core: Core

    def request(self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None) -> Any:
        form = {"cast_to": cast_to, "stream": stream, "stream_cls": stream_cls}
        return drive(_steps(self, options, form))


class _AsyncServedClient(openai.AsyncOpenAI):
    """``_ServedClient`` for tasks."""

    core: Core

    async def request(self, cast_to: Any, options: Any, *, stream: bool = False, stream_cls: Any = None) -> Any:
        form = {"cast_to": cast_to, "stream": stream, "stream_cls": stream_cls}
        return await adrive(_steps(self, options, form))


def _steps(client: _ServedClient | _AsyncServedClient, options: Any, form: Mapping[str, Any]) -> Any:
    if options.url != CHAT_COMPLETIONS:
        raise OrlaError(f"ChatOrla serves {CHAT_COMPLETIONS}, not {options.url}; use ChatOpenAI for that")
    if not isinstance(options.json_data, Mapping):
        raise OrlaError(f"a chat completion's body is an object, not {type(options.json_data).__name__}")
    asking = _ASKING.get() or _Asking(None, NO_HINTS, assemble=False)
    come_from = _origin_of(asking.manager or _MANAGER.get())
    followed(options.json_data)
    unplaced = functools.partial(_refuse, options)
    return chat_steps(
        client.core, come_from, client, unplaced, options, form,
        said=asking.said, may_pass=False, assemble=asking.assemble,
        shows_counts=asking.shows_counts, on_record=asking.note,
    )  # fmt: skip


def _refuse(options: Any) -> Any:
    raise AssertionError(f"a ChatOrla call is always placed: {options.url}")


class ChatOrla(ChatOpenAI):
    """A drop-in for ``ChatOpenAI`` whose calls are mapped, queued and cached by an ``Orla``.

    Example:
        ``ChatOrla(orla=orla, model="heavy").invoke("Hello", priority=8)``

    ``model`` names a backend, a model that a backend serves, or ``"auto"``; a mapping of the stage it is
    called in comes first. Hints (``priority``, ``cache``, ``deadline_s``, ``tenant``) may be given to any
    call or with ``bind``. Answers carry their record in ``response_metadata["orla"]``.

    Raises (from any call):
        MappingError: The model is unknown, or its engine cannot do what is asked.
        QueueFull, DeadlineExceeded, BackendUnavailable, OrlaClosed: See ``orla_lg.errors``.
    """

    orla: Any = Field(exclude=True, repr=False)
    """The ``Orla`` that serves the calls; it wins over one whose wrapped graph is running."""

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """An ``Orla`` cannot be written down."""
        return False

    @model_validator(mode="before")
    @classmethod
    def _orla_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict):
            if said := sorted(_HINTS & values.keys()):
                given = f"{said[0]}={values[said[0]]!r}"
                raise ConfigError(
                    f"ChatOrla: {said[0]} is a hint of a call: model.invoke(…, {given}), or for all calls "
                    f"ChatOrla(…).bind({given})"
                )
            if not (values.keys() & {"model", "model_name"}):
                values["model"] = AUTO
            if not (values.keys() & {"api_key", "openai_api_key"}):
                values["api_key"] = SecretStr(NO_KEY)
            if not (values.keys() & {"base_url", "openai_api_base"}):
                values["base_url"] = "http://orla.invalid/v1"  # never asked: backends have the addresses
            values.setdefault("use_responses_api", False)
        return values

    @model_validator(mode="after")
    def _orla_clients(self) -> Self:
        core = getattr(self.orla, "core", None)
        if not isinstance(core, Core):
            raise ValueError(f"ChatOrla needs orla=Orla(...), got {type(self.orla).__name__}")
        settings: dict[str, Any] = {
            "api_key": NO_KEY,
            "base_url": self.openai_api_base,
            "timeout": self.request_timeout,
            "default_headers": self.default_headers,
            "default_query": self.default_query,
        }
        if self.max_retries is not None:
            settings["max_retries"] = self.max_retries
        if core.disabled:
            self._step_aside(core, settings)
            return self
        # Nothing passes these clients: what is theirs to say (time-outs, headers) is carried to the backend's own.
        served = _ServedClient(**settings, http_client=self.http_client)
        aserved = _AsyncServedClient(**settings, http_client=self.http_async_client)
        served.core = aserved.core = core
        self._use(served, aserved)
        return self

    def _use(self, client: openai.OpenAI, aclient: openai.AsyncOpenAI) -> None:
        self.root_client, self.root_async_client = client, aclient
        self.client, self.async_client = client.chat.completions, aclient.chat.completions

    def _step_aside(self, core: Core, settings: dict[str, Any]) -> None:
        """Ask the engine that the model's name means, past the core (``ORLA_DISABLED=1``)."""
        scheduler = next(
            (d for d in core.serving.schedulers.values() if self.model_name in (d.backend.name, AUTO)), None
        )
        if scheduler is None:
            return
        settings |= {
            "base_url": scheduler.backend.url,
            "api_key": scheduler.backend.api_key or NO_KEY,
            "default_headers": headers_of(None, self.default_headers, core.clients[scheduler.backend.name].headers),
            "default_query": query_of(None, self.default_query, core.clients[scheduler.backend.name].query),
        }
        self.model_name = scheduler.backend.model or self.model_name
        if self.stream_usage is None:
            self.stream_usage = True
        self._use(openai.OpenAI(**settings), openai.AsyncOpenAI(**settings))

    # LangChain's hooks: name the model run, let ChatOpenAI do it, put the record on the answer.

    def _generate_with_cache(
        self,
        messages: Any,
        stop: Any = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _set(_MANAGER, run_manager):
            return super()._generate_with_cache(messages, stop=stop, run_manager=run_manager, **kwargs)

    async def _agenerate_with_cache(
        self,
        messages: Any,
        stop: Any = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with _set(_MANAGER, run_manager):
            return await super()._agenerate_with_cache(messages, stop=stop, run_manager=run_manager, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asking = _asking(run_manager, kwargs, assemble=True)
        with _set(_ASKING, asking):
            try:
                return _with_record(super()._generate(messages, stop, run_manager, **kwargs), asking)
            except TypeError as error:
                _answer_unknown(error, kwargs, self.model_kwargs)
                raise

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        asking = _asking(run_manager, kwargs, assemble=True)
        with _set(_ASKING, asking):
            try:
                return _with_record(await super()._agenerate(messages, stop, run_manager, **kwargs), asking)
            except TypeError as error:
                _answer_unknown(error, kwargs, self.model_kwargs)
                raise

    def _stream(self, *args: Any, **kwargs: Any) -> Iterator[ChatGenerationChunk]:
        asking = _asking(kwargs.get("run_manager"), kwargs, assemble=False, shows_counts=self.stream_usage is None)
        with closing(cast("Generator[ChatGenerationChunk]", super()._stream(*args, **kwargs))) as chunks:
            # The request is made on the way to the first chunk. A generator must not leave a context
            # variable set while its caller runs.
            with _set(_ASKING, asking):
                try:
                    first = next(chunks, None)
                except TypeError as error:
                    _answer_unknown(error, kwargs, self.model_kwargs)
                    raise
            if first is None:
                return
            only = asking.shows_counts and _is_count(first)  # so far
            try:
                second = next(chunks, None) if only else None
            except Exception:
                yield first  # whatever breaks the stream, bare code has this one before
                raise
            if only and second is None:
                return  # LangChain raises for an empty answer; a record or a count would hide that it is empty
            yield first
            if second is not None:
                yield second
            yield from chunks
        if asking.record is not None:
            yield _record_chunk(asking.record)

    async def _astream(self, *args: Any, **kwargs: Any) -> AsyncIterator[ChatGenerationChunk]:
        asking = _asking(kwargs.get("run_manager"), kwargs, assemble=False, shows_counts=self.stream_usage is None)
        async with aclosing(super()._astream(*args, **kwargs)) as chunks:  # type: ignore[type-var]
            with _set(_ASKING, asking):
                try:
                    first = await anext(chunks, None)
                except TypeError as error:
                    _answer_unknown(error, kwargs, self.model_kwargs)
                    raise
            if first is None:
                return
            only = asking.shows_counts and _is_count(first)
            try:
                second = await anext(chunks, None) if only else None
            except Exception:
                yield first
                raise
            if only and second is None:
                return
            yield first
            if second is not None:
                yield second
            async for chunk in chunks:
                yield chunk
        if asking.record is not None:
            yield _record_chunk(asking.record)


def _asking(
    manager: RunManager | None, kwargs: dict[str, Any], *, assemble: bool, shows_counts: bool = False
) -> _Asking:
    """Take the hints out of *kwargs*: the rest is the engine's."""
    said = {name: kwargs.pop(name) for name in _HINTS & kwargs.keys()}
    return _Asking(manager, Hints.of(said) if said else NO_HINTS, assemble, shows_counts)


_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def _answer_unknown(error: TypeError, *given: Mapping[str, Any]) -> None:
    """Raise the answer to an argument that is neither a hint nor a field of the request, if that is what failed.

    Raises:
        ArgumentError: Naming the nearest.
    """
    wrong = _UNEXPECTED.search(str(error))
    if wrong is None or not any(wrong[1] in arguments for arguments in given):
        return
    name, known = wrong[1], {*_HINTS, *inspect.signature(Completions.create).parameters} - {"self"}
    near = difflib.get_close_matches(name, known, n=1)
    raise ArgumentError(
        f"ChatOrla: unknown argument {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        + f" A call takes the hints {', '.join(sorted(_HINTS))} and the fields of a chat completion; "
        f"what only its engine knows goes into extra_body={{{name!r}: …}}"
    ) from None  # fmt: skip


def _with_record(result: ChatResult, asking: _Asking) -> ChatResult:
    if asking.record is not None:
        for generation in result.generations:
            generation.message.response_metadata["orla"] = asking.record.asdict()
    return result


def _is_count(chunk: ChatGenerationChunk) -> bool:
    """Whether a chunk is the engine's count of tokens and nothing of an answer."""
    message = chunk.message
    assert isinstance(message, AIMessageChunk)
    says = message.content or message.tool_call_chunks or chunk.generation_info
    return message.usage_metadata is not None and not says


def _record_chunk(record: Record) -> ChatGenerationChunk:
    return ChatGenerationChunk(message=AIMessageChunk(content="", response_metadata={"orla": record.asdict()}))
