"""Hypothesis strategies for scripts: mostly a healthy server with a few oddities at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from hypothesis import strategies as st

from tests.differential.script import Answer, Case, Dialect, Framing, Numbering, Reply, ToolCall, Usage

T = TypeVar("T")


def mostly(usual: T, *others: T, weight: int = 1) -> st.SearchStrategy[T]:
    """Return what is *usual* about *weight* times as often as all *others* together."""
    return st.sampled_from([usual] * (weight * len(others) or 1) + list(others))


CONTENTS = (
    "Hello there", "", "Grüße, 世界 🙂!", "data: x\n\ndata: [DONE]\n\n", '{"usage": {"prompt_tokens": 1}}', "[DONE]",
    '"choices": []', "a\r\nb\rc\u2028d\x85e", "word " * 120, '{"word": "Grüße", "count": 2}', "\ufeffmark",
    "\x00\x1f",
)  # fmt: skip
CALLS = (
    ToolCall(), ToolCall(arguments=""), ToolCall(arguments="{}"), ToolCall(arguments='{"word": "a'),
    ToolCall(id=None), ToolCall(id=""), ToolCall(name="other", id="call_2"), ToolCall(id="call_3"),
    ToolCall(name="", id="call_4"), ToolCall(arguments="null", id="call_5"),
)  # fmt: skip
COUNTED = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
COUNTS: tuple[Any, ...] = (
    None, {}, [], "7", 7, {"prompt_tokens": "7", "completion_tokens": "3", "total_tokens": "10"},
    {"prompt_tokens": -7, "completion_tokens": 3, "total_tokens": -4},
    {"prompt_tokens": 7.5, "completion_tokens": 3.0, "total_tokens": 10.5},
    {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None},
    {"prompt_tokens": 7, "completion_tokens": 3}, {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 2**70},
    {"prompt_tokens": 1e308, "completion_tokens": 1e309, "total_tokens": 3},
    {**COUNTED, "prompt_tokens_details": None},
    {**COUNTED, "prompt_tokens_details": {"cached_tokens": 5}},
    {**COUNTED, "prompt_tokens_details": {"cached_tokens": "5"}},
    {**COUNTED, "prompt_tokens_details": {"cached_tokens": None}},
    {**COUNTED, "prompt_tokens_details": "none"},
    {"prompt_tokens": True, "completion_tokens": [3], "total_tokens": {"all": 10}},
)  # fmt: skip

usages = st.builds(
    Usage,
    value=mostly(Usage().value, *COUNTS),
    place=mostly("only where asked", "always last", "in each chunk", "with the finish", "never"),
)
answers = st.builds(
    Answer,
    content=st.sampled_from((*CONTENTS, None)),
    finish=mostly("stop", "length", "content_filter", None, "", "odd"),
    choices=mostly(
        "one", "missing", "null", "empty", "two", "text", "number", "no message", "null message", "no index",
        "null parts", weight=4,
    ),
)  # fmt: skip


def are_told_apart(calls: tuple[ToolCall, ...]) -> bool:
    """Whether no two have one name and one id, or one of them none: one might go on with the other."""
    return not any(
        one.name == other.name and (one.id == other.id or not one.id or not other.id)
        for one, other in itertools.combinations(calls, 2)
    )


calling = st.builds(
    Answer,
    content=mostly(None, "", "I look it up."),
    calls=st.lists(st.sampled_from(CALLS), min_size=1, max_size=3).map(tuple).filter(are_told_apart),
    finish=mostly("tool_calls", "stop", "length", None),
    choices=mostly("one", "two", "no index", weight=4),
)
numberings = st.builds(
    Numbering,
    index=mostly("right", "from one", "all zero", "null", "omitted", "sparse", "huge", "negative", "text", "float"),
    ids=mostly("first", "each", "empty later"),
    names=mostly("first", "each", "empty later"),
    types=mostly("first", "each", "none"),
    pieces=st.sampled_from((8, 0, -1, 3)),
)
ERRORS: tuple[Any, ...] = (
    {"error": {"message": "out of memory", "code": 500}}, {"error": "out of memory"}, {"error": {"code": 400}},
    {"error": {"message": "too long", "type": "invalid_request_error", "code": "context_length_exceeded"}},
    {"error": {"message": "slow down", "code": 429}}, {"error": None}, {"error": {}}, {"error": []},
    {"error": {"message": "odd", "code": 99999}}, {"error": {"message": 7, "code": "500"}},
    {"message": "none of ours"},
)  # fmt: skip
dialects = st.builds(
    Dialect,
    eol=mostly("\n", "\r\n", "\r", weight=2),
    data=mostly("data: ", "data:", "data:  "),
    lead=mostly("", "\ufeff", ": hello\n\n", "\n\n\n", ":\n", "retry: 100\n\n", "event: ping\ndata: \n\n", weight=2),
    fields=mostly((), ("event: message",), ("id: 1", "retry: 5"), ("event: completion",), ("unknown: x",), ("event",),
                  (": comment",), weight=2),
    between=mostly("", ": ping\n\n", "\n\n", "event: ping\n\n", ":\n", "data:\n\n", "data: \n\n", weight=2),
    several_lines=mostly(False, True, weight=6),
    end=mostly("done", "no done", "data after", "done twice", "no blank line", "no finish", "no finish, no done"),
    error_at=mostly(None, 0, 1, 3, weight=4),
    error=st.sampled_from(ERRORS),
    ascii=st.booleans(),
    pieces=st.sampled_from((5, 1, 100_000)),
    roles=mostly("first", "each", "never"),
    broken_at=mostly(None, 0, 1, 2, weight=8),
)  # fmt: skip


def _decidable(framing: Framing) -> Framing:
    """Leave no single first byte of raw deflate: httpx tells it from zlib's by the first read, so chance would."""
    return replace(framing, cuts=(7,)) if framing.encoding == "raw deflate" and framing.cuts[:1] == (1,) else framing


framings = st.builds(
    Framing,
    how=mostly("chunked", "length", "close", "short length", "long length", "no last chunk", "bad chunk", "http/1.0"),
    cuts=mostly((), (1,), (7,), (1, 2, 3), (64,), (5000,)),
    encoding=mostly(
        "identity", "gzip", "deflate", "raw deflate", "x-gzip", "gzip twice", "bad gzip", "cut gzip", "br",
        "mislabelled", "empty gzip", weight=3,
    ),
    forced=st.booleans(),
    drop=mostly("", "close before", "reset before", "close after head", "reset after head", "close within",
                "reset within", weight=4),
    drop_at=st.sampled_from((50, 0, 1, 90, 99)),
).map(_decidable)  # fmt: skip
HEADERS: Sequence[tuple[tuple[str, str], ...]] = (
    (), (("x-request-id", "req_1"),), (("retry-after", "0.01"),), (("retry-after", "100000"),),
    (("retry-after", "-5"),), (("retry-after", "soon"),), (("retry-after", "nan"),),
    (("retry-after", "inf"),), (("retry-after", "1e400"),),
    (("retry-after", "Wed, 21 Oct 2099 07:28:00 GMT"),), (("retry-after", "Wed, 21 Oct 1999 07:28:00 GMT"),),
    (("retry-after", "Wed, 99 Oct 99999 07:28:00 GMT"),), (("retry-after-ms", "5"),), (("retry-after-ms", "x"),),
    (("x-should-retry", "true"), ("retry-after-ms", "5")), (("x-should-retry", "false"),), (("set-cookie", "a=b"),),
    (("retry-after", ""),), (("retry-after-ms", "9999999999"),), (("x-request-id", "é" * 300),),
)  # fmt: skip
TYPES = (
    "text/plain", None, "text/html", "application/octet-stream", "application/json; charset=latin-1", "nonsense",
    "text/event-stream", "application/json", "text/event-stream; charset=utf-16", "",
)  # fmt: skip
BODIES: Sequence[str | None] = (
    None, '{"error": {"message": "bad request", "type": "invalid_request_error", "param": null, "code": "x"}}',
    '{"detail": "not found"}', '{"error": "just text"}', "<html><body>502 Bad Gateway</body></html>", "", "null",
    "[]", '{"error": {"message"', "{}", '"text"', "7", "\udcff\udcfe", "[" * 3000,
    '{"object": "error", "message": "m"}',
)  # fmt: skip
STATUSES = (
    200, 201, 202, 203, 204, 206, 300, 304, 400, 401, 402, 403, 404, 405, 408, 409, 413, 415, 418, 422, 424, 429, 451,
    498, 500, 501, 502, 503, 504, 507, 520, 529, 599,
)  # fmt: skip

healthy = st.builds(
    Reply, answer=answers | calling, usage=usages, numbering=numberings, dialect=dialects, framing=framings,
    content_type=mostly("right", *TYPES, weight=2), headers=st.sampled_from(HEADERS),
    ignores_stream=mostly(False, True, weight=12), always_streams=mostly(False, True, weight=16),
    informational=mostly(None, 100, 103, weight=8),
)  # fmt: skip
plain = st.builds(Reply, answer=answers | calling)
in_one_respect = st.one_of(
    st.builds(Reply, answer=answers),
    st.builds(Reply, answer=calling, numbering=numberings),
    st.builds(Reply, answer=answers, usage=usages),
    st.builds(
        Reply, answer=answers | calling, dialect=dialects, framing=st.builds(Framing, cuts=mostly((), (1,), (7,)))
    ),
    st.builds(Reply, answer=answers | calling, framing=framings),
    st.builds(Reply, content_type=st.sampled_from(("right", *TYPES)), headers=st.sampled_from(HEADERS)),
)
failing = st.builds(
    Reply,
    status=st.sampled_from(STATUSES),
    body=st.sampled_from(BODIES),
    headers=st.sampled_from(HEADERS),
    content_type=mostly("right", *TYPES, weight=2),
    framing=st.builds(Framing, how=mostly("length", "chunked", "close", "long length", weight=3)),
    redirect=mostly("", "same", weight=12),
)
garbage = st.builds(Reply, body=st.sampled_from(BODIES[1:]), content_type=mostly("right", *TYPES), framing=framings)
redirecting = st.builds(
    Reply,
    status=st.sampled_from((307, 308, 301, 302, 303)),
    redirect=mostly("same", "relative", "port", "host", "nowhere", "missing", "scheme"),
    body=st.just("moved"),
    framing=st.builds(Framing, how=mostly("length", "close")),
)
FIELDS = ("stream_options", "stream", "tools", "tool_choice", "response_format", "parallel_tool_calls")
refusing = st.builds(
    Reply,
    answer=answers | calling,
    refuses=mostly(("stream_options",), *((name,) for name in FIELDS)),
    refusal_status=mostly(400, 422, 500),
)

scripts = st.one_of(
    in_one_respect.map(lambda reply: (reply,)),
    in_one_respect.map(lambda reply: (reply,)),
    healthy.map(lambda reply: (reply,)),
    failing.map(lambda reply: (reply,)),
    garbage.map(lambda reply: (reply,)),
    refusing.map(lambda reply: (reply,)),
    st.tuples(redirecting, in_one_respect | failing | redirecting),
    redirecting.map(lambda reply: (reply,)),
    st.tuples(failing | garbage | healthy, in_one_respect),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return a script and a call; a script of several replies mostly meets a call that is tried again."""
    script = draw(scripts)
    outer = draw(st.sampled_from(("invoke", "ainvoke", "stream", "astream")))
    inner = draw(mostly("invoke", "stream", "stop"))
    ask = draw(mostly("plain", "tools", "json_schema", "function_calling", "json_mode"))
    if ask in ("tools", "function_calling") and draw(st.booleans()):
        script = tuple(replace(reply, answer=draw(calling)) for reply in script)
    retries = draw(st.sampled_from((0, 1, 1, 2))) if len(script) > 1 else draw(mostly(0, 1, weight=6))
    return Case(script, outer, inner, ask, retries, draw(st.booleans()))
