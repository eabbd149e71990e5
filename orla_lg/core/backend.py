"""A documented path: what stands in ``core.engine.backend``."""

from orla_lg.core.engine.backend import *  # noqa: F403
