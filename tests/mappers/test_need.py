from __future__ import annotations

import pytest

from orla_lg.core.engine.backend import Capability, Cost, Probe, Support
from orla_lg.errors import ConfigError, MappingError
from orla_lg.mappers.need import NeedMapper
from tests.core.fakes import a_call, a_view, decide

NO_TOOLS = {Capability.TOOLS: Support.UNSUPPORTED}
SMALL = a_view("small", cost=Cost(0.1, 0.1), quality=0.6, probe=Probe(capabilities=NO_TOOLS, context_tokens=8192))
LARGE = a_view("large", cost=Cost(1, 2), quality=0.95, probe=Probe(context_tokens=32768, vision=False), waiting=9)
MIDDLE = a_view("middle", cost=Cost(0.5, 0.5), quality=0.8, probe=Probe(context_tokens=16384))
VIEWS = [SMALL, LARGE, MIDDLE]


@pytest.mark.parametrize(
    ("needs", "prefer", "order"),
    [
        ((), "first", ("small", "large", "middle")),
        ((), "cheapest", ("small", "middle", "large")),
        ((), "best", ("large", "middle", "small")),
        ((), "least_loaded", ("small", "middle", "large")),
        (("tools",), "cheapest", ("middle", "large")),
        (("vision",), "best", ("middle", "small")),
        (("context>16k",), "cheapest", ("large",)),
        (("context >= 16k", "tools"), "best", ("large", "middle")),
        (("quality>=0.8", "output_cost<1"), "first", ("middle",)),
    ],
)
def test_the_preferred_of_those_that_can(needs: tuple[str, ...], prefer: str, order: tuple[str, ...]) -> None:
    chosen = decide(NeedMapper(needs, prefer), a_call(), VIEWS)
    assert (chosen.backend, *chosen.alternatives) == order
    assert {each.backend for each in chosen.considered} == {"small", "large", "middle"}


def test_what_was_missing_is_in_the_record_and_in_the_error() -> None:
    chosen = decide(NeedMapper(["tools"], "cheapest"), a_call(), VIEWS)
    verdicts = {each.backend: each.verdict for each in chosen.considered}
    assert verdicts == {"small": "lacks tools", "middle": "chosen", "large": "alternative"}
    with pytest.raises(MappingError, match="no backend meets its needs: 'small' lacks context>64k; 'large' lacks"):
        decide(NeedMapper(["context>64k"]), a_call(), VIEWS)


def test_an_engine_that_has_not_answered_is_believed_able_but_has_no_figures() -> None:
    unknown = a_view("unknown", probe=None)
    assert decide(NeedMapper(["tools"]), a_call(), [unknown]).backend == "unknown"
    with pytest.raises(MappingError, match="lacks context>1k"):
        decide(NeedMapper(["context>1k"]), a_call(), [unknown])


@pytest.mark.parametrize("need", ["context>", "context>lots", "quality=1"])
def test_a_comparison_needs_a_number(need: str) -> None:
    with pytest.raises(ConfigError, match="compare with a number, as in 'context>16k'"):
        NeedMapper([need])


@pytest.mark.parametrize("need", ["contxt>1k", "toolz", "tools>3"])
def test_a_need_nobody_knows(need: str) -> None:
    with pytest.raises(ConfigError, match=r"is unknown.*known: "):
        NeedMapper([need])
