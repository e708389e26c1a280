"""MoA's masks as mask functions of FlexAttention."""

from __future__ import annotations

import torch
from torch import Tensor

from attnspec.fast.backend import check_choice, check_integer
from attnspec.fast.flex import MaskMod
from attnspec.fast.patterns.moa_masks import Sizes, check_plan

GRANULARITIES = ("token", "block")


def mask_mod(
    s: Sizes,
    c: Sizes,
    group: int = 1,
    *,
    granularity: str = "token",
    block: int = 64,
    device: str | torch.device = "cpu",
) -> MaskMod:
    """For kv heads with `s` static and `c` local tokens, each with a `group` of query heads.

    `device` is where the attention runs: the function reads the sizes from tensors there.
    """
    check_integer("group", group, least=1)
    check_choice("granularity", granularity, GRANULARITIES)
    plan = check_plan(s, c, block=block if granularity == "block" else 1)
    static, local = (torch.tensor(x, device=device) for x in plan)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sinks, window = static[head // group], local[head // group]
        if granularity == "token":
            near = query - key < window
        else:
            near = key // block > query // block - window // block
        return (key <= query) & ((key < sinks) | near)

    return visible
