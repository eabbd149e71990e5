"""``orla-lg`` with a defect: its core waits for nothing in the roster. The control that must fail."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from orla_lg.cli import main
from orla_lg.serve.link.recovery import Recovery
from orla_lg.serve.link.roster import Listed

begin = Recovery.begin


def begin_without_waiting(self: Recovery, roster: Mapping[str, Listed], now: float, lease_s: float) -> None:
    begin(self, {}, now, lease_s)


if __name__ == "__main__":
    setattr(Recovery, "begin", begin_without_waiting)  # noqa: B010 - a method is no attribute to mypy
    sys.exit(main())
