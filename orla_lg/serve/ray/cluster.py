"""A Ray cluster that this process is a driver of: joined at its address, or started here and ended again."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orla_lg.errors import ConfigError
from orla_lg.serve.ray.authentication import check_closed, switch_on
from orla_lg.serve.ray.planning import PREFIX, PlannedActor, RayNode

EXTRA = ("ray", "grpc")
INSTALL = "pip install 'orla-lg[ray]'"

AT_ONCE = 8
"""Calls of an actor at once: questions how it is, beside one that drains it."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster, until its block ends."""

    ray: Any
    """The package."""
    address: str
    """Ray's own, ``HOST:PORT``."""
    is_ours: bool
    """It was started here, and ends here."""
    dashboard: str
    """Its URL; empty where there is none."""
    token_file: str
    """Empty where the token is in the environment."""

    def nodes(self) -> list[RayNode]:
        """Return those that are alive."""
        return [
            RayNode(each["NodeID"], each["NodeManagerAddress"], each.get("Labels") or {}, each.get("Resources") or {})
            for each in self.ray.nodes()
            if each["Alive"]
        ]

    def actor(self, planned: PlannedActor, namespace: str) -> Any:
        """Return the handle of an actor, which is made where there is none."""
        from orla_lg.serve.ray.actors import OrlaCore, OrlaGateway

        first, *instead = map(dict, planned.labels)
        options = {"label_selector": first, "fallback_strategy": [{"label_selector": each} for each in instead]}
        made = self.ray.remote(OrlaGateway if planned.shipped.before else OrlaCore).options(
            name=planned.name, namespace=namespace, lifetime="detached", get_if_exists=True,
            max_restarts=-1, max_task_retries=0, max_concurrency=AT_ONCE,
            num_cpus=planned.num_cpus, resources=dict(planned.resources), **options,
        )  # fmt: skip
        return made.remote(planned.shipped)

    def found(self, namespace: str) -> dict[str, Any]:
        """Return the handles of all our actors in a namespace, by name."""
        handles = dict[str, Any]()
        for each in self.ray.util.list_named_actors(all_namespaces=True):
            if each["namespace"] == namespace and each["name"].startswith(PREFIX):
                with contextlib.suppress(ValueError):  # it has ended meanwhile
                    handles[each["name"]] = self.ray.get_actor(each["name"], namespace)
        return handles


@contextlib.contextmanager
def cluster_at(address: str) -> Iterator[Cluster]:
    """Join the cluster at an address, or start one where that is empty, until the block ends.

    Raises:
        ConfigError: Ray is not installed, has no authentication, or cannot be reached.
    """
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"orla-lg serve --on ray needs {', '.join(missing)}, which a plain install leaves out: {INSTALL}"
        )
    token_file = switch_on(may_make=not address)
    if address:
        check_closed(address)
    ray = importlib.import_module("ray")
    try:
        context = ray.init(
            address=address or "local", namespace=None, log_to_driver=False, logging_level=logging.ERROR,
            **({} if address else STARTED),
        )  # fmt: skip
    except Exception as error:
        raise ConfigError(_unreached(address, error)) from error
    try:
        yield Cluster(
            ray, address or ray.get_runtime_context().gcs_address, not address, _dashboard(context),
            "" if token_file is None else str(token_file),
        )  # fmt: skip
    finally:
        ray.shutdown()


STARTED: Mapping[str, Any] = {"include_dashboard": None}
"""Of a cluster that is started here: with its dashboard, where what that needs is installed."""


def _dashboard(context: Any) -> str:
    found = getattr(context, "dashboard_url", "") or ""
    return f"http://{found}" if found and "://" not in found else found


def _unreached(address: str, error: Exception) -> str:
    said = str(error).strip().partition("\n")[0][:300]
    if not address:
        return f"Ray does not start here: {said}"
    return (
        f"the Ray cluster at {address} cannot be joined: {said}. The command must run on one of its nodes "
        f"(`ray start --address={address}` makes this machine one), with the same versions of Python and Ray, and "
        "with its token"
    )
