"""The example of a custom backend does what it says."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

from orla_lg.testing.conformance import Status
from orla_lg.testing.faults import FaultEngine

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_backend.py"


def test_its_adapter_conforms_on_its_stand_in() -> None:
    report = runpy.run_path(str(EXAMPLE))["main"]()
    report.raise_for_failures()
    passed = {result.name for result in report.results if result.status is Status.PASSED}
    assert {"flush_of_a_workflow_frees_it", "flush_of_a_workflow_is_not_widened", "cached_tokens_are_real"} <= passed


def test_its_exit_status_tells() -> None:
    with FaultEngine(slots=0) as no_pond:
        done = subprocess.run([sys.executable, str(EXAMPLE), no_pond.url], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "probe_answers  raised BackendUnavailable" in done.stdout


def test_it_is_a_page() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 75
