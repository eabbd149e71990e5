"""pyorla 1.0.8 as it is on PyPI, against a running server: each of its calls, and what of it no server can repair."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx
import pyorla
import pytest

from tests.serve.processes import ROOT


def test_its_version_is_the_one_that_was_read() -> None:
    import importlib.metadata

    assert importlib.metadata.version("pyorla") == "1.0.8"


def test_orla_runtime_starts_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith("ORLA_")]:
        monkeypatch.delenv(name)
    program = tmp_path / "orla"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m orla_lg "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("ORLA_BIN", str(program))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "adapters")]))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pyorla.orla_runtime() as client:
        client.health()
        with pytest.raises(pyorla.OrlaError, match="404"):
            client.execute(pyorla.ExecuteRequest(backend="light", prompt="hello"))
        url, ending_s = client.base_url, time.monotonic()
    assert time.monotonic() - ending_s < 10  # SIGTERM ends it, and no kill after 15 s
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/api/v1/health")
