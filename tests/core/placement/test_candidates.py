"""How long first calls wait for backends that have not answered what they are, and for which."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from orla_lg.core import lifecycle
from orla_lg.core.call import Assignment, Call, Chunk, Hints, Usage
from orla_lg.core.engine.backend import Backend, Probe
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.mapping import Mapper
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.placement import candidates
from orla_lg.core.placement.view import BackendView
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Sleep, adrive, drive
from orla_lg.errors import BackendUnavailable, DeadlineExceeded, MappingError
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.need import NeedMapper
from orla_lg.mappers.one_bit import OneBitStageMapper
from orla_lg.mappers.table import ExplicitMapper, First, StageTable
from tests.core.fakes import Engine, Sender, is_quiet, new_call, step

PATIENCE_S, OTHERS_S = 0.4, 0.1
LONG_S, SOON_S = 60.0, 30.0
"""Where nothing is to be waited for, the patience is long, so that a machine that is busy does not matter."""

Run = Callable[[Any], Any]
BOTH = pytest.mark.parametrize("run", [drive, lambda steps: asyncio.run(adrive(steps))], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "PROBE_PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(candidates, "OTHERS_PATIENCE_S", OTHERS_S)


@pytest.fixture
def long_patience(monkeypatch: pytest.MonkeyPatch, _short_patience: None) -> None:
    monkeypatch.setattr(candidates, "PROBE_PATIENCE_S", LONG_S)


class Late(Engine):
    """Answers what it is after a while."""

    def __init__(self, after_s: float, *models: str) -> None:
        super().__init__(Probe(models))
        self.after_s, self.asked = after_s, 0

    async def probe(self) -> Probe:
        self.asked += 1
        await asyncio.sleep(self.after_s)
        return await super().probe()


class Judge(Late):
    async def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        yield Chunk("0", Usage(20, 5, 1), "stop")


MakeServing = Callable[..., Serving]


@pytest.fixture
def serve() -> Iterator[MakeServing]:
    made: list[Serving] = []

    def make(mapper: Mapper | None = None, **engines: Engine) -> Serving:
        adapters = {Backend(name, f"http://{name}/v1"): engine for name, engine in engines.items()}
        made.append(
            Serving(
                adapters, mapper=mapper, stage_policy="fcfs", request_policy="fcfs", memory=memory_policy("default")
            )
        )
        return made[-1]

    yield make
    for serving in made:
        serving.close()


def three_that_hang(**others: Engine) -> dict[str, Engine]:
    return {"one": Late(60, "m"), "two": Late(60, "m"), "three": Late(60, "m"), **others}


def timed(run: Run, serving: Serving, model: str = "auto", **said: Any) -> tuple[float, str | None]:
    """Return what a call took, and where it ran."""
    started = time.perf_counter()
    run(lifecycle.serve(new_call(serving, model, **said), Sender()))
    return time.perf_counter() - started, serving.records.records()[-1].backend


class Foretelling:
    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment:
        return Assignment("healthy")


WITH_ONE_NAMED: dict[str, Mapper] = {
    "by name": ExplicitMapper({"*": "healthy"}),
    "with alternatives": ExplicitMapper({"*": ["healthy", "one", "two"]}),
    "beside a stage that weighs all": StageTable({"node": "healthy", "other": NeedMapper(["tools"])}),
    "first": First({"other": "one"}, ExplicitMapper({"*": "healthy"})),
    "by load": LoadAware(ExplicitMapper({"*": ["healthy", "one"]})),
}


@pytest.mark.usefixtures("long_patience")
@BOTH
@pytest.mark.parametrize("mapper", WITH_ONE_NAMED.values(), ids=WITH_ONE_NAMED)
def test_a_call_waits_for_no_backend_that_its_mapping_does_not_choose(
    run: Run, mapper: Mapper, serve: MakeServing
) -> None:
    took_s, where = timed(run, serve(mapper, **three_that_hang(healthy=Late(0.01, "m"))))
    assert where == "healthy" and took_s < SOON_S


@pytest.mark.usefixtures("long_patience")
@BOTH
@pytest.mark.parametrize("model", ["healthy", "mine"])
def test_nor_if_the_code_names_the_backend_or_a_model_that_only_one_is_known_to_serve(
    run: Run, model: str, serve: MakeServing
) -> None:
    took_s, where = timed(run, serve(**three_that_hang(healthy=Late(0.01, "mine"))), model)
    assert where == "healthy" and took_s < SOON_S


@pytest.mark.usefixtures("long_patience")
def test_of_two_that_serve_a_model_the_first_is_taken_though_it_answers_a_little_later(
    serve: MakeServing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "OTHERS_PATIENCE_S", LONG_S)
    serving = serve(first=Late(0.05, "mine"), second=Late(0.0, "mine"))
    assert timed(drive, serving, "mine")[1] == "first"


@BOTH
@pytest.mark.parametrize(
    "mapper", [NeedMapper(["tools"]), First(NeedMapper(["tools"]), {"*": "healthy"}), Foretelling(), None]
)
def test_one_that_may_choose_any_waits_for_all_at_once_and_once(
    run: Run, mapper: Mapper | None, serve: MakeServing
) -> None:
    serving, ends = serve(mapper, **three_that_hang(healthy=Late(0.01, "m"))), list[float]()
    for _ in range(5):
        started = time.perf_counter()
        with contextlib.suppress(MappingError):
            run(lifecycle.serve(new_call(serving, "auto" if mapper else "nobody serves this"), Sender()))
        ends.append(time.perf_counter() - started)
    assert PATIENCE_S * 0.9 < ends[0] < 3 * PATIENCE_S + SOON_S
    assert min(ends[1:]) < 0.75 * PATIENCE_S, "what hangs is waited for once, not by every call"


def test_a_call_that_is_mapped_to_what_hangs_waits_for_it_within_its_deadline(
    serve: MakeServing, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = serve(ExplicitMapper({"*": "one"}), **three_that_hang())
    monkeypatch.setattr(candidates, "PROBE_PATIENCE_S", LONG_S)
    started = time.perf_counter()
    with pytest.raises(DeadlineExceeded):
        drive(lifecycle.serve(new_call(serving, said=Hints(deadline_s=0.05)), Sender()))
    assert time.perf_counter() - started < SOON_S
    monkeypatch.setattr(candidates, "PROBE_PATIENCE_S", PATIENCE_S)
    took_s, where = timed(drive, serving)
    assert where == "one" and took_s < SOON_S


@pytest.mark.usefixtures("long_patience")
def test_the_judges_own_call_waits_for_its_backend_only(serve: MakeServing) -> None:
    mapper = OneBitStageMapper("healthy", "healthy")
    took_s, where = timed(drive, serve(mapper, **three_that_hang(healthy=Judge(0.01, "m"))))
    assert where == "healthy" and took_s < SOON_S


def test_before_a_call_is_refused_for_what_an_engine_said_it_is_asked_again(serve: MakeServing) -> None:
    engine = Late(0.0, "bge-embed", "other")
    serving = serve(ExplicitMapper({"*": "b"}), b=engine)
    with pytest.raises(MappingError, match=r"serves several models \(bge-embed, other\) and not 'new:8b'"):
        timed(drive, serving, "new:8b")
    engine.says = Probe(("bge-embed", "new:8b"))  # pulled meanwhile
    serving.schedulers["b"].health._probed_s -= 2.0
    assert timed(drive, serving, "new:8b")[1] == "b"
    assert serving.records.records()[-1].model == "new:8b" and engine.asked == 2
    for _ in range(20):
        with pytest.raises(MappingError):
            timed(drive, serving, "gone")
    assert engine.asked == 2, "not at every refusal"


def test_a_choice_of_model_that_shows_only_at_the_queue_is_refused_there(serve: MakeServing) -> None:
    serving = serve(ExplicitMapper({"*": "b"}), b=Engine(BackendUnavailable("not yet")))
    serving.schedulers["b"].health.connect().result(5)
    steps = lifecycle.serve(new_call(serving, "gpt-4o"), Sender(AttemptFailed(RuntimeError("busy")), max_attempts=2))
    assert isinstance(step(steps), Sleep)
    serving.schedulers["b"].health._learn(Probe(("x", "y")))
    with pytest.raises(MappingError, match="stage 'node' on backend 'b': it serves several models"):
        step(steps)
    assert is_quiet(serving)
