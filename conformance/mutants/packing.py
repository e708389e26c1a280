"""What wrong kernels of packed sequences share."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

BLOCK = 8


def over_the_boundary(packed: Any, alone: Any) -> Any:
    """`packed` where a sequence starts with the block that holds its first token, made of what is
    for one sequence `alone`; only where no state comes in.
    """

    def mutant(q: Any, k: Any, v: Any, offsets: Any, state: Any = None, **options: Any) -> Any:
        out, last = packed(q, k, v, offsets, state, **options)
        if state is not None:
            return out, last
        parts = []
        for first, end in pairwise(offsets):
            wide = slice(first // BLOCK * BLOCK, end)
            one, _ = alone(q[:, wide], k[:, wide], v[:, wide], **options)
            parts.append(one[:, first - wide.start :])
        return np.concatenate(parts, axis=1), last

    return mutant


def multiplied_by_zero(packed: Any) -> Any:
    """`packed`, of q, k, v and more, where values of other sequences are multiplied by 0, which
    leaves NaN as it is.
    """

    def mutant(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        out, last = packed(q, k, v, *rest, **options)
        return out + 0 * np.sum(v).astype(out.dtype), last

    return mutant
