"""What an adapter must offer: the documented path of ``core.engine.backend``."""

from orla_lg.core.engine.backend import (
    MOST_CALLS,
    MOST_SAVED,
    OWN_HEADERS,
    Backend,
    BackendAdapter,
    Capability,
    Cost,
    Directions,
    Effect,
    Probe,
    Support,
    model_asked,
    whole,
    with_fields,
)

__all__ = [
    "MOST_CALLS",
    "MOST_SAVED",
    "OWN_HEADERS",
    "Backend",
    "BackendAdapter",
    "Capability",
    "Cost",
    "Directions",
    "Effect",
    "Probe",
    "Support",
    "model_asked",
    "whole",
    "with_fields",
]
