"""The manifests of the example: they keep to Kubernetes' schemas and to each other; their configuration is one."""

from __future__ import annotations

import importlib.util
import os
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orla_lg import config
from orla_lg.cli import parser_for
from orla_lg.serve.ending import CUT_OFF_S
from orla_lg.serve.http.health import READY
from tests.redis_server import RedisServer
from tests.serve.store.test_redis import self_signed

kubernetes_validate = pytest.importorskip("kubernetes_validate")

ROOT = Path(__file__).parents[1]
FOLDER, PAGE, STORE = ROOT / "examples" / "kubernetes", ROOT / "docs" / "kubernetes.md", ROOT / "docs" / "store.md"

PATIENCE_S = 60.0

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
    for each in of_kind("StatefulSet"):
        assert each["spec"]["serviceName"] in {service["metadata"]["name"] for service in of_kind("Service")}


def test_the_configuration_is_one_and_its_time_to_drain_is_granted(tmp_path: Path) -> None:
    (said,) = of_kind("ConfigMap")
    file = tmp_path / "orla.toml"
    file.write_text(said["data"]["orla.toml"], encoding="utf-8")
    settings = config.load(file)
    assert not settings.faults() and settings.serve is not None
    for each in (pods_of("StatefulSet", "orla-core"), pods_of("Deployment", "orla-gateway")):
        (container,) = each["spec"]["template"]["spec"]["containers"]
        pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1]) if "lifecycle" in container else 0
        needed_s = pause_s + settings.serve.drain_s + CUT_OFF_S
        assert each["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed_s
        given = {one["name"] for one in container["env"]}
        assert (settings.serve.store_password_env in given) is (each["kind"] == "StatefulSet"), "who asks the store"
        assert container["ports"][0]["containerPort"] == 8081


def test_a_gateway_that_ends_has_left_its_service_before_it_refuses() -> None:
    (container,) = pods_of("Deployment", "orla-gateway")["spec"]["template"]["spec"]["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"][0] == "sleep"


def test_the_store_refuses_what_is_new_before_it_is_killed_for_its_memory() -> None:
    (container,) = pods_of("StatefulSet", "orla-redis")["spec"]["template"]["spec"]["containers"]
    most = args_of("StatefulSet", "orla-redis")
    assert most[most.index("--maxmemory") + 1] == "640mb" and container["resources"]["limits"]["memory"] == "1Gi"


def test_the_store_is_reached_by_what_has_its_password() -> None:
    (policy,) = (each for each in of_kind("NetworkPolicy") if each["metadata"]["name"] == "orla-redis")
    (only,) = policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchExpressions"]
    asking = [
        each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        for each in of_kind("StatefulSet", "Deployment", "Job")
        if "secretKeyRef" in str(each) and "ORLA_REDIS_PASSWORD" in str(each)
    ]
    assert only["operator"] == "In" and sorted(only["values"]) == sorted(asking)


def pods_of(kind: str, named: str) -> dict[str, Any]:
    return next(each for each in of_kind(kind) if each["metadata"]["name"] == named)


def args_of(kind: str, named: str) -> list[str]:
    found: list[str] = pods_of(kind, named)["spec"]["template"]["spec"]["containers"][0]["args"]
    return found


def test_no_pod_has_more_rights_than_it_needs() -> None:
    for each in of_kind("StatefulSet", "Deployment", "Job"):
        spec = each["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False and spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsGroup"] > 0
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] is True and rights["allowPrivilegeEscalation"] is False
            assert rights["capabilities"] == {"drop": ["ALL"]}
    assert not of_kind("Secret"), "they are named, and none is written here"


def test_a_secret_that_is_named_is_explained() -> None:
    page = PAGE.read_text(encoding="utf-8")
    named = {each["secretName"] for each in values("secret")} | {each["name"] for each in values("secretKeyRef")}
    assert named == {"orla-redis", "orla-redis-tls", "orla-tls", "orla-gateway-key"}
    assert all(f"`{each}`" in page for each in named)


def values(key: str, of: Any = MANIFESTS) -> Iterator[Any]:
    if isinstance(of, dict):
        if key in of:
            yield of[key]
        of = list(of.values())
    for each in of if isinstance(of, list) else ():
        yield from values(key, each)


def test_the_command_lines_are_ours() -> None:
    for kind, named in (("StatefulSet", "orla-core"), ("Deployment", "orla-gateway"), ("Job", "orla-first-key")):
        words = args_of(kind, named)
        assert words[0] == "orla-lg"
        if "--gateway" in words and importlib.util.find_spec("orla_lg.serve.stateless") is None:
            continue
        parser_for(words[1:]).parse_args(words[1:])


# What is run of it, without a cluster


class Cluster:
    """What the manifests start, as processes of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cores = folder, list[subprocess.Popen[str]]()
        self.certificate, self.key = self_signed(folder)
        line = next(
            each for each in STORE.read_text(encoding="utf-8").splitlines() if each.startswith("user orla on")
        )
        (folder / "users.acl").write_text(f"user default off\n{line.replace('PASSWORD', 'w0rd')}\n")
        there = {"/etc/redis/tls/tls.crt": self.certificate, "/etc/redis/tls/tls.key": self.key,
                 "/etc/redis/users/users.acl": folder / "users.acl"}  # fmt: skip
        options = args_of("StatefulSet", "orla-redis")
        options = options[options.index("--tls-cert-file") :]
        self.redis = RedisServer(folder / "redis", *(f"{there.get(each, each)}" for each in options), tls=True)
        self.trusts = ssl.create_default_context(cafile=f"{self.certificate}")
        self.env = {
            "PATH": os.environ["PATH"], "HOME": "/nonexistent", "ORLA_REDIS_PASSWORD": "w0rd",
            "PYTHONPATH": os.pathsep.join(each for each in sys.path if each), "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def configure(self) -> None:
        (said,) = of_kind("ConfigMap")
        text = said["data"]["orla.toml"]
        for before, after in (
            ("orla-redis:6379", f"127.0.0.1:{self.redis.port}"), ("/etc/orla/tls/tls.crt", self.certificate),
            ("/etc/orla/tls/tls.key", self.key), ("/etc/orla/tls/ca.crt", self.certificate),
            ('"0.0.0.0:8081"', '"127.0.0.1:0"'), ("http://vllm-light:8000", "http://127.0.0.1:9"),
            ("http://vllm-heavy:8000", "http://127.0.0.1:9"), ('"vllm"', '"openai"'),
        ):  # fmt: skip
            assert before in text
            text = text.replace(before, f"{after}")
        (self.folder / "orla.toml").write_text(text)

    def command(self, kind: str, named: str) -> list[str]:
        words = [f"{self.folder / 'orla.toml'}" if each == "/etc/orla/orla.toml" else each
                 for each in args_of(kind, named)[1:]]  # fmt: skip
        return [sys.executable, "-m", "orla_lg", *words]

    def start(self) -> str:
        core = subprocess.Popen(self.command("StatefulSet", "orla-core"), env=self.env, cwd=self.folder, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)  # fmt: skip
        self.cores.append(core)
        assert core.stdout is not None
        line = core.stdout.readline()
        assert " listens at https://" in line, line
        return line.split(" listens at ")[1].split(",")[0].strip()

    def status(self, url: str) -> int:
        try:
            with urllib.request.urlopen(url, timeout=5, context=self.trusts) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def becomes(self, url: str, status: int) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while self.status(url) != status:
            assert time.monotonic() < until_s, f"{url} does not become {status}"
            time.sleep(0.05)


def test_redis_the_first_key_and_the_cores_run_as_the_manifests_say(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    probes = pods_of("StatefulSet", "orla-core")["spec"]["template"]["spec"]["containers"][0]
    lives, is_ready = probes["livenessProbe"]["httpGet"]["path"], probes["readinessProbe"]["httpGet"]["path"]
    with cluster.redis:
        cluster.configure()
        made = subprocess.run(cluster.command("Job", "orla-first-key"), env=cluster.env, cwd=tmp_path, text=True,
                              capture_output=True, timeout=PATIENCE_S, check=False)  # fmt: skip
        assert made.returncode == 0 and made.stdout.startswith("orla-"), made.stderr
        try:
            core = cluster.start()
            cluster.becomes(f"{core}{READY}", 200)
            standby = cluster.start()
            assert [cluster.status(f"{standby}{path}") for path in (lives, is_ready, READY)] == [200, 200, 503]
            cluster.cores[0].terminate()
            cluster.becomes(f"{standby}{READY}", 200)
            assert cluster.cores[0].wait(PATIENCE_S) == 0
        finally:
            for each in cluster.cores:
                each.kill()
                each.wait()
