"""Passes over the keys that know the norms of the rows: column sums, rows, sums over blocks."""

from attnspec.fast.engines.columns.evict import evict, evictable, received
from attnspec.fast.engines.columns.influence import block_influence
from attnspec.fast.engines.columns.op import (
    block_max,
    column_sums,
    row_lse,
    smooth,
    weight_rows,
)
from attnspec.fast.engines.columns.selected import selected_attention

__all__ = [
    "block_influence",
    "block_max",
    "column_sums",
    "evict",
    "evictable",
    "received",
    "row_lse",
    "selected_attention",
    "smooth",
    "weight_rows",
]
