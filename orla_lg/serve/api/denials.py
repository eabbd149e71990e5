"""Refusals before any route, as the clients of Orla's APIs read errors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from orla_lg.serve.access.access import Denied
from orla_lg.serve.api.v1.answer import error
from orla_lg.serve.gateway import answers

V1 = ("/api/v1/execute", "/api/v1/policies", "/api/v1/access/", "/api/v1/skills", "/api/v1/workflow/")
"""Beginnings of the paths that v1 alone has."""

V1_PATHS = frozenset({"/api/v1/workflows"})


def denial(scope: Mapping[str, Any], denied: Denied) -> tuple[Sequence[answers.Header], bytes]:
    """Return headers and body of a refusal (``serve.http.guard``)."""
    path = scope["path"]
    if not (path in V1_PATHS or path.startswith(V1)):
        return answers.denial(scope, denied)
    name = answers.request_id(dict(scope["headers"]), "")
    headers = [answers.JSON, *denied.headers, *([(b"x-request-id", name)] if name else [])]
    return headers, json.dumps(error(denied.message, name.decode("latin-1"))).encode()
