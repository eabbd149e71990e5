"""Engines of one's own on this machine: installed, started, listed and ended (``orla-lg engine``)."""

from orla_lg.arguments import answer_wrong_arguments
from orla_lg.engines.own import OwnEngine, running_engine
from orla_lg.engines.recipe import EngineOptions

__all__ = ["EngineOptions", "OwnEngine", "running_engine"]

answer_wrong_arguments(EngineOptions, OwnEngine)
