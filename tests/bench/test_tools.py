"""``make bench-tools``: the law's arithmetic, its loads, the scripted engine against the law, and the exchange."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from bench.lib.engines import started
from bench.lib.figures import Rounds
from bench.tools import arms, law, real, results
from bench.tools.engine import Planned, common, deltas
from bench.tools.law import Pace, Request, Sizes, Times, Way
from bench.tools.proxy import plain
from tests.scripted_engine import MODEL
from tests.stub_engine import StubEngine

SMALL = Sizes(prompt=40, call=10, result=30, final=2)
PACE = Pace(10, 100)


def ftr_s(tools_s: tuple[float, ...], **way: bool) -> float:
    return law.law(Request(0, (tools_s,), SMALL), PACE, Way(**{"serial": False, **way})).ftr_s


# The law ----------------------------------------------------------------------------------------------------


def test_parallel_tools_cost_the_slowest_and_early_ones_what_the_answer_does_not_hide() -> None:
    """The prompt takes 0.4 s, the first call is whole at 1.3, the second at 2.3, a result's prefill takes 0.3."""
    assert ftr_s((4, 1)) == pytest.approx(2.3 + 4 + 0.6)
    assert ftr_s((4, 1), early=True) == pytest.approx(1.3 + 4 + 0.6)
    assert ftr_s((1, 1), early=True) == ftr_s((1, 1)), "of equal parallel tools the last is never hidden"


def test_serial_tools_cost_their_sum_and_early_ones_no_more_than_parallel() -> None:
    assert ftr_s((1, 2), serial=True) == pytest.approx(2.3 + 3 + 0.6)
    assert ftr_s((1, 2), serial=True, early=True) == ftr_s((1, 2), early=True) == pytest.approx(2.3 + 2 + 0.6)


def test_split_prompts_hide_the_prefill_of_results_that_wait_for_no_other_and_reorder_none() -> None:
    assert ftr_s((1, 4), split=True) == pytest.approx(2.3 + 4 + 0.3)
    assert ftr_s((4, 1), split=True) == ftr_s((4, 1)), "a slow first tool blocks all that follow"
    assert ftr_s((1, 1.1), split=True) == pytest.approx(2.3 + 1.1 + 0.5), "as much as there was time for"
    assert ftr_s((0.1, 3), early=True, split=True) == pytest.approx(2.3 + 3 + 0.3), "never before the answer is whole"


def test_no_way_is_slower_than_bare_on_what_is_drawn() -> None:
    for request in law.drawn(40, 3, law.lognormal()):
        for serial in (False, True):
            found = {arm: law.law(request, Pace(30, 4000), arms.way_of(arm, serial=serial)) for arm in arms.ARMS}
            assert found["wrapped"] == found["bare"] >= max(found["early"], found["split"])
            assert found["both"] <= min(found["early"], found["split"])


# The load ---------------------------------------------------------------------------------------------------


def test_requests_are_drawn_the_same_for_all_with_equal_shares_of_rounds() -> None:
    drawn = law.drawn(400, 1, law.lognormal())
    assert drawn == law.drawn(400, 1, law.lognormal()) != law.drawn(400, 2, law.lognormal())
    assert [len(each.rounds) for each in drawn[:5]] == [1, 2, 3, 4, 1]
    rounds = [tools_s for each in drawn for tools_s in each.rounds]
    assert 0.45 < sum(len(each) == 1 for each in rounds) / len(rounds) < 0.55
    assert 0.9 < median(tool_s for each in rounds for tool_s in each) < 1.1


def test_latencies_are_a_files_figures_or_a_lognormal_fitted_to_quantiles(tmp_path: Path) -> None:
    file, dice = tmp_path / "tools", Random(1)
    file.write_text("0.5\n2.5\n")
    assert {law.latencies(file)[0](dice) for _ in range(20)} == {0.5, 2.5}
    file.write_text(json.dumps({"0.5": 2.0, "0.8413447": 2 * math.e}))
    assert law.fitted({"0.5": 2.0, "0.8413447": 2 * math.e}) == pytest.approx((math.log(2), 1), abs=1e-6)
    assert law.latencies(file)[1].endswith("median 2 s, sigma 1")
    for wrong in ("", "many", "-1", '{"0.5": 1}', '{"2": 1, "3": 2}', "{"):
        file.write_text(wrong)
        with pytest.raises(SystemExit, match="expected one figure in seconds a line, or a JSON object"):
            law.latencies(file)


# The engine and the arms ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    with started("bench.tools.engine") as url:
        yield url


def test_a_planned_answer_is_the_same_streamed_or_not_and_as_langchain_writes_it() -> None:
    request = Request(3, ((1.0, 1.0),), SMALL)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": request.text}]}
    message = Planned(body).message()
    first, second = (call["function"]["arguments"] for call in message["tool_calls"])
    assert len(first) == 40 and json.dumps(json.loads(first)) == first
    assert {json.loads(text)["q"].split()[0] for text in (first, second)} == {*request.tools_s}
    pieces = [delta["tool_calls"][0] for delta in deltas(message)]
    assert [sum(each["index"] == n for each in pieces) for n in (0, 1)] == [10, 10]
    assert "".join(each["function"]["arguments"] for each in pieces) == first + second
    assert Planned(body | {"max_tokens": 1}).tokens == Planned(body | {"max_tokens": 0}).tokens == 1, "a prefill"
    after = {"messages": [*body["messages"], message]}
    assert Planned(after).is_final and float(deltas(Planned(after).message())[0]["content"]) > 0
    told = {"role": "assistant", "content": first + second}
    assert plain(after | {"tools": []}) == {"messages": [*body["messages"], told]}


def test_the_cache_finds_what_two_prompts_begin_with() -> None:
    assert [common("abcd", other) for other in ("", "x", "abxd", "abcd", "abcde")] == [0, 0, 2, 4, 4]


@pytest.mark.parametrize("serial", [False, True])
async def test_bare_runs_take_as_long_as_the_law_says(engine: str, serial: bool) -> None:
    requests = [Request(0, ((0.2, 0.05), (0.1,)), SMALL)]
    pace, ticks = Pace(100, 1000), list[int]()
    (run,) = await arms.measure(
        engine, pace, 1.0, requests, serial=serial, arms=["bare"], lanes=1, tick=lambda: ticks.append(1)
    )  # fmt: skip
    assert (run.arm, run.seed, len(ticks)) == ("bare", 0, 1)
    assert run.law.ftr_s <= run.found.ftr_s < run.law.ftr_s + 4 and run.found.end_s > run.found.ftr_s


def test_a_token_of_a_real_engine_is_exchanged_for_a_piece_of_the_plan() -> None:
    text = Request(0, ((1.0,),), SMALL).text
    body: dict[str, Any] = {"model": "stub-model", "messages": [{"role": "user", "content": text}], "tools": []}
    with StubEngine() as stub, started("bench.tools.proxy", stub.url.removesuffix("/v1")) as url:
        http = httpx.Client(base_url=url, trust_env=False)
        plain = http.post("/v1/chat/completions", json=body).json()["choices"][0]
        streamed = http.post("/v1/chat/completions", json=body | {"stream": True}).text
        probe = http.post("/v1/chat/completions", json=body | {"messages": [{"role": "user", "content": "hi"}]})
        assert http.get("/v1/models").json() == httpx.get(f"{stub.url}/models", trust_env=False).json()
        sent = [seen.body for seen in stub.requests if seen.body]
    assert plain["finish_reason"] == "tool_calls" and "tools" not in sent[0] and sent[0]["max_tokens"] == 10
    assert streamed.count("tool_calls") == 10 + 1 and streamed.endswith("data: [DONE]\n\n")
    assert probe.is_success and "tools" in sent[-1]


async def test_a_turn_under_load_shows_what_early_starts_hid(engine: str) -> None:
    """The scripted engine stands for a real one behind the proxy."""
    requests = [Request(n, ((0.3, 0.0), (0.0,)), SMALL) for n in range(3)]
    with started("bench.tools.proxy", f"{engine}/200/4000/load") as url:
        emptied: list[int] = []
        one: Any = SimpleNamespace(url=url, model=MODEL, empty_cache=lambda: emptied.append(1))
        bare, both = [
            await real.turn("vllm", one, url, arm, requests, 20.0, law.lognormal()) for arm in ("bare", "both")
        ]
    assert [len(each.times) for each in (bare, both)] == [3, 3] and len(emptied) == 2
    assert bare.hidden_s == 0.0 < both.hidden_s and bare.ftr_s > 0.3
    assert both.row(bare, "1.20")[0] == "both" and len(both.row(bare, "")) == 8


# The figures ------------------------------------------------------------------------------------------------


def runs(*arms_s: tuple[str, float]) -> Rounds[arms.Run]:
    """Each arm's request takes so long, and a tenth less by the law."""
    made = [
        arms.Run(arm, seed, Times(s * (seed + 1), s * 2), Times(0.9 * s * (seed + 1), s))
        for arm, s in arms_s
        for seed in (0, 1)
    ]
    return Rounds(made, [*arms.ARMS])


def test_gains_are_pairs_and_stand_beside_the_laws(tmp_path: Path) -> None:
    found = runs(("bare", 10.0), ("early", 8.0))
    assert results.less(found, "early", results.ftr_s) == pytest.approx([20, 20])
    assert results.of_medians(found, "early", results.law_ftr_s) == pytest.approx(20)
    assert "| **20.0** (20.0 … 20.0) | 20.0 | 20.0 | 20.0 |" in results.report({"here": found})[3]
    bare, early = results.verdict({"here": found})
    assert bare.endswith("+11.1% of its law: MISSED") and early.endswith("0.0 points below the law: met")
    results.draw({"here": found, "there": found}, tmp_path / "drawn.svg")
    assert "<svg" in (tmp_path / "drawn.svg").read_text(encoding="utf-8")


def test_load_at_equal_ftr_lies_between_the_steps() -> None:
    def turns(*ftrs_s: float) -> list[real.Turn]:
        return [real.Turn("early", rate, [Times(s, s)]) for rate, s in zip((1.0, 1.5, 2.0), ftrs_s, strict=False)]

    assert real.at_equal(turns(8, 9, 11), 10) == "1.75"
    assert real.at_equal(turns(8, 9, 9.5), 10) == "> 2.00"
    assert real.at_equal(turns(11), 10) == "< 1.00"


def test_an_engine_that_is_not_there_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: None)
    (line,) = asyncio.run(real.loaded("llamacpp", ["bare"], 1, 1.0, 1, law.lognormal()))
    assert line == "llamacpp is left out: no xllamacpp: pip install 'orla-lg[demo]'"
