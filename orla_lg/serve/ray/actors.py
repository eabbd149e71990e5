"""The actors as Ray runs them. Their classes' names are what its dashboard shows."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

from orla_lg.serve.ray.hosted import Built, HostedServer, core, gateway
from orla_lg.serve.ray.shipping import ShippedSettings
from orla_lg.serve.running import LOG_FORMAT
from orla_lg.serve.settings import ServeSettings

CRASHED = 70


class OrlaCore:
    """Hosts a server: a core, or a standby until the core's end. Ray calls ask how it is; no model call is one.

    Args:
        shipped: What the server is started with.
    """

    def __init__(self, shipped: ShippedSettings) -> None:
        logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
        ray = importlib.import_module("ray")
        address = ray.util.get_node_ip_address()
        self._of_ray = {"fingerprint": shipped.fingerprint, "node_id": ray.get_runtime_context().get_node_id()}
        self._hosted = HostedServer(lambda: shipped.opened(address), self._build(shipped), _crashed)
        self._hosted.start()

    @staticmethod
    def _build(_shipped: ShippedSettings) -> Callable[[ServeSettings, contextlib.ExitStack], Built]:
        return core

    def status(self) -> dict[str, Any]:
        """Return how the server is (``hosted.HostedStatus``), where, and of which settings."""
        return {**self._hosted.status()._asdict(), **self._of_ray}

    def end(self, within_s: float) -> bool:
        """Have the server drain and end; returns whether it has ended *within_s*."""
        return self._hosted.end(within_s)


class OrlaGateway(OrlaCore):
    """Hosts a gateway, which holds no state: calls by HTTP, before the cores."""

    @staticmethod
    def _build(shipped: ShippedSettings) -> Callable[[ServeSettings, contextlib.ExitStack], Built]:
        return gateway(shipped.before)


def _crashed() -> None:
    """End the process: Ray begins it again elsewhere, or here."""
    with contextlib.suppress(OSError):
        logging.shutdown()
    os._exit(CRASHED)
