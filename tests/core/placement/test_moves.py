"""Workflows that are moved: where their calls go, what becomes of those that wait, and what of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.call import Ask, Usage
from orla_lg.core.engine.backend import Backend, Capability, Effect, Probe, Support
from orla_lg.core.engine.capabilities import Copied
from orla_lg.core.identity import Identity, workflow_key
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import arrive, serve
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.placement.moves import displace
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.record import Record
from orla_lg.core.serving import Serving
from orla_lg.core.steps import WaitForTurn
from orla_lg.core.workflow import Outcome
from orla_lg.errors import ConfigError
from orla_lg.mappers.table import stage_mapper
from tests.core.fakes import HandBackground, HandClock, Sender, WarmEngine, is_quiet, step

CAN = dict.fromkeys((Capability.WARM, Capability.CACHED_TOKENS), Support.NATIVE)
SHARED = Probe(models=("m",), capabilities=CAN, incarnation="first")
OTHER = Probe(models=("other",), capabilities=CAN, incarnation="first")
SLOTS = Probe(
    models=("m",), slots=2, weights="m.gguf",
    capabilities={**CAN, **dict.fromkeys((Capability.SAVE_RESTORE, Capability.FLUSH_WORKFLOW), Support.NATIVE)},
)  # fmt: skip
LONG = "word " * 2000


class Disk(WarmEngine):
    """An engine that saves its slots where others of its kind do."""

    def __init__(self, probe: Probe, files: dict[str, str], name: str) -> None:
        super().__init__(probe)
        self.files, self.name = files, name
        self.told: list[str] = []
        self.fails: set[str] = set()

    async def save(self, slot: int, name: str) -> Copied:
        self.told.append(f"save {slot}")
        if "save" in self.fails:
            return Copied(Effect.FAILED)
        self.files[name] = self.name
        return Copied(Effect.SAVED)

    async def restore(self, slot: int, name: str) -> Effect:
        self.told.append(f"restore of {self.files.get(name)}")
        return Effect.RESTORED if name in self.files else Effect.FAILED


class Speaker(Sender):
    """Sends a body, and is answered with what the test says of its tokens."""

    def __init__(self, body: Mapping[str, Any], usage: Usage, *script: Any) -> None:
        super().__init__(*script, max_attempts=3)
        self.body, self.usage = body, usage

    def send(self, inflight: InFlightCall) -> Any:
        inflight.sends(self.body)
        inflight.saw(self.usage)
        inflight.first_token()
        return super().send(inflight)


class Core:
    """A core with engines, a clock and a background in the test's hand."""

    def __init__(
        self, probes: Mapping[str, Probe], *, mapping: Any = None, memory: str = "default", folder: str = "",
        warm_up: bool = True, **limits: Any,
    ) -> None:  # fmt: skip
        self.clock = HandClock()
        self.background = HandBackground(self.clock)
        files: dict[str, str] = {}
        self.engines = {name: Disk(probe, files, name) for name, probe in probes.items()}
        adapters = {
            Backend(name, f"http://{name}/v1", engine="fake", slot_folder=folder, **limits): self.engines[name]
            for name in probes
        }
        background: Any = self.background
        self.serving = Serving(
            adapters, mapper=stage_mapper(mapping), memory=memory_policy(memory), clock=self.clock,
            background=background, warm_up=WarmUp() if warm_up else None, max_idle_threads=3,
        )  # fmt: skip
        for name, scheduler in self.serving.schedulers.items():
            scheduler.health._learn(probes[name])
            scheduler.health._probed_s = 1e9
        self.records: list[Record] = []

    def run(self, run: str, thread: str | None = "t", tenant: str | None = None) -> str:
        self.serving.progress.run_started(run, thread=thread, tenant=tenant)
        return run

    def begun(
        self,
        run: str | None,
        stage: str = "node",
        *,
        model: str = "auto",
        said: str = LONG,
        cached: int = 0,
        **ask: Any,
    ) -> Any:
        """Begin a call; returns its steps, and the first that takes time."""
        state = None if run is None else self.serving.book.run(run)
        workflow = "stray" if state is None else state.workflow
        messages = [{"role": "user", "content": said}]
        inflight = arrive(
            self.serving.services, Identity(workflow, run, stage, thread=True), Ask(model, messages, **ask),
            call_id=self.serving.new_id(),
        )  # fmt: skip
        body, usage = {"model": "m", "messages": messages}, Usage(2500, cached, 5)
        steps = serve(inflight, Speaker(body, usage, "stream"), self.records.append)
        return steps, inflight, step(steps)

    def call(self, run: str | None, stage: str = "node", **said: Any) -> Record:
        """Make a call, and let it end."""
        steps, inflight, waits = self.begun(run, stage, **said)
        while not isinstance(waits, tuple):
            self.pass_time()
            waits = step(steps)
        inflight.finish()
        self.pass_time()
        return self.records[-1]

    def again(self, steps: Any, waits: Any) -> Any:
        """Go on with a call whose turn was settled."""
        try:
            waits.turn.result()
        except Exception as error:  # it is the call's
            return step(steps, error)
        return step(steps)

    def pass_time(self, seconds: float = 0.0) -> None:
        """Let the background do what it has to."""
        for _ in range(4):
            self.background.advance(seconds / 4)
            self.background.do_all()

    def tokens(self, backend: str, workflow: str = "t") -> int:
        return self.serving.schedulers[backend].cache.tokens_of(workflow)

    def move(self, *args: Any) -> bool:
        return self.serving.steering.move(*args)

    def drain(self, backend: str) -> None:
        next(self.serving.steering.drain(backend, 0.0), None)


def two(**more: Any) -> Core:
    return Core({"a": SHARED, "b": SHARED}, **more)


# Where calls go


def test_the_next_call_of_a_moved_thread_goes_there_and_says_why() -> None:
    core = two(mapping={"*": "a"})
    run = core.run("r1")
    assert core.call(run).backend == "a"
    assert core.move("t", "b")
    record = core.call(run)
    assert (record.backend, record.mapper) == ("b", "explicit")
    assert record.reason.startswith("moved from 'a'; ")
    assert core.call(core.run("r2", "u")).backend == "a", "no other workflow is moved"
    core.serving.check_integrity()


@pytest.mark.parametrize("mapping", [{"*": "a"}, None], ids=["mapped", "named in code"])
def test_a_move_is_by_run_too_holds_over_runs_and_ends_with_its_thread(mapping: Any) -> None:
    core = two(mapping=mapping)
    run = core.run("r1")
    core.call(run)
    assert core.move("r1", "b")
    core.serving.progress.run_ended(run, Outcome.DONE)
    assert core.call(core.run("r2")).backend == "b"
    core.serving.progress.run_ended("r2", Outcome.DONE)
    assert core.move("t", None) and core.call(core.run("r3")).backend == "a"
    core.serving.progress.run_ended("r3", Outcome.DONE)
    core.move("t", "b")
    core.serving.progress.thread_deleted("t")
    assert not core.serving.moves
    core.serving.check_integrity()
    assert core.call(core.run("r4")).backend == "a"


def test_what_never_calls_again_leaves_nothing_behind() -> None:
    core = two(mapping={"*": "a"})
    for number in range(9):
        run = core.run(f"r{number}", f"t{number}")
        core.call(run)
        core.move(f"t{number}", "b")
        core.serving.progress.run_ended(run, Outcome.DONE)
        core.serving.check_integrity()
    assert len(core.serving.moves) == 3, "as many as idle threads are remembered"
    run = core.run("alone", None)
    core.call(run)
    core.move("alone", "b")
    core.serving.progress.run_ended(run, Outcome.DONE)
    for number in range(9):
        core.serving.progress.thread_deleted(f"t{number}")
    assert not core.serving.moves and core.serving.mappings.moving is None and core.serving.memory.follower is None


def test_tenants_have_their_own() -> None:
    core = two(mapping={"*": "a"})
    core.run("r1", "t", "red")
    core.run("r2", "t", "blue")
    assert not core.move("t", "b"), "the thread of no tenant is another one"
    assert core.move("t", "b", "red") and not core.move("r2", "b", "red")
    assert [core.call(run).backend for run in ("r1", "r2")] == ["b", "a"]
    assert core.serving.moves and workflow_key("t", "red") in core.serving.moves._to


def test_what_does_not_exist_is_said() -> None:
    core = two()
    with pytest.raises(ConfigError, match="unknown backend 'bb'; did you mean 'b'"):
        core.move("t", "bb")
    assert not core.move("t", "b") and not core.serving.moves
    assert not core.move("r1", None)


def test_a_stage_that_gets_another_model_is_not_touched() -> None:
    core = Core({"a": SHARED, "b": SHARED, "c": OTHER}, mapping={"ask": "a", "judge": "c"})
    run = core.run("r1")
    core.move("t", "b")
    assert [core.call(run, stage).backend for stage in ("ask", "judge")] == ["b", "c"]
    core.move("t", "c")
    assert [core.call(run, stage).backend for stage in ("ask", "judge")] == ["a", "c"], "none gets another model"


def test_any_backend_of_the_model_is_replaced() -> None:
    core = Core({"a": SHARED, "b": SHARED, "c": SHARED}, mapping={"one": "a", "two": "c"})
    run = core.run("r1")
    core.move("t", "b")
    assert [core.call(run, stage).backend for stage in ("one", "two")] == ["b", "b"]


def test_a_backend_that_cannot_take_the_call_does_not_get_it() -> None:
    unable = Probe(models=("m",), capabilities={**CAN, Capability.TOOLS: Support.UNSUPPORTED}, incarnation="first")
    core = Core({"a": SHARED, "b": unable}, mapping={"*": "a"})
    run = core.run("r1")
    core.move("t", "b")
    assert core.call(run).backend == "b"
    record = core.call(run, tools=True)
    assert record.backend == "a" and "cannot call tools" in record.reason


def test_of_several_models_the_one_is_asked_for_that_the_call_had() -> None:
    many = Probe(models=("x", "m"), capabilities=CAN, incarnation="first")
    core = Core({"a": SHARED, "b": many}, mapping={"*": "a"})
    run = core.run("r1")
    core.move("t", "b")
    record = core.call(run)
    assert (record.backend, record.model) == ("b", "m")


# Calls that wait, and that run


def test_calls_in_flight_end_where_they_are_and_waiting_ones_are_mapped_again() -> None:
    core = two(mapping={"*": "a"}, max_concurrency=1)
    run, other = core.run("r1"), core.run("r2", "u")
    _, flying, _ = core.begun(run)
    steps, waiting, waits = core.begun(run)
    others, third, _ = core.begun(other)
    assert isinstance(waits, WaitForTurn) and flying.backend == waiting.backend == "a"
    core.move("t", "b")
    assert waits.turn.settled
    (done,) = core.again(steps, waits)
    assert done is waiting and waiting.backend == "b" and waiting.attempts == 1 and waiting.tried == ["b"]
    assert flying.backend == "a" and third.backend == "a"
    waiting.finish()
    flying.finish()
    (done,) = step(others)
    third.finish()
    assert [record.backend for record in core.records] == ["b", "a", "a"]
    core.pass_time()
    assert is_quiet(core.serving)


def test_a_call_that_is_granted_at_this_moment_gives_its_grant_back() -> None:
    core = two(mapping={"*": "a"}, max_concurrency=1)
    run = core.run("r1")
    _, flying, _ = core.begun(run)
    steps, waiting, waits = core.begun(run)
    scheduler = core.serving.schedulers["a"]
    with scheduler.lock:  # a grant between the move's look at the queue and what it does
        (queued,) = list(scheduler.queue)
    flying.finish()
    assert queued.granted

    waits.turn._outcome = False  # it was not woken yet
    displace(scheduler, [queued])
    core.move("t", "b")
    assert core.again(steps, waits) == (waiting,) and waiting.backend == "b"
    waiting.finish()
    core.pass_time()
    assert is_quiet(core.serving)


# Drains


def test_a_drain_moves_all_workflows_and_those_that_wait() -> None:
    core = Core({"a": SHARED, "b": SHARED, "c": OTHER}, mapping={"*": "a", "judge": "c"}, max_concurrency=1)
    one, two_ = core.run("r1", "t"), core.run("r2", "u")
    core.call(one)
    _, flying, _ = core.begun(one)
    steps, waiting, waits = core.begun(two_)
    core.drain("a")
    (done,) = core.again(steps, waits)
    assert done is waiting and waiting.backend == "b" and "moved from 'a'" in waiting.assignment.reason
    waiting.finish()
    flying.finish()
    assert flying.backend == "a"
    core.pass_time()
    assert [core.call(run).backend for run in (one, two_)] == ["b", "b"]
    assert core.call(core.run("r3", "v")).backend == "b", "a new one too, while the drain lasts"
    assert core.call(one, "judge").backend == "c"
    core.serving.steering.resume("a")
    assert core.call(one).backend == "b", "its cache is there"
    assert core.call(core.run("r4", "w")).backend == "a"
    core.serving.progress.run_ended("r1", Outcome.DONE)
    assert core.call(core.run("r5", "t")).backend == "a", "a drain that is over moves no run that comes later"
    core.serving.check_integrity()


def test_without_another_backend_of_its_model_a_drained_one_keeps_its_calls() -> None:
    core = Core({"a": SHARED, "c": OTHER}, mapping={"*": "a"})
    run = core.run("r1")
    core.call(run)
    core.drain("a")
    steps, waiting, waits = core.begun(run)
    assert isinstance(waits, WaitForTurn) and not core.serving.moves
    core.serving.steering.resume("a")
    step(steps)
    waiting.finish()
    assert core.records[-1].backend == "a" and core.serving.mappings.moving is None


def test_a_paused_backend_keeps_its_calls() -> None:
    core = two(mapping={"*": "a"})
    run = core.run("r1")
    core.serving.steering.pause("a")
    _, waiting, waits = core.begun(run)
    assert isinstance(waits, WaitForTurn) and waiting.backend == "a"
    waiting.finish()


def test_those_that_are_drained_are_spread() -> None:
    core = Core({"a": SHARED, "b": SHARED, "c": SHARED}, mapping={"*": "a"}, max_concurrency=4)
    runs = [core.run(f"r{number}", f"t{number}") for number in range(4)]
    for run in runs:
        core.call(run)
    core.drain("a")
    assert sorted(core.call(run).backend or "" for run in runs) == ["b", "b", "c", "c"]


# The cache


def test_it_is_prefilled_ahead_and_released_where_it_was() -> None:
    core = two(mapping={"*": "a"})
    run = core.run("r1")
    core.call(run)
    assert core.tokens("a") > 2000
    core.move("t", "b")
    core.pass_time()
    (body,) = core.engines["b"].bodies
    assert body["messages"] == [{"role": "user", "content": LONG}] and body["model"] == "m"
    assert not core.engines["a"].bodies
    record = core.call(run, said=LONG)
    assert record.backend == "b" and (record.expected_cached_tokens or 0) > 900
    core.serving.check_integrity()


def test_a_prefill_is_given_up_for_the_call_itself() -> None:
    core = two(mapping={"*": "a"})
    run = core.run("r1")
    core.call(run)
    core.move("t", "b")
    core.background.advance(0.0)
    assert core.serving.schedulers["b"].prefetcher.running is not None
    record = core.call(run)
    assert record.backend == "b" and core.serving.schedulers["b"].prefetcher.running is None
    assert core.serving.schedulers["b"].statistics().warm_ups.given_up == 1


def test_while_a_call_runs_it_is_carried_with_the_last_one() -> None:
    core = two(mapping={"*": "a"})
    run = core.run("r1")
    core.call(run)
    _, flying, _ = core.begun(run, said=LONG + "and more")
    core.move("t", "b")
    core.pass_time()
    assert not core.engines["b"].bodies
    flying.finish()
    core.pass_time()
    (body,) = core.engines["b"].bodies
    assert body["messages"] == [{"role": "user", "content": LONG + "and more"}]
    core.serving.check_integrity()


def test_on_slots_of_one_folder_it_is_saved_and_restored() -> None:
    core = Core({"a": SLOTS, "b": SLOTS}, mapping={"*": "a"}, folder="/slots")
    run = core.run("r1")
    core.call(run)
    core.move("t", "b")
    core.pass_time()
    assert core.engines["a"].told == ["save 0"] and not core.engines["b"].bodies
    record = core.call(run, cached=2400)
    assert (record.backend, record.cache_action) == ("b", "restored")
    assert core.engines["b"].told == ["restore of a"] and (record.expected_cached_tokens or 0) > 2000
    pools = [core.serving.schedulers[name].cache.swaps.pool for name in "ab"]  # type: ignore[attr-defined]
    assert not pools[1]._borrowed and all(entry.still for entry in pools[0]._entries.values())
    core.serving.check_integrity()


@pytest.mark.parametrize("how", ["other folders", "it fails", "too little"])
def test_else_it_is_prefilled(how: str) -> None:
    core = Core({"a": SLOTS, "b": SLOTS}, mapping={"*": "a"}, folder="" if how == "other folders" else "/slots")
    run = core.run("r1")
    core.call(run)
    if how == "it fails":
        core.engines["a"].fails.add("save")
    if how == "too little":
        for name in "ab":
            core.serving.schedulers[name].cache.swaps.prices.save_s = 1e6  # type: ignore[attr-defined]
    core.move("t", "b")
    core.pass_time()
    assert len(core.engines["b"].bodies) == 1
    core.serving.check_integrity()


def test_a_waiting_call_is_mapped_again_once_the_file_is_written() -> None:
    core = Core({"a": SLOTS, "b": SLOTS}, mapping={"*": "a"}, folder="/slots")
    run = core.run("r1")
    core.call(run)
    core.serving.steering.pause("a")
    steps, waiting, waits = core.begun(run, cached=2400)
    core.move("t", "b")
    assert not waits.turn.settled
    core.pass_time()
    assert waits.turn.settled
    restoring = core.again(steps, waits)
    core.pass_time()
    assert not isinstance(restoring, tuple), "its slot is restored first"
    assert step(steps) == (waiting,)
    waiting.finish()
    assert core.records[-1].cache_action == "restored"
    core.serving.check_integrity()


def test_a_file_that_is_not_fetched_is_given_back() -> None:
    core = Core({"a": SLOTS, "b": SLOTS}, mapping={"*": "a"}, folder="/slots")
    run = core.run("r1")
    core.call(run)
    core.move("t", "b")
    core.pass_time()
    pool, borrowed = (core.serving.schedulers[name].cache.swaps.pool for name in "ab")  # type: ignore[attr-defined]
    (entry,) = pool._entries.values()
    assert entry.readers == 1 and borrowed._borrowed
    core.pass_time(2400.0)
    assert entry.readers == 0 and not borrowed._borrowed
    core.move("t", "a")
    core.move("t", "b")
    core.pass_time()
    core.serving.progress.run_ended(run, Outcome.DONE)
    core.serving.progress.thread_deleted("t")
    core.pass_time()
    assert not borrowed._borrowed and not pool._entries
    core.serving.check_integrity()


@pytest.mark.parametrize("memory", ["default", "flush_at_boundary", "flush_per_request", "release_only"])
def test_whatever_the_policy_does_with_what_is_left(memory: str) -> None:
    core = Core({"a": SLOTS, "b": SLOTS}, mapping={"*": "a"}, folder="/slots", memory=memory)
    run = core.run("r1")
    core.call(run)
    core.move("t", "b")
    core.pass_time()
    table = core.serving.schedulers["a"].cache.table  # type: ignore[attr-defined]
    if memory in ("default", "flush_at_boundary"):
        assert not any(slot.held for slot in table.slots if slot.owner == "t")
    core.call(run)
    core.serving.progress.run_ended(run, Outcome.DONE)
    core.serving.progress.thread_deleted("t")
    core.pass_time()
    core.serving.check_integrity()


class MovesMachine(RuleBasedStateMachine):
    """Moves, drains, calls and ends at any moment: nothing is lost, nothing goes twice, nothing is left behind."""

    @initialize(slots=st.booleans(), bound=st.none() | st.integers(1, 2))
    def start(self, slots: bool, bound: int | None) -> None:
        probe = SLOTS if slots else SHARED
        limits = {} if bound is None else {"max_concurrency": bound}
        self.core = Core(
            {"a": probe, "b": probe, "c": probe, "o": OTHER}, mapping={"*": "a", "two": "b", "judge": "o"},
            folder="/slots", **limits,
        )  # fmt: skip
        self.runs: dict[str, str] = {}
        self.open: list[tuple[Any, InFlightCall, Any]] = []
        self.began = self.ended = 0

    @rule(thread=st.sampled_from(["t", "u", "v", None]))
    def run(self, thread: str | None) -> None:
        run = f"r{len(self.runs)}"
        self.runs[run] = self.core.run(run, thread)

    def go(self, entry: tuple[Any, InFlightCall, Any]) -> None:
        """Carry a call on as far as it goes now."""
        steps, inflight, waits = entry
        while not isinstance(waits, tuple):
            if isinstance(waits, WaitForTurn) and not waits.turn.settled:
                break
            try:
                waits.turn.result() if isinstance(waits, WaitForTurn) else self.core.pass_time()
                waits = step(steps)
            except Exception as error:  # the turn's
                waits = step(steps, error)
        self.open.append((steps, inflight, waits))

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), stage=st.sampled_from(["one", "two", "judge"]))
    def call(self, data: st.DataObject, stage: str) -> None:
        run = data.draw(st.sampled_from(sorted(self.runs)))
        if self.core.serving.book.run(run) is not None and len(self.open) < 8:
            self.began += 1
            self.go(self.core.begun(run, stage))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        steps, inflight, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        inflight.finish()
        steps.close()
        self.ended += 1

    @rule(name=st.sampled_from(["t", "u", "v", "r0", "r1"]), to=st.sampled_from(["a", "b", "c", "o", None]))
    def move(self, name: str, to: str | None) -> None:
        self.core.move(name, to)

    @rule(backend=st.sampled_from("abc"))
    def drain(self, backend: str) -> None:
        self.core.drain(backend)

    @rule(backend=st.sampled_from("abc"))
    def resume(self, backend: str) -> None:
        self.core.serving.steering.resume(backend)

    @precondition(lambda self: self.runs)
    @rule(data=st.data(), outcome=st.sampled_from([Outcome.DONE, Outcome.INTERRUPTED]))
    def run_ends(self, data: st.DataObject, outcome: Outcome) -> None:
        self.core.serving.progress.run_ended(data.draw(st.sampled_from(sorted(self.runs))), outcome)

    @rule(thread=st.sampled_from("tuv"))
    def delete(self, thread: str) -> None:
        self.core.serving.progress.thread_deleted(thread)

    @rule(seconds=st.sampled_from([0.0, 1.0, 900.0]))
    def time_passes(self, seconds: float) -> None:
        self.core.pass_time(seconds)

    @invariant()
    def all_is_in_order(self) -> None:
        if not hasattr(self, "core"):
            return
        waiting, self.open = self.open, []
        for entry in waiting:
            self.go(entry)
        serving = self.core.serving
        serving.check_integrity()
        flying = sum(isinstance(waits, tuple) for _, _, waits in self.open)
        in_flight = sum(scheduler.queue.in_flight for scheduler in serving.schedulers.values())
        assert flying <= in_flight <= len(self.open), "a grant for each call, and no more"
        assert len(self.core.records) == self.ended, "a record for each call that ended, and one"

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for steps, inflight, _ in self.open:
            inflight.finish()
            steps.close()
        for run in self.runs:
            self.core.serving.progress.run_ended(run, Outcome.DONE)
        for thread in "tuv":
            self.core.serving.progress.thread_deleted(thread)
        for backend in "abc":
            self.core.serving.steering.resume(backend)
        self.core.pass_time(2400.0)
        self.core.pass_time()
        assert is_quiet(self.core.serving) and not self.core.serving.moves
        assert self.core.serving.mappings.moving is None


TestMoves = MovesMachine.TestCase
TestMoves.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
