"""``orla-lg serve --on ray`` where there is no Ray, or no way to use it; what it does on a cluster is in test_on_ray."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from orla_lg import cli
from orla_lg.serve.ray.authentication import MODE
from orla_lg.serve.ray.following import AWAY, Following


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


def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--on ray=HOST:PORT --stop" in said(capsys, "--stop")
    assert "--on ray=HOST:PORT --stop" in said(capsys, "--on", "ray", "--stop")
    assert "actors outlive it" in said(capsys, "--on", "ray=127.0.0.1:6379", "--demo")


class FakeRay:
    """Answers questions as Ray does, once a test has put an answer there."""

    class exceptions:  # noqa: N801 - Ray's name
        class RayError(Exception):
            pass

        class ActorUnavailableError(RayError):
            pass

    def __init__(self) -> None:
        self.answers: dict[Any, Any] = {}

    def wait(self, questions: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return [each for each in questions if each in self.answers], []

    def get(self, question: Any) -> Any:
        answer = self.answers[question]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Handle:
    """An actor's."""

    def __init__(self) -> None:
        self.status = self
        self.asked = 0

    def remote(self) -> tuple[Any, int]:
        self.asked += 1
        return id(self), self.asked


def test_actors_are_asked_one_question_at_a_time_and_changes_are_said() -> None:
    ray, handle = FakeRay(), Handle()
    watched = Following(ray, {"orla-core-0": handle})
    assert [*watched.look(0), *watched.look(0)] == [] and handle.asked == 1
    up = {"state": "ready", "pool": "chat", "url": "http://127.0.0.1:1", "epoch": 3, "pid": 7, "newer": "?"}
    ray.answers[id(handle), 1] = up
    assert list(watched.look(0)) == ["orla-core-0"] and watched.urls("chat") == "http://127.0.0.1:1"
    assert "epoch 3  pid 7" in watched.seen["orla-core-0"].text("orla-core-0")
    ray.answers[id(handle), 2] = up
    assert list(watched.look(0)) == []
    ray.answers[id(handle), 3] = FakeRay.exceptions.ActorUnavailableError("restarting")
    assert list(watched.look(0)) == ["orla-core-0"] and watched.seen["orla-core-0"].state == AWAY
    ray.answers[id(handle), 4] = FakeRay.exceptions.RayError(
        "Traceback …\nModuleNotFoundError: No module named 'x'\n"
    )
    assert list(watched.look(0)) == ["orla-core-0"]
    assert "No module named 'x'" in watched.seen["orla-core-0"].text("orla-core-0")
