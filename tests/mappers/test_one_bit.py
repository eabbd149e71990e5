from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from orla_lg.core import lifecycle
from orla_lg.core.call import Ask, Assignment, Chunk, Hints, Usage
from orla_lg.core.engine.backend import Capability, Probe, Support
from orla_lg.core.lifecycle import arrive
from orla_lg.core.serving import Serving
from orla_lg.core.steps import WaitForTurn, adrive, drive
from orla_lg.errors import BackendUnavailable, EngineRefused, OrlaClosed
from orla_lg.mappers import one_bit
from orla_lg.mappers.one_bit import OneBitStageMapper, last_user_text, parse
from tests.core.fakes import Engine, Sender, a_serving, identity, is_quiet, step


class Judge(Engine):
    """An engine that is asked by us: it answers from a script, or by a rule."""

    def __init__(self, *script: Any, probe: Probe | None = None) -> None:
        super().__init__(probe or Probe(models=("m",)))
        self.script, self.bodies = list(script), list[Mapping[str, Any]]()
        self.gate: threading.Event | None = None

    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        self.bodies.append(body)
        while self.gate is not None and not self.gate.is_set():
            await asyncio.sleep(0.001)
        answer = self.script.pop(0) if self.script else "0"
        if isinstance(answer, Exception):
            raise answer
        yield Chunk(answer, Usage(20, 5, 1), "stop")


class To:
    def __init__(self, backend: str) -> None:
        self.backend = backend

    def map(self, call: Any, backends: Any) -> Any:
        return Assignment(self.backend)


NO_SCHEMA = Probe(models=("m",), capabilities={Capability.JSON_SCHEMA: Support.UNSUPPORTED})


@pytest.fixture
def serve() -> Any:
    made: list[Serving] = []

    def make(engine: Judge, **said: Any) -> tuple[Serving, OneBitStageMapper]:
        serving = a_serving("light", "heavy", engine=engine, probe=engine.says, clock=time.monotonic, **said)
        serving.mappings.shared = mapper = OneBitStageMapper("light", "heavy")
        made.append(serving)
        return serving, mapper

    yield make
    for serving in made:
        serving.close()


def ask(serving: Serving, text: str = "hello", stage: str = "node", **hints: Any) -> Any:
    body = Ask("auto", [{"role": "system", "content": "be kind"}, {"role": "user", "content": text}])
    call = arrive(serving.services, identity("w", stage), body, call_id=serving.new_id(), said=Hints(**hints))
    return lifecycle.serve(call, Sender())


Run = Callable[[Any], Any]
BOTH = pytest.mark.parametrize("run", [drive, lambda steps: asyncio.run(adrive(steps))], ids=["sync", "async"])


def by_stage(serving: Serving, stage: str = "node") -> list[Any]:
    return [record for record in serving.records.records() if record.stage == stage]


@BOTH
@pytest.mark.parametrize(("answer", "backend"), [("0", "light"), ("1", "heavy")])
def test_one_bit_chooses_the_backend(run: Run, answer: str, backend: str, serve: Any) -> None:
    engine = Judge(answer)
    serving, _ = serve(engine)
    run(ask(serving))
    (record,) = by_stage(serving)
    assert (record.backend, record.mapper) == (backend, "one_bit") and "judged" in record.reason
    (body,) = engine.bodies
    assert body["max_tokens"] == 1 and body["temperature"] == 0 and body["model"] == "m"
    assert body["response_format"]["json_schema"]["schema"] == {"type": "integer", "enum": [0, 1]}
    assert body["messages"][-1] == {"role": "user", "content": "hello"}, "the system prompt is not judged"
    assert is_quiet(serving)


@BOTH
def test_the_judges_own_call_is_queued_recorded_and_priced_like_any_other(run: Run, serve: Any) -> None:
    serving, _ = serve(Judge())
    run(ask(serving, priority=7))
    own, real = serving.records.records()
    assert (own.stage, own.backend, own.workflow, own.priority) == ("one_bit", "light", "w", 7)
    assert (own.prompt_tokens, own.cached_tokens, own.completion_tokens) == (20, 5, 1)
    assert real.stage == "node"
    assert serving.statistics().costs.stages["one_bit"].calls == 1


def test_an_engine_that_cannot_follow_a_schema_is_asked_for_a_word(serve: Any) -> None:
    engine = Judge("Complex.", probe=NO_SCHEMA)
    serving, _ = serve(engine)
    drive(ask(serving))
    assert "response_format" not in engine.bodies[0] and engine.bodies[0]["max_tokens"] > 1
    assert by_stage(serving)[0].backend == "heavy"


@pytest.mark.parametrize(
    ("answer", "simple"),
    [
        ("0", True), ("1", False), ("simple", True), ("Simple.", True), ("**Complex**", False),
        ("It is simple", True),
        ("<think>is it complex?</think> simple", True), ("<think>simple or", None), ("yes", None), ("", None),
        ("10", None), ("simplest", None),
        ("simple\n\nIt asks for a lookup.", True), ("Answer: complex", False), ("The request is simple.", True),
        ("\"0\"", True), ("The final answer is 1", False),
        ("not simple", None), ("It is not simple", None), ("This isn't simple.", None), ("simple? no", None),
        ("not complex", None), ("neither simple nor complex", None), ("simple or complex", None),
        ("simple, but needs several steps", None), ("simple\nActually complex", None), ("simple\nnot", None),
        ("simple\nIt isn’t easy", None), ("far from simple", None), ("anything but simple", None),
        ("seems simple", None), ("probably simple", None), ("complex; not simple", None), ("0 or 1", None),
        ("0.9", None), ("-0", None), ("simple complex", None), ("no", None), ("unsimple", None),
    ],
)  # fmt: skip
def test_a_verdict_is_a_word_and_nothing_that_takes_it_back(answer: str, simple: bool | None) -> None:
    assert parse(answer) is simple


@BOTH
@pytest.mark.parametrize(
    ("script", "why"),
    [
        (["perhaps"], "said neither ('perhaps')"),
        ([BackendUnavailable("gone")] * 3, "the judge failed (BackendUnavailable"),
        ([EngineRefused("no schema here", status=400)] * 3, "the judge failed (EngineRefused: no schema here"),
    ],
)
def test_a_judge_that_fails_makes_it_complex_and_is_asked_again(
    run: Run, script: list[Any], why: str, serve: Any
) -> None:
    engine = Judge(*script)
    serving, mapper = serve(engine)
    serving.services.retries = type(serving.services.retries)(base_s=0.0)
    run(ask(serving))
    (record,) = by_stage(serving)
    assert record.backend == "heavy" and why in record.reason
    assert not mapper._verdicts and not mapper._asking
    engine.script.clear()
    serving.schedulers["light"].health.answered()
    run(ask(serving))
    assert by_stage(serving)[-1].backend == "light"


@BOTH
def test_a_judge_that_cannot_is_asked_once_and_its_engine_is_well(run: Run, serve: Any) -> None:
    engine = Judge(*[EngineRefused("not implemented", status=501)] * 6)
    serving, _ = serve(engine)
    serving.services.retries = type(serving.services.retries)(base_s=0.0)
    for text in "abcdef":
        run(ask(serving, text))
    assert len(engine.bodies) == 6 and serving.schedulers["light"].health.breaker.failures == 0


def test_a_judge_that_hangs_costs_its_patience_and_no_more(serve: Any) -> None:
    engine = Judge()
    engine.gate = threading.Event()
    serving, mapper = serve(engine)
    mapper.timeout_s = 0.05
    drive(ask(serving))
    assert "no answer in 0.05 s" in by_stage(serving)[0].reason and len(engine.bodies) == 1


def test_a_verdict_is_kept_by_text(serve: Any) -> None:
    engine = Judge("0", "1")
    serving, _ = serve(engine)
    for text in ("a", "b", "a", "b"):
        drive(ask(serving, text))
    assert [record.backend for record in by_stage(serving)] == ["light", "heavy", "light", "heavy"]
    assert len(engine.bodies) == 2 and by_stage(serving)[-1].reason.endswith("before")


def test_only_the_newest_verdicts_are_kept(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_bit, "KEEP", 2)
    engine = Judge()
    serving, mapper = serve(engine)
    for text in ("a", "b", "a", "c", "a", "b"):
        drive(ask(serving, text))
    assert len(mapper._verdicts) == 2 and [b["messages"][1]["content"] for b in engine.bodies] == ["a", "b", "c", "b"]


def test_a_text_that_many_bring_at_once_is_judged_once(serve: Any) -> None:
    engine = Judge("0")
    engine.gate = threading.Event()
    serving, _ = serve(engine)

    async def many() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(adrive(ask(serving)))

    with ThreadPoolExecutor(12) as pool:
        running = [pool.submit(asyncio.run, many()) for _ in range(2)]
        running += [pool.submit(drive, ask(serving)) for _ in range(10)]
        time.sleep(0.1)
        engine.gate.set()
        for each in running:
            each.result(20)
    assert len(engine.bodies) == 1
    assert {record.backend for record in by_stage(serving)} == {"light"} and len(by_stage(serving)) == 30
    assert is_quiet(serving)


def test_when_the_one_who_asks_is_cancelled_another_asks(serve: Any) -> None:
    engine = Judge("0")
    engine.gate = threading.Event()
    serving, _ = serve(engine)

    async def first_goes() -> None:
        first = asyncio.create_task(adrive(ask(serving)))  # noqa: TID251
        while not engine.bodies:
            await asyncio.sleep(0.001)
        second, third = (asyncio.create_task(adrive(ask(serving))) for _ in range(2))  # noqa: TID251
        await asyncio.sleep(0.01)
        third.cancel()
        first.cancel()
        while len(engine.bodies) < 2:
            await asyncio.sleep(0.001)
        engine.gate.set()
        await second

    asyncio.run(asyncio.wait_for(first_goes(), 10))
    assert [record.backend for record in by_stage(serving) if record.error is None] == ["light"]
    assert is_quiet(serving)


def test_who_holds_a_grant_waits_for_nobodys_verdict(serve: Any) -> None:
    """The first to ask may wait for the very grant that the second one holds."""
    serving, _ = serve(Judge(), max_concurrency=1)
    first = arrive(serving.services, identity(), Ask("light", []), call_id="s", mappers=[To("light")])
    stream = lifecycle.serve(first,
                           Sender("stream"))  # fmt: skip

    def same_thread() -> None:
        inflight = drive(stream)
        first = ask(serving)
        assert isinstance(step(first), WaitForTurn), "waits for the grant on light, in another context"
        drive(ask(serving))
        inflight.finish()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(same_thread).result(10)
    assert by_stage(serving)[-1].backend == "light"


def test_a_deadline_bounds_the_wait_for_anothers_verdict(serve: Any) -> None:
    engine = Judge()
    engine.gate = threading.Event()
    serving, mapper = serve(engine)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(drive, ask(serving))
        while not engine.bodies:
            time.sleep(0.001)
        asked = Ask("auto", [{"role": "user", "content": "hello"}])
        call = arrive(serving.services, identity("v"), asked, call_id="x").call
        call.hints = Hints(deadline_s=0.02)
        steps = mapper._verdict(call, "hello", None, None)  # type: ignore[arg-type]
        assert drive(steps) == ("the judge did not answer in time", "")
        engine.gate.set()
        first.result(10)


def test_calls_without_a_question_go_where_they_went(serve: Any) -> None:
    engine = Judge()
    serving, _ = serve(engine)
    drive(ask(serving, stage=""))
    drive(ask(serving, text=""))
    assert {record.mapper for record in serving.records.records()} == {"code"} and not engine.bodies


def test_a_closed_orla_says_so(serve: Any) -> None:
    serving, _ = serve(Judge(OrlaClosed("closed")))
    with pytest.raises(OrlaClosed):
        drive(ask(serving))


def test_long_texts_are_shown_by_their_ends(serve: Any) -> None:
    engine = Judge()
    serving, _ = serve(engine)
    drive(ask(serving, "begin" + "x" * 99_999 + "end"))
    shown = engine.bodies[0]["messages"][1]["content"]
    assert len(shown) < 9_000 and shown.startswith("begin") and shown.endswith("end")


def test_the_last_text_of_a_user_is_found_in_any_shape() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image_url"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": "old"}, {"role": "user", "content": parts}, {"role": "assistant"}]
    assert last_user_text(messages) == "one\ntwo"
    assert last_user_text([]) == last_user_text([{"role": "user", "content": None}]) == ""
    assert last_user_text(["text"]) == ""


def test_names_are_checked() -> None:
    faults = OneBitStageMapper("light", "heavy", judge="jugde").check_backends(["light", "heavy", "judge"])
    assert len(faults) == 1 and "'jugde'" in faults[0] and "did you mean 'judge'" in faults[0]
