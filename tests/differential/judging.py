"""Whether a call went worse than the bare one did.

The same answer, or an error of the same kind, is right. Better is right too: an answer where bare failed, if it is
what the server meant. Where we differ by design, ``by_design`` says so; all else is worse.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

from orla_lg.wires.reading import MAX_COUNT
from tests.differential.runs import Answered, Failed, Outcome, Run
from tests.differential.script import Case, Reply

SLACK_S = 2.5
"""How much longer than bare a call may take, on a busy machine."""


def worse(
    case: Case,
    bare: Run,
    other: Run,
    *,
    assembles: bool,
    bare_of: Callable[[Case], Run],
) -> str | None:
    """Return in what way *other* is worse than *bare*; ``None`` if it is not.

    Args:
        case: What was called.
        bare: The graph as it is.
        other: The same call with us in between.
        assembles: Whether *other* streams from the engine where it is only invoked, as ``ChatOrla`` does, and a call
            whose tools may start early: it may have token counts where bare has none.
        bare_of: Runs another case bare: the streamed call, which ``ChatOrla`` may be measured by where streams go
            wrong, or the next reply, where bare does not try again.
    """
    found = _worse(case, bare.outcome, other.outcome, assembles)
    asked_again = assembles and not case.streams and other.requests > bare.requests and tried_again(case)
    if found and asked_again and isinstance(other.outcome, Answered) and _meant(case, other.outcome):
        found = None  # its stream was no answer, so it is the next reply that answers
    if found and assembles and not case.streams and not _must_assemble(bare.outcome, other.outcome):
        reference = bare_of(replace(case, inner="stream"))
        bare = Run(bare.outcome, max(bare.seconds, reference.seconds))
        found = _worse(case, reference.outcome, other.outcome, assembles, assembled=True) and found
        if found and _is_of_both(bare.outcome, reference.outcome, other.outcome):
            found = None
    if found and _has_met_the_next(case, bare, other):
        rest = replace(case, script=case.script[1:])
        found = worse(rest, bare_of(rest), other, assembles=assembles, bare_of=bare_of) and found
    if found is None and other.seconds > 3 * bare.seconds + SLACK_S:
        return f"took {other.seconds:.1f} s, bare {bare.seconds:.1f} s"
    return found


def _has_met_the_next(case: Case, bare: Run, other: Run) -> bool:
    """Whether bare failed over a first reply that is no answer, and *other* tried again and met what comes next."""
    return isinstance(bare.outcome, Failed) and len(case.script) > 1 and other.requests > bare.requests


def _must_assemble(bare: Outcome, other: Outcome) -> bool:
    """Whether the streamed answer is whole and only its tool calls are put together otherwise."""
    return (
        isinstance(bare, Answered)
        and isinstance(other, Answered)
        and bare.calls != other.calls
        and _same_but_calls(bare, other)
    )


def _is_of_both(bare: Outcome, reference: Outcome, other: Outcome) -> bool:
    """Whether an assembled answer is what the whole one says, and ended as the stream did."""
    return (
        isinstance(bare, Answered)
        and isinstance(reference, Answered)
        and isinstance(other, Answered)
        and (bare.said, bare.calls) == (other.said, other.calls)
        and other.finish == reference.finish
    )


def _same_but_calls(bare: Answered, other: Answered) -> bool:
    return (bare.said, bare.finish) == (other.said, other.finish)


def _worse(case: Case, bare: Outcome, other: Outcome, assembles: bool, *, assembled: bool = False) -> str | None:
    if isinstance(other, Answered):
        if isinstance(bare, Answered):
            return _difference(case, bare, other, assembles, assembled=assembled)
        return None if _meant(case, other) else f"an answer that nothing brought: {other}"
    if isinstance(bare, Answered):
        if by_design(case, other) or (_is_count_alone(case, bare) and not other.born):
            return None
        return f"fails where bare answers: {other}"
    if _is_the_sdks(case, bare, other):
        return None
    if other.born and other.name != bare.name:
        return f"a raw {other.name} from {other.born}: {other.message}"
    if other.kind == bare.kind or by_design(case, other):
        return None
    if bare.kind == "answer" and not other.born:
        return None  # bare failed over what it could not read, by whatever exception; a named one is no worse
    return f"fails as {other}, bare as {bare}"


def _is_the_sdks(case: Case, bare: Failed, other: Failed) -> bool:
    """Whether the SDK or LangChain says this of a body, which bare could not unpack."""
    packed = any(reply.framing.encoding != "identity" for reply in case.script)
    unread = bare.kind == "connection" or bare.name.endswith("UnicodeDecodeError")  # knows not how it is packed
    return packed and unread and (other.name.endswith("JSONDecodeError") or not other.born)


def _is_packed(case: Case) -> bool:
    """Whether a reply is packed for those alone that accept it."""
    return any(reply.framing.encoding != "identity" and not reply.framing.forced for reply in case.script)


def _difference(case: Case, bare: Answered, other: Answered, assembles: bool, *, assembled: bool) -> str | None:
    if case.retries and _is_packed(case) and _meant(case, other):
        return None  # bare could not unpack the first reply, and tried again; we did not ask to have it packed
    if bare.finish is None and other.finish and any(reply.framing.drop.endswith("within") for reply in case.script):
        return None  # cut after so many bytes, in which more of the answer was than bare got
    names = ["said", "calls", "finish", "usage", *(() if assembled else ("streamed",))]
    if (assembles and not _is_count(json.loads(bare.usage))) or counts_by_design(case, other):
        names.remove("usage")
    differ = [name for name in names if getattr(bare, name) != getattr(other, name)]
    if not differ:
        return None
    return "; ".join(f"{name} is {_short(other, name)}, bare {_short(bare, name)}" for name in differ)


def _is_count(usage: object) -> bool:
    """Whether a usage has counts, all of which can be: ChatOrla has some where bare has none, and no others."""
    if isinstance(usage, dict):
        return all(map(_is_count, usage.values()))
    return type(usage) is int and 0 <= usage <= MAX_COUNT


def _short(outcome: Answered, name: str) -> str:
    return str(getattr(outcome, name))[:400]


def _meant(case: Case, other: Answered) -> bool:
    """Whether an answer is one that the script gives, where bare got none."""
    if case.ask not in ("plain", "tools") or case.inner == "stop":
        return True
    if any(reply.framing.encoding != "identity" for reply in case.script):
        return True  # bare could not unpack it, and says nothing of what is in it
    replies = [reply.answer for reply in case.script if reply.body is None]
    said = {json.dumps([answer.content or "", None]) for answer in replies}
    if any(answer.choices in ("missing", "null", "empty") for answer in replies):
        said.add(json.dumps(["", None]))  # nothing, which a reader of its stream takes for an empty answer
    return other.said in said


# What differs by design


def by_design(case: Case, other: Failed) -> bool:
    """Whether an error stands for something that bare code does not do, or does not notice."""
    if _is_packed(case) and any(map(_is_short, case.script)) and other.name.endswith("JSONDecodeError"):
        return True  # packed, as bare asks for it, the end that is cut off may hold nothing; as it is, it is cut
    if other.born:
        return False
    if any(reply.redirect in ("host", "port", "nowhere", "scheme") for reply in case.script):
        return True  # a prompt goes to no other host than the backend's own, and that is not tried again
    if case.script[0].status in (400, 422) and len(case.script) > 1:
        return True  # asked again without the fields that are ours, and that met another reply
    if _is_packed(case):
        return True  # bare accepts encodings, and fails over a broken one; we ask for none and see what is in it
    if any(reply.dialect.error_at is not None and reply.dialect.end == "no blank line" for reply in case.script):
        return (
            True  # an error that ends a stream in the middle of its event: bare takes what came before for the answer
        )
    return other.kind in ("connection", "answer") and any(_may_be_cut(reply) for reply in case.script)


def tried_again(case: Case) -> bool:
    """Whether a stream that is assembled broke, or ended as a cut one does: we try again and meet the next reply."""
    first = case.script[0]
    broke = bool(first.framing.drop) or first.dialect.error_at == 0 or _may_be_cut(first)
    refused = first.dialect.error_at == 0 and _code(first.dialect.error) in (400, 422)  # our fields, it may be
    return len(case.script) > 1 and (refused or (case.retries > 0 and broke))


def _code(error: object) -> object:
    """Return the code that an error in a stream has."""
    inner = error.get("error") if isinstance(error, dict) else None
    return inner.get("code") if isinstance(inner, dict) else None


def counts_by_design(case: Case, other: Answered) -> bool:
    """Whether a stream lacks token counts in an event of their own, for which its caller did not ask.

    We ask for them, for the record; which engine would have sent them unasked cannot be seen from what it sends then.
    """
    unasked = case.streams and not case.stream_usage
    return unasked and other.usage == "null" and any(map(_counts_alone, case.script))


def _counts_alone(reply: Reply) -> bool:
    """Whether a stream brings token counts in an event without a choice, asked for or not."""
    return reply.usage.place == "always last" or reply.answer.choices == "empty"


def _is_count_alone(case: Case, bare: Answered) -> bool:
    """Whether bare takes a stream of nothing but token counts for an empty answer, and did not ask for counts.

    A parser of tool calls makes ``None`` of that.
    """
    empty = all(reply.answer.choices in ("no message", "null message", "empty") for reply in case.script)
    return empty and case.streams and not case.stream_usage and bare.said in ('["", null]', "None")


def _may_be_cut(reply: Reply) -> bool:
    """Whether an answer breaks off, or ends without a sign that it is whole: bare takes what came for the answer.

    A break and what is no answer at all may come together; then either may be named.
    """
    dialect, framing = reply.dialect, reply.framing
    signs = (
        dialect.end not in ("no done", "no finish, no done") and dialect.error_at is None,
        _finishes(reply) and "no finish" not in dialect.end and dialect.error_at is None,
    )
    cut = framing.how in ("long length", "no last chunk", "bad chunk")
    return not any(signs) or cut or _is_short(reply)


def _is_short(reply: Reply) -> bool:
    """Whether less comes than was meant."""
    return reply.framing.drop.endswith("within") or reply.framing.how == "short length"


def _finishes(reply: Reply) -> bool:
    """Whether a choice is sent that says why it ends."""
    return bool(reply.answer.finish) and reply.answer.choices in (
        "one",
        "two",
        "no index",
        "no message",
        "null message",
    )
