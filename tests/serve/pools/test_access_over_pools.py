"""Labels and policies over pools, and ``orla-lg check``: what one core heard of a thread holds at the others."""

from __future__ import annotations

import json

import pytest

from orla_lg import AccessDenied
from orla_lg.cli import main
from tests.serve.pools.served import HERE, Pools, replicas
from tests.stub_engine import StubEngine
from tests.test_access_policies import HI, PII, chain

TABLE = """
[mapping]
intake = "small-a"
answer = "big"
"*" = "small-b"

[[policies]]
name = "no pii on big"
subjects = ["backend:big"]
resources = ["data:pii"]
action = "deny"
"""


def test_a_label_that_a_thread_entered_in_one_pool_holds_in_another(pools: Pools, engine: StubEngine) -> None:
    pools.say(TABLE)
    pools.start()
    with replicas(pools, 2) as (one, other):
        answers = other.wrap(chain(engine, "answer", intake=PII))
        answers.invoke(HI, HERE)
        one.wrap(chain(engine, "intake", intake=PII)).invoke(HI, HERE)
        one.statistics()  # answered by the cores once they have heard what was sent before
        with pytest.raises(AccessDenied, match="'answer'") as found:
            answers.invoke(HI, HERE)
        assert found.value.rule == "no pii on big" and len(pools.engines["big"].chats) == 1
        answers.invoke(HI, {"configurable": {"thread_id": "other"}})


def test_and_in_a_pool_whose_core_was_not_there_then(pools: Pools, engine: StubEngine) -> None:
    pools.say(TABLE)
    pools.start()
    with replicas(pools) as (one,):
        pools.end("large")
        one.wrap(chain(engine, "intake", intake=PII)).invoke(HI, HERE)
        pools.start("large")
        pools.met(one)
        with pytest.raises(AccessDenied, match="'answer'"):
            one.wrap(chain(engine, "answer", intake=PII)).invoke(HI, HERE)


def test_check_says_which_pools_there_are_and_what_chooses_over_them(
    pools: Pools, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ORLA_SERVER", raising=False)
    pools.say('\n[mapping]\ndraft = ["small-a", "big"]\n', "load_aware = true")
    assert main(["check", "--config", str(pools.file)]) == 0
    out = capsys.readouterr().out
    assert "pools: fast: small-a, small-b; large: big; each has a core of its own" in out
    assert "the mapping chooses freely among backends of fast and large (LoadAware)" in out


def test_check_with_a_server_looks_for_the_cores_of_all_pools(
    pools: Pools, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools.start()
    monkeypatch.setenv("ORLA_SERVER", pools.running["fast"].url)
    assert main(["check"]) == 0
    assert "ok    pool 'large': epoch 1" in capsys.readouterr().out
    pools.end("large")
    assert main(["check", "--timeout", "0.5", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["server"]["pools"] == {"large": False}
