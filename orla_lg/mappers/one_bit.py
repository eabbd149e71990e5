"""One bit: a light model says whether a request is simple or complex, and that chooses the backend (Orla, 2.1).

The question costs one short call on the judge's backend, which is queued and recorded like any other, under the
stage ``one_bit``. The verdict on a text is kept, and a text that several calls bring at once is asked about once.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from orla_lg.arguments import answering
from orla_lg.core.call import Assignment, Call, Considered
from orla_lg.core.engine.backend import Capability
from orla_lg.core.inflight import grants_held
from orla_lg.core.mapping import MODEL_PATIENCE_S, Consultation, Planned, at_each_call
from orla_lg.core.placement.view import BackendView, find
from orla_lg.core.steps import Steps, Wait
from orla_lg.errors import OrlaClosed, OrlaError
from orla_lg.mappers.table import unknown_backends

STAGE = "one_bit"
"""The stage under which the judge's own calls are recorded."""

INSTRUCTION = (
    "You decide which of two language models answers a request. A request is simple if a small model can be trusted "
    "with it: a lookup, a short rewrite, a classification, small talk. It is complex if it needs several steps of "
    "reasoning, code, mathematics or care."
)
AS_NUMBER = " Answer with the single digit 0 for simple or 1 for complex."
AS_WORD = " Answer with the single word simple or complex."

KEEP = 10_000
"""Verdicts kept; the one not asked for longest goes."""

JUDGED_CHARS = 8_000
"""So much of a text is shown to the judge: its beginning and its end."""

_VERDICT = re.compile(
    r"(?:(?:(?:the |this |my )?(?:final )?(?:request|question|task|answer|verdict)|it|this|that)(?: is|:|'s)? )?"
    r"(?:(?P<simple>simple|0)|complex|1)"
)
"""A whole line that says nothing but the verdict."""
_OTHERWISE = re.compile(r"\b(?:simple|complex|not|no|but|however|although|though|unless|or|maybe|perhaps)\b|n['’]t\b")
"""A word behind the verdict that may take it back."""
_MARKS = " \t*_`\"'“”‘’#>()[]{}.!,;:"
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


@answering
class OneBitStageMapper:
    """Sends simple requests to one backend and complex ones to another.

    A judge that fails, or says neither in so many words, makes a request complex: that costs money and never quality.

    Args:
        simple: The backend for simple requests.
        complex_: The backend for complex requests; each is the other's alternative.
        judge: The backend whose model is asked; *simple* if it is not named.
        instruction: What the judge is asked; how to answer is added to it.
        timeout_s: Seconds that the judge may take once it is its turn.
    """

    def __init__(
        self,
        simple: str,
        complex_: str,
        judge: str | None = None,
        instruction: str = INSTRUCTION,
        *,
        timeout_s: float = MODEL_PATIENCE_S,
    ) -> None:
        self.simple, self.complex_, self.judge = simple, complex_, judge or simple
        self.instruction = instruction
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[bytes, bool] = OrderedDict()
        self._asking: dict[bytes, Future[bool | str]] = {}

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:  # noqa: D102
        text = last_user_text(call.ask.messages)
        if not call.identity.stage or not text:  # a call outside any graph goes where its code says
            return None
        verdict, how = yield from self._verdict(call, text, find(backends, self.judge), ask)
        if isinstance(verdict, str):
            return self._assignment(simple=False, reason=f"taken for complex: {verdict}")
        word = "simple" if verdict else "complex"
        return self._assignment(simple=verdict, reason=f"judged {word} by {self.judge!r}{how}")

    def foretell(self, stage: str) -> Planned:
        """Return between which backends it decides."""
        return at_each_call(self, stage, self.simple, self.complex_)

    def check_backends(self, known: Iterable[str]) -> list[str]:
        """Return a fault for every name that is no backend."""
        return unknown_backends("OneBitStageMapper", (self.simple, self.complex_, self.judge), known)

    def _verdict(self, call: Call, text: str, judge: BackendView | None, ask: Consultation) -> Steps:
        """Return whether *text* is simple, or a string that says why that is not known; and how it became known."""
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        while True:
            with self._lock:
                if (kept := self._verdicts.get(key)) is not None:
                    self._verdicts.move_to_end(key)
                    return kept, " before"
                asked = self._asking.get(key)
                if asked is None:
                    mine = self._asking[key] = Future[bool | str]()
                    mine.set_running_or_notify_cancel()  # one waiter's cancellation is not the others'
                    break
            if grants_held():  # the first to ask may wait for our grant: no call waits for it while holding one
                return (yield from self._judged(text, judge, ask)), ""
            try:
                yield Wait(asked, call.hints.deadline_s)
            except TimeoutError:
                return "the judge did not answer in time", ""
            if (answered := asked.result()) != "":
                return answered, " just now"
        verdict: bool | str = ""  # cancelled on the way: the next one asks
        try:
            verdict = yield from self._judged(text, judge, ask)
        finally:
            self._tell(key, verdict, mine)
        return verdict, ""

    def _tell(self, key: bytes, verdict: bool | str, waited_for: Future[bool | str]) -> None:
        with self._lock:
            del self._asking[key]
            if isinstance(verdict, bool):
                self._verdicts[key] = verdict
                if len(self._verdicts) > KEEP:
                    self._verdicts.popitem(last=False)
        waited_for.set_result(verdict)

    def _judged(self, text: str, judge: BackendView | None, ask: Consultation) -> Steps:
        body = self._body(text, constrained=_follows_schemas(judge))
        try:
            answer = yield from ask.model(self.judge, body, stage=STAGE, timeout_s=self.timeout_s)
        except OrlaClosed:
            raise
        except OrlaError as error:  # the call itself can still be served
            return f"the judge failed ({type(error).__name__}: {error})"[:300]
        simple = parse(answer)
        return f"the judge said neither ({answer[:40]!r})" if simple is None else simple

    def _body(self, text: str, *, constrained: bool) -> dict[str, Any]:
        instruction = self.instruction + (AS_NUMBER if constrained else AS_WORD)
        body: dict[str, Any] = {
            "messages": [{"role": "system", "content": instruction}, {"role": "user", "content": _shown(text)}],
            "temperature": 0,
            "max_tokens": 1 if constrained else 8,
        }
        if constrained:
            schema = {"name": "complexity", "strict": True, "schema": {"type": "integer", "enum": [0, 1]}}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _assignment(self, *, simple: bool, reason: str) -> Assignment:
        to, other = (self.simple, self.complex_) if simple else (self.complex_, self.simple)
        numbers = {"complex": float(not simple)}
        considered = (Considered(to, numbers, "chosen"), Considered(other, {}, "alternative"))
        return Assignment(to, None, "one_bit", reason, (other,), considered=considered)


def _follows_schemas(judge: BackendView | None) -> bool:
    """Whether the judge's engine can be held to a digit, by its probe; without one that is not relied on."""
    return judge is not None and judge.probe is not None and judge.probe.can(Capability.JSON_SCHEMA)


def parse(answer: str) -> bool | None:
    """Return whether *answer* says simple; ``None`` if that is not clear.

    Its first line is the verdict and nothing else, and what follows takes nothing back: a negation, a condition or
    the other word anywhere is no verdict.
    """
    first, _, rest = _THOUGHT.sub(" ", answer).strip().casefold().partition("\n")
    found = _VERDICT.fullmatch(" ".join(first.strip(_MARKS).replace("*", "").split()))
    return None if found is None or _OTHERWISE.search(rest) else found["simple"] is not None


def last_user_text(messages: Sequence[Any]) -> str:
    """Return the text of the last message that a user wrote; empty if there is none."""
    for message in reversed(messages):
        if isinstance(message, Mapping) and message.get("role") == "user":
            return _text(message.get("content"))
    return ""


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list | tuple) else ()
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _shown(text: str) -> str:
    half = JUDGED_CHARS // 2
    return text if len(text) <= JUDGED_CHARS else f"{text[:half]}\n[…]\n{text[-half:]}"
