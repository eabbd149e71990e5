"""``orla-lg serve --on ray`` where there is no Ray, or no way to use it; what it does on a cluster: test_on_ray."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from orla_lg import cli
from orla_lg.serve.ray.authentication import MODE, TOKEN


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["serve", *words]) == 1
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.mark.parametrize("on", ["ray=", "ray=ray://10.0.0.1:10001", "ray=10.0.0.1", "k8s", "ray=:6379"])
def test_an_address_is_rays_own(on: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", f"--on={on}"])
    assert "it must be ray, or ray=HOST:PORT" in capsys.readouterr().err


def test_without_ray_it_says_what_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "ray" else found(name, *more)
    )
    assert "pip install 'orla-lg[ray]'" in said(capsys, "--on", "ray")


def test_without_authentication_nothing_is_started(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setenv(MODE, "disabled")
    assert "RAY_AUTH_MODE is 'disabled'" in said(capsys, "--on", "ray=127.0.0.1:6379")


def test_a_ray_that_does_not_start_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init))
    monkeypatch.setenv(MODE, "token")
    monkeypatch.setenv(TOKEN, "0" * 64)
    assert "orla-lg: Ray does not start here: The current node timed out during startup.\n" in said(
        capsys, "--on", "ray"
    )


def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--on ray=HOST:PORT --stop" in said(capsys, "--stop")
    assert "--on ray=HOST:PORT --stop" in said(capsys, "--on", "ray", "--stop")
    assert "actors outlive it" in said(capsys, "--on", "ray=127.0.0.1:6379", "--demo")
