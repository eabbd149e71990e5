from __future__ import annotations

import pytest

from orla_lg.core.boundary.stage_rules import StageRules
from orla_lg.core.call import Assignment
from orla_lg.core.engine.backend import Capability, Probe, Support
from orla_lg.core.mapping import assign, parts_of
from orla_lg.core.placement.candidates import SettledCandidates
from orla_lg.core.steps import drive
from orla_lg.errors import ConfigError, MappingError
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.need import NeedMapper
from orla_lg.mappers.one_bit import OneBitStageMapper
from orla_lg.mappers.table import ExplicitMapper, First, StageTable, faults_of, stage_mapper, tables_of
from tests.core.fakes import a_call, a_view, ask_nobody, decide

VIEWS = [a_view("light"), a_view("heavy")]


class To:
    def __init__(self, backend: str | None, **rest: object) -> None:
        self.backend, self.rest = backend, rest

    def map(self, call: object, backends: object) -> Assignment | None:
        return None if self.backend is None else Assignment(self.backend, **self.rest)


def test_a_table_of_names_answers_at_once_and_one_with_mappers_consults() -> None:
    assert isinstance(stage_mapper({"a": "light", "b": {"to": ["heavy"], "temperature": 0}}), ExplicitMapper)
    table = stage_mapper({"a": To("heavy"), "b": {"needs": "tools"}, "*": "light"})
    assert isinstance(table, StageTable)
    found = [decide(table, a_call(stage=stage), VIEWS).backend for stage in ("a", "b", "other")]
    assert found == ["heavy", "light", "light"]


def test_parameters_of_a_stage_go_with_whatever_was_chosen_and_the_mappers_own_win() -> None:
    table = StageTable({"a": {"needs": "tools", "temperature": 0.1, "seed": 7}})
    chosen = decide(table, a_call(stage="a"), VIEWS)
    assert (chosen.mapper, chosen.parameters) == ("need", {"temperature": 0.1, "seed": 7})
    rule = type(table.rules["a"])((), To("heavy", parameters={"temperature": 0.9}), {"temperature": 0.1})
    table.rules = StageRules({**table.rules, "a": rule})
    assert decide(table, a_call(stage="a"), VIEWS).parameters == {"temperature": 0.9}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (3, "expected a backend's name or a list of names, got 3"),
        ({"to": 3}, "expected a backend's name"),
        ({"temperature": 0.1}, "give either 'to'"),
        ({"to": "light", "needs": "tools"}, "give either 'to'"),
        ({"to": "light", "temprature": 0.1}, "unknown key 'temprature'; did you mean 'temperature'"),
        ({"to": "light", "temperature": "hot"}, "temperature must be a number from 0 to 2, got 'hot'"),
        ({"to": "light", "max_tokens": 0}, "max_tokens must be a number, 1 or more, got 0"),
        ({"to": "light", "top_p": True}, "top_p must be a number from 0 to 1, got True"),
        ({"needs": "toools"}, "need 'toools' is unknown; did you mean 'tools'"),
        ({"prefer": "best_of"}, "preference 'best_of' is unknown"),
    ],
)
def test_each_mistake_in_an_entry_is_told(entry: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"mapping of stage 'a': .*{message}"):
        stage_mapper({"a": entry})


def test_an_explicit_table_takes_no_mappers() -> None:
    with pytest.raises(ConfigError, match=r"stage 'a'.*use StageTable"):
        ExplicitMapper({"a": To("light")})


def test_the_first_answer_counts() -> None:
    assert decide(First(To(None), To("heavy"), To("light")), a_call(), VIEWS).backend == "heavy"
    assert decide(First(To(None)), a_call(), VIEWS) is None


def test_a_mapper_is_taken_apart_whole() -> None:
    bit, need = OneBitStageMapper("light", "haevy"), NeedMapper()
    table = StageTable({"a": bit, "b": "lihgt"})
    whole = First(LoadAware(table), need)
    assert next(iter(parts_of(whole))) is whole
    assert [part for part in parts_of(whole) if part in (bit, need, table)] == [table, bit, need]
    assert tables_of(whole) == [table] and list(parts_of(None)) == []
    faults = faults_of(whole, ["light", "heavy"])
    assert len(faults) == 2 and "did you mean 'light'" in faults[0] and "did you mean 'heavy'" in faults[1]


def test_what_a_mapper_holds_may_be_a_dict_and_must_be_one_or_a_mapper() -> None:
    table = {"node": "light"}
    for mapper in (First(table), LoadAware(table), First(LoadAware({"x": "heavy"}), table)):
        assert decide(mapper, a_call(stage="node"), [a_view("light")]).backend == "light"
    for wrong in ("light", None, 3):
        with pytest.raises(ConfigError):
            First(wrong)
    with pytest.raises(ConfigError, match=r"an instance is meant: LoadAware\(\.\.\.\)"):
        stage_mapper(LoadAware)


@pytest.mark.parametrize("answer", ["light", ("light",), 3])
def test_a_mapper_that_answers_something_else_is_named(answer: object) -> None:
    class Mine:
        def map(self, call: object, backends: object) -> object:
            return answer

    for mapper in (Mine(), First(Mine()), StageTable({"*": Mine()}), LoadAware(Mine())):
        with pytest.raises(MappingError, match=r"mapper Mine answered .*an Assignment, or None"):
            drive(ask_nobody().mapper(mapper, a_call(stage="node"), [a_view("light")]))


def test_alternatives_must_be_able_to_do_what_the_parameters_ask() -> None:
    schema = {"response_format": {"type": "json_schema"}}
    unable = a_view("unable", probe=Probe(capabilities={Capability.JSON_SCHEMA: Support.UNSUPPORTED}))
    call = a_call()
    mappers = (ExplicitMapper({"*": {"to": ["light", "unable", "heavy"], **schema}}),)
    assert drive(assign(call, mappers, SettledCandidates([*VIEWS, unable]), ask_nobody())).alternatives == ("heavy",)
