"""Seeing a core from outside: Prometheus's metrics, and a span of OpenTelemetry's for each call.

Both are followers of records, and read statistics when they are asked: no call waits for either. What they need
(``prometheus_client``, ``opentelemetry``) is imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from orla_lg.errors import ConfigError
from orla_lg.orla import Orla

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from prometheus_client import CollectorRegistry

    from orla_lg.observe.prometheus import CoreMetrics
    from orla_lg.observe.spans import CallSpans

__all__ = ["metrics", "traces"]


def metrics(orla: Orla, registry: CollectorRegistry | None = None) -> CoreMetrics:
    """Put an ``Orla``'s metrics (docs/metrics.md) into a registry of ``prometheus_client``.

    Args:
        orla: Counted from now on.
        registry: ``None``: the one that ``prometheus_client.start_http_server`` serves.

    Returns what ends it (``close()``), and counts what the core does not know of (``counts``).

    Raises:
        ConfigError: ``prometheus_client`` is missing, or the registry has another ``Orla``'s metrics.
    """
    try:
        from orla_lg.observe.prometheus import CoreMetrics
    except ModuleNotFoundError as error:
        raise ConfigError(f"metrics need {error.name}: pip install 'orla-lg[serve]', or prometheus-client") from error
    return CoreMetrics(orla, registry)


def traces(orla: Orla, tracer_provider: TracerProvider | None = None) -> CallSpans:
    """Make a span of each call of an ``Orla``, as a child of the span that is current where it is made.

    Args:
        orla: Whose calls; those of its replicas make their spans in their own processes.
        tracer_provider: ``None``: OpenTelemetry's global one.

    Returns what ends it (``close()``).

    Raises:
        ConfigError: ``opentelemetry`` is missing, or this ``Orla``'s calls are traced already.
    """
    try:
        from orla_lg.observe.spans import CallSpans
    except ModuleNotFoundError as error:
        raise ConfigError(f"traces need {error.name}: pip install 'orla-lg[otel]'") from error
    return CallSpans(orla.core.serving, tracer_provider)
