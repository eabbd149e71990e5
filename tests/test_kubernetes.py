"""The manifests of the example: they keep to Kubernetes' schemas and to each other; their configuration is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from orla_lg import config
from orla_lg.serve.command import register

kubernetes_validate = pytest.importorskip("kubernetes_validate")

FOLDER = Path(__file__).parents[1] / "examples" / "kubernetes"
MANIFESTS: list[dict[str, Any]] = [
    each for file in sorted(FOLDER.glob("*.yaml")) for each in yaml.safe_load_all(file.read_text(encoding="utf-8"))
]


def name(manifest: dict[str, Any]) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


@pytest.mark.parametrize("manifest", MANIFESTS, ids=name)
def test_a_manifest_keeps_to_the_schema(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_check_finds_what_is_wrong() -> None:
    wrong = next(each for each in MANIFESTS if each["kind"] == "Deployment") | {"spec": {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def of_kind(*kinds: str) -> list[dict[str, Any]]:
    return [each for each in MANIFESTS if each["kind"] in kinds]


def test_services_and_budgets_select_pods_that_are_there() -> None:
    pods = [each["spec"]["template"]["metadata"]["labels"] for each in of_kind("StatefulSet", "Deployment")]
    for each in (*of_kind("Service"), *of_kind("PodDisruptionBudget")):
        wanted = each["spec"]["selector"]
        wanted = wanted.get("matchLabels", wanted)
        assert any(wanted.items() <= labels.items() for labels in pods), name(each)
    (cores,) = of_kind("StatefulSet")
    assert cores["spec"]["serviceName"] in {each["metadata"]["name"] for each in of_kind("Service")}


def test_the_configuration_is_one_and_its_time_to_drain_is_granted(tmp_path: Path) -> None:
    (said,) = of_kind("ConfigMap")
    file = tmp_path / "orla.toml"
    file.write_text(said["data"]["orla.toml"], encoding="utf-8")
    settings = config.load(file)
    assert not settings.faults() and settings.serve is not None
    for each in of_kind("StatefulSet", "Deployment"):
        assert each["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > settings.serve.drain_s
        (container,) = each["spec"]["template"]["spec"]["containers"]
        given = {one["name"] for one in container["env"]}
        assert settings.serve.store_password_env in given
        assert container["ports"][0]["containerPort"] == 8081


def test_the_command_lines_are_ours() -> None:
    import argparse

    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    for each in of_kind("StatefulSet", "Deployment"):
        words = each["spec"]["template"]["spec"]["containers"][0]["args"]
        assert words[0] == "orla-lg"
        parser.parse_args(words[1:])
