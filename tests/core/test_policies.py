from __future__ import annotations

import pytest

from orla_lg.core.policies import Fcfs, policy
from orla_lg.errors import ConfigError


def test_a_name_or_an_object() -> None:
    mine = Fcfs()
    assert policy(mine) is mine and isinstance(policy("fcfs"), Fcfs)


@pytest.mark.parametrize(("wrong", "message"), [("prioriti", "did you mean 'priority'"), (object(), "needs key")])
def test_what_is_no_policy_is_refused(wrong: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy(wrong)
