"""The conformance suite: what every adapter promises, as named checks against an engine that runs.

::

    report = await conform(MyAdapter(backend))
    print(report)
    report.raise_for_failures()

or with pytest, a test for each::

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=str)
    async def test_conforms(check, subject):
        await check.verify(subject)

A check never depends on what a model says, only on what is counted, timed or shaped.
"""

from __future__ import annotations

from orla_lg.testing.conformance import caching, control, extras, faulty, fields, pressure, probing, streaming
from orla_lg.testing.conformance.report import NonConforming, NotApplicable, Report, Result, Status
from orla_lg.testing.conformance.subject import Subject
from orla_lg.testing.conformance.suite import Check, conform_to

__all__ = ["CHECKS", "Check", "NonConforming", "NotApplicable", "Report", "Result", "Status", "Subject", "conform"]

CHECKS: tuple[Check, ...] = (
    *probing.CHECKS,
    *fields.CHECKS,
    *streaming.CHECKS,
    *caching.CHECKS,
    *control.CHECKS,
    *pressure.CHECKS,
    *extras.CHECKS,
    *faulty.CHECKS,
)
"""All checks, in the order in which they make sense."""

conform = conform_to(CHECKS)
