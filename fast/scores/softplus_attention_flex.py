"""LSSA as a score function of FlexAttention: the log of softplus, whose softmax it is.

LSSAR is none: what it sharpens are the weights, which only a finished row has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnspec.fast.backend import FLOATS, INTEGERS, check_bool, check_integer
from attnspec.fast.flex import ScoreMod, by_token, check_by_token

FAR = -60.0
"""Below it the log of softplus is its argument, to the last bit of float64."""


def score_mod(n: Tensor, d: int, normalise_qk: bool = True) -> ScoreMod:
    """For rows that see `n` (q_tokens) or (batch, q_tokens) keys, their `visible_counts`.

    Queries and keys of width `d` come as `unit` vectors, or as they are without `normalise_qk`; the
    attention's scale is 1. This is `lssa` with eps = 0. n lies on the device of the attention.
    """
    check_by_token("n", n, "q_tokens", (*INTEGERS, *FLOATS))
    check_integer("d", d, least=1)
    check_bool("normalise_qk", normalise_qk)
    scale = math.log(d) / (1.0 if normalise_qk else math.sqrt(d))
    factor = n.double().clamp(min=1).log() * scale

    def softened(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        x = score * by_token(factor, batch, query).to(score.dtype)
        near = x.clamp(min=FAR)
        softplus = near.clamp(min=0) + torch.log1p(torch.exp(-near.abs()))
        return torch.where(x < FAR, x, torch.log(softplus))

    return softened
