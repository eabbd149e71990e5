"""Where the tests on a real cluster do not run."""

from __future__ import annotations

import os

import pytest

from tests.serve.ray.run import INSIDE


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get(INSIDE):
        return
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.skip("it needs a network namespace of its own: `make test-ray`"))
