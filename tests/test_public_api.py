from __future__ import annotations

import inspect

import orla_lg


def test_names_are_sorted_distinct_and_there() -> None:
    assert orla_lg.__all__ == sorted(set(orla_lg.__all__))
    assert all(hasattr(orla_lg, name) for name in orla_lg.__all__)


def test_every_public_name_and_method_is_described() -> None:
    for name in orla_lg.__all__:
        thing = getattr(orla_lg, name)
        assert inspect.getdoc(thing), name
        own = [m for key, m in vars(thing).items() if not key.startswith("_") and inspect.isfunction(m)]
        for method in own:  # a Protocol's method is described there
            described = inspect.getdoc(method) or method.__name__ in ("map", "key", "decide")
            assert described or "orla_lg" not in method.__module__, (name, method)
