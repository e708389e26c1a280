"""The second pass over the keys, which knows the lse: column sums, rows and block maxima."""

from attnspec.fast.engines.columns.op import (
    block_max,
    column_sums,
    row_lse,
    smooth,
    weight_rows,
)

__all__ = ["block_max", "column_sums", "row_lse", "smooth", "weight_rows"]
