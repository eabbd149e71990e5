"""A documented path: what stands in ``core.engine.capabilities``."""

from orla_lg.core.engine.capabilities import *  # noqa: F403
