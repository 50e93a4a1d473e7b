"""Compressed collectives over any process group, any backend, any length."""

from __future__ import annotations

from pydist.collectives.flat import (
    all_gather,
    all_reduce,
    load_state_dict,
    reduce_scatter,
    state_dict,
)
from pydist.collectives.work import Work

__all__ = ["Work", "all_gather", "all_reduce", "load_state_dict", "reduce_scatter", "state_dict"]
