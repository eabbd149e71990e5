from __future__ import annotations

from typing import Any

import pytest

from orla_lg.core import mapping
from orla_lg.core.background import Background
from orla_lg.core.call import Ask, Assignment, Call
from orla_lg.core.engine.backend import Capability, Cost, Probe, Support, model_asked
from orla_lg.core.mapping import Consultation, named_in_code
from orla_lg.core.placement.candidates import SettledCandidates
from orla_lg.core.placement.view import BackendView, unfit
from orla_lg.core.steps import drive
from orla_lg.errors import ConfigError, MappingError
from orla_lg.mappers.table import ExplicitMapper, stage_mapper
from tests.core.fakes import a_call


def view(name: str, *listed: str, alias: str = "", probed: bool = True, **probe: object) -> BackendView:
    said = Probe(models=listed, **probe) if probed else None
    names = (name, *((alias,) if alias else ()), *listed)
    return BackendView(name, names, said, Cost(), None, 0, 0, None)


Mapped = tuple[Call, tuple[Any, ...]]
"""A call, and the mappers that it is asked of."""


def call(stage: str = "sub|node", model: str = "auto", *mappers: Any, **ask: Any) -> Mapped:
    made = a_call(stage=stage)
    made.ask = Ask(model, ask.pop("messages", []), **ask)
    return made, mappers


def assign(made: Mapped, views: list[BackendView]) -> Assignment | None:
    return drive(mapping.assign(*made, SettledCandidates(views), Consultation(Background(), lambda *asked: iter(()))))


VIEWS = [view("light", "m1", "m2"), view("heavy", "big", alias="gpt"), view("spare", "m2", "big")]


@pytest.mark.parametrize(
    ("table", "stage", "backend"),
    [
        ({"sub|node": "heavy", "node": "light", "*": "spare"}, "sub|node", "heavy"),
        ({"node": "light", "*": "spare"}, "sub|node", "light"),
        ({"*": "spare"}, "sub|node", "spare"),
        ({"other": "spare"}, "sub|node", None),
        ({"*": "spare"}, "", None),
    ],
)
def test_a_stage_is_found_by_key_then_node_then_star(table: dict[str, str], stage: str, backend: str | None) -> None:
    found = ExplicitMapper(table).map(call(stage)[0], VIEWS)
    assert (found and found.backend) == backend


def test_a_list_names_alternatives_and_those_that_cannot_are_left_out() -> None:
    unable = view("unable", capabilities={Capability.TOOLS: Support.FLAG})
    mapper = ExplicitMapper({"*": ["light", "unable", "heavy"]})
    found = assign(call("s", "big", mapper, tools=True), [view("light", "m1"), VIEWS[1], unable])
    assert (found.backend, found.alternatives, found.reason) == ("light", ("heavy",), "mapping['*']")


@pytest.mark.parametrize("bad", [{"s": ()}, {"s": [1]}])
def test_a_table_is_checked(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="mapping of stage 's'"):
        ExplicitMapper(bad)


def test_names_in_a_table_are_checked() -> None:
    mapper = ExplicitMapper({"nod": "lihgt", "*": "heavy"})
    assert "did you mean 'light'" in mapper.check_backends(["light", "heavy"])[0]
    assert "did you mean 'node'" in mapper.check_stages(["sub|node"])[0]
    assert ExplicitMapper({"node": "light"}).check_stages(["sub|node"]) == []


def test_any_object_with_map_is_a_mapper() -> None:
    mapper = ExplicitMapper({"s": "light"})
    assert stage_mapper(mapper) is mapper and stage_mapper(None) is None
    assert stage_mapper({"s": "light"}).rules == mapper.rules
    with pytest.raises(ConfigError, match="no stage mapper"):
        stage_mapper(object())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("auto", ("light", None, ())),
        ("heavy", ("heavy", None, ())),
        ("m1", ("light", "m1", ())),
        ("m2", ("light", "m2", ("spare",))),
        ("gpt", ("heavy", None, ())),
    ],
)
def test_the_code_names_a_backend_or_exactly_the_model_it_means(model: str, expected: tuple[object, ...]) -> None:
    found = named_in_code(model, VIEWS)
    assert (found.backend, found.model, found.alternatives) == expected


def test_an_engine_that_has_not_answered_is_asked_for_its_own_model() -> None:
    found = named_in_code("m", [view("one", alias="m", probed=False), view("two", "m")])
    assert (found.backend, found.model, found.alternatives) == ("one", None, ())
    assert named_in_code("auto", []) is None and named_in_code("unknown", VIEWS) is None


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (Assignment("haevy"), "chose backend 'haevy', which does not exist; did you mean 'heavy'"),
        (Assignment("light", alternatives=("haevy",)), "names alternative 'haevy'.*did you mean 'heavy'"),
        (Assignment("light", model="m3"), r"model 'm3' is not served there.*Backends that can: heavy"),
    ],
)
def test_a_mapper_that_errs_is_told(chosen: Assignment, message: str) -> None:
    class Mine:
        def map(self, call: Call, backends: object) -> Assignment:
            return chosen

    with pytest.raises(MappingError, match=message):
        assign(call("s", "auto", Mine()), VIEWS)


def test_a_mapper_may_decline_and_the_next_answers() -> None:
    declines, answers = ExplicitMapper({"x": "heavy"}), ExplicitMapper({"s": "spare"})
    assert assign(call("s", "m2", declines, answers), VIEWS).backend == "spare"


def test_what_an_engine_cannot_do() -> None:
    said = {Capability.JSON_SCHEMA: Support.UNSUPPORTED, Capability.TOOLS: Support.PLUGIN}
    small = view("small", "m", capabilities=said, context_tokens=10)
    ask = Ask("m", [{"role": "user", "content": "x" * 132}], json_schema=True, tools=True)
    faults = " ".join(unfit(ask, small, "n"))
    for part in ("'n' is not served", "JSON schema", "call tools", "at least 11 tokens (132 characters)"):
        assert part in faults
    assert unfit(ask, view("unknown", probed=False), "n") == []


def test_a_picture_is_not_a_long_text() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, picture]}]
    assert unfit(Ask("m", messages), view("small", "m", context_tokens=100), None) == []


# The model asked for


@pytest.mark.parametrize(
    ("own", "served", "in_code", "asked"),
    [
        ("mine", ("a", "b"), "a", "mine"),
        (None, ("bge-embed", "qwen3:8b"), "qwen3:8b", "qwen3:8b"),
        (None, ("only",), "gpt-4o", "only"),
        (None, ("a", "b"), "gpt-4o", None),
        (None, ("a", "b"), "auto", None),
        (None, (), "gpt-4o", "gpt-4o"),
        ("", ("only",), "gpt-4o", "only"),
    ],
)
def test_the_model_is_the_backends_else_the_codes_else_the_only_one_and_never_a_guess(
    own: str | None, served: tuple[str, ...], in_code: str, asked: str | None
) -> None:
    assert model_asked(own, Probe(served), in_code) == asked
    assert model_asked(own, None, in_code) == (own or in_code), "an engine that has not answered"


def test_several_names_of_one_model_are_no_choice() -> None:
    assert model_asked(None, Probe(("m:latest", "m"), aliases={"m": "m:latest"}), "gpt-4o") == "m:latest"
    assert model_asked(None, Probe(("m:latest", "m"), aliases={"m": "m:latest"}), "m") == "m"


def test_where_several_are_left_the_error_names_stage_backend_and_models() -> None:
    several = view("ollama", "bge-embed", "qwen3:8b")
    with pytest.raises(MappingError, match=r"stage 's' on backend 'ollama': .*\(bge-embed, qwen3:8b\).*'gpt-4o'"):
        assign(call("s", "gpt-4o", ExplicitMapper({"*": "ollama"})), [several])
    with pytest.raises(MappingError, match="Backends that can: heavy"):
        assign(call("s", "auto"), [several, VIEWS[1]])
    stepping_in = assign(call("s", "gpt-4o", ExplicitMapper({"*": ["ollama", "heavy"]})), [several, VIEWS[1]])
    assert stepping_in.backend == "heavy" and "'ollama' cannot: it serves several models" in stepping_in.reason
    assert len(str(unfit(Ask("x", []), view("b", *map(str, range(10_000))), None))) < 400


# What a peer says of itself


@pytest.mark.parametrize("said", ["4096", 4096, 4096.0])
def test_a_number_is_a_number_however_it_is_written(said: Any) -> None:
    assert Probe(context_tokens=said).context_tokens == 4096
    long = Ask("m", [{"role": "user", "content": "x" * 100_000}])
    assert "its context holds 4096" in str(unfit(long, view("small", "m", context_tokens=said), None))


@pytest.mark.parametrize(
    "said", ["long", "", -1, 0, 1.5, float("nan"), float("inf"), True, [], {}, "9" * 5000, 10**400]
)
def test_what_cannot_be_a_figure_was_not_said(said: Any) -> None:
    figures = ("context_tokens", "kv_tokens", "request_tokens", "slots")
    probe = Probe(models=("m", said, "m"), vision=said if said is not True else 1, **dict.fromkeys(figures, said))
    assert [getattr(probe, figure) for figure in figures] == [None] * 4 and probe.vision is None
    assert unfit(Ask("m", [{"role": "user", "content": "x" * 100_000}]), BackendView(
        "b", ("b",), probe, Cost(), None, 0, 0, None), None) == []  # fmt: skip


def test_what_a_peer_says_sizes_nothing_without_a_bound() -> None:
    probe = Probe(models=tuple(map(str, range(100_000))), slots=10**9)
    assert (len(probe.models), probe.slots) == (10_000, None)
