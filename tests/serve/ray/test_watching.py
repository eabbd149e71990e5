"""Actors asked how they are, and what is said of a change."""

from __future__ import annotations

from typing import Any

from orla_lg.serve.ray.watching import AWAY, ActorWatch


class FakeRay:
    """Answers questions as Ray does, once a test has put an answer there."""

    class exceptions:
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
    watched = ActorWatch(ray, {"orla-core-0": handle})
    assert [*watched.look(0), *watched.look(0)] == [] and handle.asked == 1
    up = {"state": "ready", "pool": "chat", "url": "http://127.0.0.1:1", "epoch": 3, "pid": 7, "newer": "?"}
    ray.answers[id(handle), 1] = up
    assert list(watched.look(0)) == ["orla-core-0"] and watched.urls(["orla-core-0"]) == "http://127.0.0.1:1"
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
