"""Launch configurations of the Taylor kernels: a checked-in table, tuned by an explicit command."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attnspec.fast.tuning import Table


@dataclass(frozen=True)
class TaylorConfig:
    """Tiles of the kernels.

    A sequence is cut in segments of `segment` tokens, a state being kept before each; None takes
    about twice as many as there are features, where the products of pairs inside a segment cost as
    much as reading the state. `rows` and `keys` are the queries and keys of a tile of the forward
    kernel, `columns` the most value channels of one, `features` the features formed at a time;
    `back_rows`, `back_keys` are those of the backward kernels, which hold all value channels.
    `sum_rows` and `sum_features` belong to the kernel that sums the states.
    """

    segment: int | None = None
    rows: int = 128
    keys: int = 64
    columns: int = 128
    features: int = 32
    warps: int = 8
    stages: int = 2
    back_rows: int = 64
    back_keys: int = 64
    back_warps: int = 4
    back_stages: int = 2
    sum_rows: int = 64
    sum_features: int = 32
    sum_columns: int = 128
    sum_warps: int = 4
    sum_stages: int = 3


CANDIDATES = (
    TaylorConfig(),
    TaylorConfig(segment=64),
    TaylorConfig(segment=256),
    TaylorConfig(segment=1024),
    TaylorConfig(rows=64, warps=4),
    TaylorConfig(keys=128),
    TaylorConfig(features=64, sum_features=64),
    TaylorConfig(stages=3, back_stages=1),
    TaylorConfig(back_rows=128, back_keys=64, back_warps=8),
    TaylorConfig(sum_rows=128, sum_warps=8),
)

WIDE = TaylorConfig(
    rows=32, keys=32, columns=64, features=16, warps=4, stages=1, back_rows=32, back_keys=32,
    back_stages=1, sum_rows=32, sum_features=16, sum_columns=64, sum_stages=1,
)  # fmt: skip
"""Operands of 32 bits: float32, and float16, whose products need the range of float32."""

TABLE = Table(
    "taylor",
    {
        ("bfloat16",): CANDIDATES,
        ("wide",): (
            WIDE,
            replace(WIDE, segment=64),
            replace(WIDE, segment=256),
            replace(WIDE, segment=1024),
            replace(WIDE, rows=64),
            replace(WIDE, warps=8, back_warps=8),
            replace(WIDE, features=32, sum_features=32),
        ),
    },
)


def config(dtype: torch.dtype) -> TaylorConfig:
    """The configuration in force for inputs of `dtype`."""
    return TABLE.forced() or TABLE.choose("bfloat16" if dtype == torch.bfloat16 else "wide")


use_config = TABLE.use
