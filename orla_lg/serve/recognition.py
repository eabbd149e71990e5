"""A backend that is no engine but a server of ours: its calls would go round in a circle, each queued twice."""

from __future__ import annotations

import httpx

from orla_lg.core.engine.backend import Backend
from orla_lg.errors import ConfigError
from orla_lg.serve.http.doors import SERVER_HEADER

PATIENCE_S = 2.0


def refuse_our_own(backend: Backend) -> None:
    """Refuse a backend that answers as an orla_lg server; one that does not answer is no fault.

    Raises:
        ConfigError: It does.
    """
    try:
        answer = httpx.get(f"{backend.url.rstrip('/')}/models", timeout=PATIENCE_S)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):  # what is wrong there, its probe says better
        return
    if SERVER_HEADER in answer.headers:
        raise ConfigError(
            f"backend {backend.name!r}: at {backend.url} answers an orla_lg server, which is no engine; give the URL "
            "of the engine behind it, or have this process's callers go there (ORLA_SERVER)"
        )
