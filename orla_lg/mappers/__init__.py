"""Stage mappers, ready to use and to put together; docs/mapping.md shows each of them.

``ExplicitMapper`` and ``StageTable`` are what a dict given to ``Orla`` becomes. Any object with ``map(call,
backends)`` is a mapper too.
"""

from orla_lg.mappers.cost_quality import CostQualityMapper
from orla_lg.mappers.http import HttpMapper
from orla_lg.mappers.learned import EmbeddingMapper, LearnedMapper
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.need import NeedMapper
from orla_lg.mappers.one_bit import OneBitStageMapper
from orla_lg.mappers.table import ExplicitMapper, First, StageTable

__all__ = [
    "CostQualityMapper",
    "EmbeddingMapper",
    "ExplicitMapper",
    "First",
    "HttpMapper",
    "LearnedMapper",
    "LoadAware",
    "NeedMapper",
    "OneBitStageMapper",
    "StageTable",
]
