"""What a scripted server answers, as values that print as the code that makes them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal


class _Terse:
    """Prints what is not as usual."""

    def __repr__(self) -> str:
        usual = type(self)()
        given = ((each.name, getattr(self, each.name)) for each in fields(self))  # type: ignore[arg-type]
        odd = [f"{name}={value!r}" for name, value in given if value != getattr(usual, name)]
        return f"{type(self).__name__}({', '.join(odd)})"


@dataclass(frozen=True, repr=False)
class ToolCall(_Terse):
    """One call of a tool, as the model means it."""

    name: str = "look_up"
    arguments: str = '{"word": "Grüße", "count": 2}'
    id: str | None = "call_1"


@dataclass(frozen=True, repr=False)
class Answer(_Terse):
    """What the model says, whatever the form in which the server puts it."""

    content: str | None = "Hello there"
    calls: tuple[ToolCall, ...] = ()
    finish: str | None = "stop"
    choices: Literal[
        "one",
        "missing",
        "null",
        "empty",
        "two",
        "text",
        "number",
        "no message",
        "null message",
        "no index",
        "null parts",
    ] = "one"
    """The shape around it."""


@dataclass(frozen=True, repr=False)
class Usage(_Terse):
    """The token counts that the server tells."""

    value: Any = field(default_factory=lambda: {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})
    place: Literal["only where asked", "always last", "in each chunk", "with the finish", "never"] = (
        "only where asked"
    )
    """In streams; whole answers have them unless ``never``."""


@dataclass(frozen=True, repr=False)
class Numbering(_Terse):
    """How a stream tells which tool call a piece belongs to, and what it repeats."""

    index: Literal[
        "right", "from one", "all zero", "null", "omitted", "sparse", "huge", "negative", "text", "float"
    ] = "right"
    ids: Literal["first", "each", "empty later"] = "first"
    names: Literal["first", "each", "empty later"] = "first"
    types: Literal["first", "each", "none"] = "first"
    pieces: int = 8
    """Characters of arguments at a time; 0 sends a call whole, -1 all calls in one chunk."""


@dataclass(frozen=True, repr=False)
class Dialect(_Terse):
    """How a stream's events are written."""

    eol: Literal["\n", "\r\n", "\r"] = "\n"
    data: Literal["data: ", "data:", "data:  "] = "data: "
    lead: str = ""
    """Before everything: a byte-order mark, a comment, blank lines."""
    fields: tuple[str, ...] = ()
    """Lines before each event's data: ``event: message``, ``id: 1``."""
    between: str = ""
    """Between events: a comment, a ping."""
    several_lines: bool = False
    """Whether an event's JSON goes over several data lines."""
    end: Literal[
        "done", "no done", "data after", "done twice", "no blank line", "no finish", "no finish, no done"
    ] = "done"
    error_at: int | None = None
    """Before which chunk an error event comes."""
    error: Any = field(default_factory=lambda: {"error": {"message": "out of memory", "code": 500}})
    ascii: bool = False
    """Whether characters beyond ASCII are escaped."""
    pieces: int = 5
    """Characters of content at a time."""
    roles: Literal["first", "each", "never"] = "first"
    broken_at: int | None = None
    """Which chunk is no JSON."""


@dataclass(frozen=True, repr=False)
class Framing(_Terse):
    """How the bytes of a body go over the network."""

    how: Literal[
        "length", "chunked", "close", "short length", "long length", "no last chunk", "bad chunk", "http/1.0"
    ] = "chunked"
    cuts: tuple[int, ...] = ()
    """Bytes of the pieces, repeated; none: one event a piece."""
    encoding: Literal[
        "identity", "gzip", "deflate", "raw deflate", "x-gzip", "gzip twice", "bad gzip", "cut gzip", "br",
        "mislabelled", "empty gzip",
    ] = "identity"  # fmt: skip
    forced: bool = False
    """Whether it is encoded for those too that do not accept it."""
    drop: Literal["", "close before", "reset before", "close after head", "reset after head", "close within",
                  "reset within", "hang before", "hang within"] = ""  # fmt: skip
    drop_at: int = 50
    """How much of the body goes before a drop within, in per cent."""


@dataclass(frozen=True, repr=False)
class Reply(_Terse):
    """What one request meets."""

    status: int = 200
    answer: Answer = Answer()
    usage: Usage = Usage()
    numbering: Numbering = Numbering()
    dialect: Dialect = Dialect()
    framing: Framing = Framing()
    content_type: str | None = "right"
    """``right`` is what suits the body; ``None``: no header."""
    headers: tuple[tuple[str, str], ...] = ()
    body: str | None = None
    """Instead of the answer."""
    redirect: Literal["", "same", "relative", "port", "host", "scheme", "nowhere", "missing"] = ""
    refuses: tuple[str, ...] = ()
    """Fields that make it answer ``refusal_status`` and nothing else."""
    refusal_status: int = 400
    ignores_stream: bool = False
    """Whether a streamed request gets a whole answer."""
    always_streams: bool = False
    informational: int | None = None
    """A 1xx status before the real one."""


@dataclass(frozen=True, repr=False)
class Case(_Terse):
    """A script, and the call that meets it."""

    script: tuple[Reply, ...] = (Reply(),)
    """For each request in turn; the last is repeated."""
    outer: Literal["invoke", "ainvoke", "stream", "astream"] = "invoke"
    inner: Literal["invoke", "stream", "stop"] = "invoke"
    """What the node does with its model; ``stop`` reads one chunk of a stream."""
    ask: Literal["plain", "tools", "json_schema", "function_calling", "json_mode"] = "plain"
    retries: int = 0
    stream_usage: bool = False

    @property
    def streams(self) -> bool:
        """Whether the request is a streamed one."""
        return self.inner != "invoke" or self.outer in ("stream", "astream")
