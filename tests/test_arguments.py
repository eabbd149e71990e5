"""Wrong arguments of what a program makes and calls: each answer names the place, the fault and what is right."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from langchain_core.messages import AIMessage
from pydantic import ValidationError

import orla_lg
from orla_lg import Backend, ChatOrla, Cost, Hints, Limit, Limits, Orla, OrlaSaver, Workflow, mappers
from orla_lg.arguments import answer_wrong_arguments
from orla_lg.control.client import ControlClient
from orla_lg.core import policies
from orla_lg.core.policies import Fair, Priority
from orla_lg.engines import EngineOptions, OwnEngine
from orla_lg.errors import ArgumentError, ConfigError, OrlaError
from orla_lg.mappers import LearnedMapper
from tests.conftest import at
from tests.stub_engine import StubEngine

URL = "http://127.0.0.1:1/v1"
MakeOrla = Callable[..., Orla]


MADE_BY_CALLS = {
    "Ahead", "Ask", "Assignment", "BackendView", "CacheAction", "CacheEvent", "Call", "CallEvent", "Chunk",
    "Considered", "Costs", "Current", "Holding", "Learned", "Planned", "Queued", "Record", "Returns", "Spent",
    "StageOutlook", "StageResult", "Statistics", "Upstream", "Usage",
}  # fmt: skip
"""Values that model calls are made of, many for each: their constructors stay as they are."""


def made_by_users() -> list[type]:
    """Return the classes of the public API that a program makes, and gives options to."""
    named = [getattr(orla_lg, name) for name in orla_lg.__all__ if name not in MADE_BY_CALLS]
    named += [ControlClient, EngineOptions, OwnEngine, *(getattr(mappers, name) for name in mappers.__all__)]
    named += [made for made in vars(policies).values() if hasattr(made, "key")]
    return [
        each
        for each in dict.fromkeys(named)
        if isinstance(each, type) and "orla_lg" in each.__module__ and not getattr(each, "_is_protocol", False)
        and not issubclass(each, (BaseException, str, ChatOrla))
    ]  # fmt: skip


def makers() -> list[tuple[str, Callable[..., Any]]]:
    """Return all that answers: constructors, and the methods of what a program talks to all the time."""
    named: list[tuple[str, Callable[..., Any]]]
    named = [(each.__name__, each) for each in made_by_users() if inspect.isfunction(each.__init__)]
    for cls in (Orla, Workflow):
        for name, method in inspect.getmembers(cls, callable):
            bound = inspect.ismethod(method)
            if not name.startswith("_") and len(inspect.signature(method).parameters) > (0 if bound else 1):
                named.append((f"{cls.__name__}.{name}", method if bound else getattr(Unmade(cls), name)))
    return named


class Unmade:
    """Something with the methods of a class that needs a constructor to be made."""

    def __init__(self, cls: type) -> None:
        self._cls = cls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cls, name).__get__(object.__new__(self._cls))


ALL = makers()


@pytest.mark.parametrize(("name", "maker"), ALL, ids=[name for name, _ in ALL])
async def test_an_argument_that_is_not_there_is_answered_with_those_that_are(
    name: str, maker: Callable[..., Any]
) -> None:
    known = [
        each.name
        for each in inspect.signature(maker).parameters.values()
        if each.kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    nearly = f"{known[0][:-1]}{known[0][-1]}x" if known else "anything"
    with pytest.raises(ArgumentError) as raised:
        made = maker(**{nearly: 1})
        if inspect.isawaitable(made):
            await made
    message = str(raised.value)
    assert message.startswith(f"{name}: unknown argument {nearly!r}; ") and "known: " in message
    assert not known or f"did you mean {known[0]!r}?" in message
    assert isinstance(raised.value, OrlaError) and isinstance(raised.value, TypeError)
    assert raised.value.__suppress_context__, "the answer of Python itself is not shown beside it"


@pytest.mark.parametrize("code", [
    "from orla_lg.core.backend import Backend; Backend('a', 'http://127.0.0.1:1/v1', engin='vllm')",
    "from orla_lg.core.policies import Fair; Fair(weight={})",
    "from orla_lg.mappers.load import LoadAware; LoadAware(iner=None)",
])  # fmt: skip
def test_a_class_answers_also_where_it_is_imported_from_its_own_module_alone(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "unknown argument" in done.stderr and "did you mean" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Orla(), "Orla: 'backends' must be given; it takes backends, mapper, policy"),
        (lambda: Orla([Backend("a", URL)], {}, "edf"), r"takes 2 by position \(backends, mapper\), 3 were given"),
        (lambda: Orla([Backend("a", URL)], backends=[]), "'backends' is given twice"),
        (lambda: Orla([Backend("a", URL)], maper={}), "did you mean 'mapper'"),
        (lambda: Orla(URL, tools_safe=["search"]), "'tools_safe', which belongs elsewhere: .* `orla.wrap"),
        (lambda: Backend(URL), "Backend: 'url' must be given; it takes name, url, model"),
        (lambda: Backend("a", URL, engin="vllm"), "did you mean 'engine'"),
        (lambda: Cost(input=1), "Cost: unknown argument 'input'"),
        (lambda: Limit(call=3), "did you mean 'calls'"),
        (lambda: Limits(stage={}), "did you mean 'stages'"),
        (lambda: Hints(prio=3), "did you mean 'priority'"),
        (lambda: Fair(weight={}), "did you mean 'weights'"),
        (lambda: Priority(ageing=3), "did you mean 'ageing_s'"),
        (lambda: OrlaSaver(orla=None, iner=None), "did you mean 'inner'"),
        (lambda: LearnedMapper(model="x"), "did you mean 'model_file'"),
        (lambda: EngineOptions(slot=3), "did you mean 'slots'"),
        (lambda: replace(Limit(calls=1), cals=2), "did you mean 'calls'"),
        (lambda: Orla(URL, "light"), r"'light' is no stage mapper.*one backend for all stages is \{'\*': 'light'\}"),
        (lambda: Orla(URL, limits=Limit(calls=3)), r"a Limit is given.*Limits\(run=Limit\(calls=3"),
        (lambda: Orla(URL, memory="defualt"), "did you mean 'default'"),
        (lambda: Orla(URL, untranslatable="drop"), "untranslatable must be 'external' or 'error', got 'drop'"),
        (lambda: Orla(URL, untranslatable=True), "untranslatable must be 'external' or 'error', got True"),
        (lambda: Orla(URL, policy="prioriti"), "did you mean 'priority'"),
        (lambda: Orla(URL, policy={"*": "edf"}), "policy: one policy orders both levels.*stage_policy takes a table"),
        (lambda: Orla(URL, stage_policy={"hevy": "edf"}), "stage_policy: backend 'hevy' does not exist"),
    ],
)  # fmt: skip
def test_mistakes_that_are_made(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        wrong()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([URL], r"backends\[0\] is a URL without a name.*Backend\(\"light\", 'http"),
        (["light"], r"backends\[0\] must be a Backend\(...\), got 'light'; give Backend"),
        ([Backend("a", URL), ("b", URL)], r"backends\[1\] must be a Backend"),
        ([Backend("a", URL), Backend("a", URL)], "two backends share the name 'a'"),
        ({"light": {"url": URL}}, r"backends\['light'\] must be a URL.*Backend\('light', \"http"),
        ({"light": Backend("heavy", URL)}, "the Backend of another name, 'heavy'"),
        ({"light": "localhost"}, "backend 'light': url 'localhost'"),
        ({3: URL}, r"backends\[3\] must be a URL"),
        ("orla.toml", r"Orla.from_config\('orla.toml'\) reads it"),
        ("light", "'light' is no URL; give Backend"),
        ([], "needs at least one Backend"),
        ({}, "needs at least one Backend"),
        (None, "must be a list of Backend"),
        (b"x", "must be a list of Backend"),
    ],
)
def test_what_is_no_backend_is_answered_with_the_right_form(given: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        Orla(given)


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda url: {"light": url, "heavy": url}, ["light", "heavy"]),
        (lambda url: {"light": Backend("light", url, engine="llamacpp")}, ["light"]),
        (lambda url: url, ["default"]),
        (lambda url: Backend("mine", url), ["mine"]),
        (lambda url: (Backend("mine", url),), ["mine"]),
    ],
)
def test_urls_by_name_and_one_alone_are_backends(
    engine: StubEngine, form: Callable[[str], Any], names: list[str]
) -> None:
    with Orla(form(engine.url), {"*": names[0]}) as orla:
        assert list(orla.statistics().backends) == names
        assert ChatOrla(orla=orla, model=names[0]).invoke("Hello!").text


# ChatOrla, whose arguments are also the request's


async def every_way(model: ChatOrla, **arguments: Any) -> list[BaseException]:
    raised: list[BaseException] = []
    for ask in (
        lambda: model.invoke("x", **arguments),
        lambda: list(model.stream("x", **arguments)),
        lambda: model.bind(**arguments).invoke("x"),
    ):
        with pytest.raises(ArgumentError) as error:
            ask()
        raised.append(error.value)
    with pytest.raises(ArgumentError) as error:
        await model.ainvoke("x", **arguments)
    raised.append(error.value)
    with pytest.raises(ArgumentError) as error:
        [chunk async for chunk in model.astream("x", **arguments)]
    return [*raised, error.value]


async def test_an_argument_that_no_request_has_is_answered(engine: StubEngine, make_orla: MakeOrla) -> None:
    model = ChatOrla(orla=make_orla(at(engine)), model="main")
    for arguments, near in (
        ({"prio": 3}, "priority"),
        ({"temprature": 1}, "temperature"),
        ({"tenants": "a"}, "tenant"),
    ):
        for error in await every_way(model, **arguments):
            assert f"did you mean {near!r}?" in str(error) and "extra_body" in str(error)
    assert not engine.chats, "nothing was sent"
    assert isinstance(model.invoke("x", priority=3, temperature=0.5), AIMessage)


def test_a_hint_of_the_constructor_is_answered(engine: StubEngine, make_orla: MakeOrla) -> None:
    with pytest.raises(ValidationError, match=r"priority is a hint of a call.*bind\(priority=3\)"):
        ChatOrla(orla=make_orla(at(engine)), model="main", priority=3)


class Broken:
    """A constructor whose own code fails, and one method of each kind."""

    def __init__(self, size: int = 1) -> None:
        self.size = size + cast("int", "1")

    async def later(self, size: int) -> int:
        return size + cast("int", "1")


async def test_a_type_error_from_inside_stays_what_it_is() -> None:
    answer_wrong_arguments(Broken, methods=True)
    with pytest.raises(TypeError, match="unsupported operand") as raised:
        Broken(3)
    assert not isinstance(raised.value, ArgumentError)
    with pytest.raises(TypeError, match="unsupported operand"):
        await object.__new__(Broken).later(3)
    with pytest.raises(ArgumentError, match=r"Broken.later: unknown argument 'sise'; did you mean 'size'"):
        await object.__new__(Broken).later(sise=3)  # type: ignore[call-arg]


def test_what_answers_is_made_copied_and_described_as_before() -> None:
    limit = pickle.loads(pickle.dumps(Limit(calls=3)))
    assert limit == Limit(calls=3) and replace(limit, calls=4).calls == 4
    assert list(inspect.signature(Limit).parameters) == ["calls", "tokens", "cost_usd", "wall_s", "per_s"]
    assert not hasattr(Hints.over, "__wrapped__"), "it is on the way of each call"
    assert inspect.iscoroutinefunction(Orla.adrain) and not inspect.iscoroutinefunction(Orla.drain)
