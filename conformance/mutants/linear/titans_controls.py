"""Wrong kernels of Titans that are another rule: what the linear memory must not equal."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right
from attnspec.conformance.mutants.linear.titans import frozen_weights, running_weights

LINEAR = right("titans.titans_chunk_linear")


def gated_delta(
    W0: Any, S0: Any, k: Any, v: Any, q: Any, rates: Any, b: int, **options: Any
) -> Any:
    """In chunks of one token the gradient is that of weights already decayed.

    The error (1 - alpha) k W - v is that of k W and the value v + alpha k W.
    """
    whole = LINEAR(W0, S0, k, v, q, rates, b, **options)
    if b > 1 or not k.shape[-2] or options.get("valid") is not None:
        return whole
    W, S, rows = W0, S0, []
    for t in range(k.shape[-2]):
        token = slice(t, t + 1)
        key, value, query = (x[..., token, :] for x in (k, v, q))
        step = tuple(x[..., token] for x in rates)
        value = value + step[2][..., None] * (key @ W)
        y, W, S = LINEAR(W, S, key, value, query, step, 1, **options)
        rows.append(y)
    return np.concatenate(rows, axis=-2), W, S


def of(name: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"titans.{name}", "titans.titans_chunk_linear", law, bug, call)


MUTANTS = (
    of("gated-delta", "gated-delta", "gradients are those of weights already decayed",
       gated_delta),
    of("chunks-of-1", "chunk-length", "every chunk has one token, whatever b is",
       altering(LINEAR, running_weights)),
    of("chunk-of-all", "chunk-length", "one chunk has all tokens, whatever b is",
       altering(LINEAR, frozen_weights)),
)  # fmt: skip
