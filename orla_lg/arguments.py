"""Arguments that a public class or method does not have, or lacks: an answer with the name that is meant.

Python's own ``TypeError`` names the wrong argument, not the right one. ``answer_wrong_arguments`` lets a class answer
in the words of ``ConfigError``. A call that is right costs one Python call more, so it is for what a program makes
a few times, not for the values that flow through a model call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from orla_lg.errors import ArgumentError, did_you_mean, shown

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


F = TypeVar("F", bound=Callable[..., Any])

C = TypeVar("C", bound=type)

ELSEWHERE = "__orla_elsewhere__"


def belong_elsewhere(where: str, *names: str) -> Callable[[F], F]:
    """Have a function, if it gets arguments of these names, which it does not take, answer *where* they belong."""

    def marked(function: F) -> F:
        setattr(function, ELSEWHERE, dict.fromkeys(names, f", which belongs elsewhere: {where}"))
        return function

    return marked


def answering(cls: C) -> C:
    """Have a class answer wrong arguments of its constructor; stands above ``dataclass``, which makes that."""
    answer_wrong_arguments(cls)
    return cls


def answer_wrong_arguments(*classes: type, methods: bool = False) -> None:
    """Have classes answer wrong arguments of their constructors with ``ArgumentError``.

    Args:
        classes: Those that users make.
        methods: Public methods that take arguments answer too.
    """
    for cls in classes:
        maker = "__new__" if inspect.isfunction(getattr(cls.__new__, "__wrapped__", cls.__new__)) else "__init__"
        if inspect.isfunction(made := getattr(cls, maker)):
            answering = _answering(made, cls.__name__)
            setattr(cls, maker, staticmethod(answering) if maker == "__new__" else answering)
        for name, method in list(vars(cls).items()) if methods else ():
            if name.startswith("_") or not callable(getattr(method, "__func__", method)):
                continue
            _answer_method(cls, name, method)


def _answer_method(cls: type, name: str, method: Any) -> None:
    where = f"{cls.__name__}.{name}"
    if isinstance(method, classmethod):
        setattr(cls, name, classmethod(_answering(method.__func__, where)))
    elif inspect.isfunction(method) and len(inspect.signature(method).parameters) > 1:
        setattr(cls, name, _answering(method, where))


def _answering(function: Callable[..., Any], where: str) -> Callable[..., Any]:
    """Return *function* with an answer to wrong arguments; a ``TypeError`` from inside it stays what it is."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def awaited(*args: Any, **named: Any) -> Any:
            try:
                return await function(*args, **named)
            except TypeError:
                _raise_if_wrong(function, where, args, named)
                raise

        return awaited

    @functools.wraps(function)
    def answered(*args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except TypeError:
            _raise_if_wrong(function, where, args, named)
            raise

    return answered


def _raise_if_wrong(function: Callable[..., Any], where: str, args: Sequence[Any], named: Mapping[str, Any]) -> None:
    if (fault := fault_of(function, args, named)) is not None:
        raise ArgumentError(f"{where}: {fault}") from None


def fault_of(function: Callable[..., Any], args: Sequence[Any], named: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the arguments of a method, its object first among *args*; ``None`` if nothing is."""
    _, *parameters = inspect.signature(function).parameters.values()
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    known = [each.name for each in parameters if each.kind in NAMED]
    if unknown := [] if takes_any else [name for name in named if name not in known]:
        elsewhere: Mapping[str, str] = getattr(function, ELSEWHERE, {})
        told = (elsewhere.get(name) or did_you_mean(name, known) for name in unknown)
        return "; ".join(f"unknown argument {shown(name)}{more}" for name, more in zip(unknown, told, strict=True))
    places = [each.name for each in parameters if each.kind in POSITIONAL]
    given = list(args[1:])
    if len(given) > len(places) and not any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters):
        by_name = [name for name in known if name not in places]
        more = f"; give the others by name: {', '.join(f'{name}=…' for name in by_name)}" if by_name else ""
        return f"it takes {len(places)} by position ({', '.join(places) or 'none'}), {len(given)} were given{more}"
    if twice := [name for name in places[: len(given)] if name in named]:
        return f"{shown(twice[0])} is given twice, by position and by name"
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in REST]
    if missing := [name for name in needed if name not in named and name not in places[: len(given)]]:
        return f"{' and '.join(map(shown, missing))} must be given; it takes {', '.join(known)}"
    return None
