"""Wrong kernels of what LongLoRA trains: scales left out, gradients cut short, sums lost."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.reference.patterns import longlora_tuning

EMBED = right("longlora.embedding_backward")
FACTOR = right("longlora.interpolation_factor")
LORA = right("longlora.lora_forward")
LORA_BACKWARD = longlora_tuning.lora_backward
MERGE = right("longlora.lora_merge")
NORM = right("longlora.rmsnorm")
NORM_BACKWARD = longlora_tuning.rmsnorm_backward
POSITIONS = right("longlora.interpolate_positions")


def scale_left_out(arguments: dict[str, Any]) -> None:
    """alpha is not divided by the rank."""
    if isinstance(arguments["alpha"], (int, float)):
        arguments["alpha"] = arguments["alpha"] * len(arguments["A"])


def scaled_twice(gradients: Any) -> Any:
    return gradients[0], 2 * gradients[1], gradients[2]


def drops_everywhere(x: Any, W: Any, A: Any, B: Any, alpha: Any = 16.0, *, keep: Any = None,
                     dropout: Any = 0.0) -> Any:  # fmt: skip
    """The frozen part sees x after dropout, too."""
    result = LORA(x, W, A, B, alpha, keep=keep, dropout=dropout)
    if keep is None:
        return result
    return LORA(np.where(keep, x / (1 - dropout), np.zeros_like(x)), W, A, B, alpha)


def merges_in_place(W: Any, A: Any, B: Any, alpha: Any = 16.0) -> Any:
    W[...] = MERGE(W, A, B, alpha)
    return W


def eps_outside(x: Any, w: Any, eps: Any = 1e-6) -> Any:
    """eps is added to the root, not under it."""
    NORM(x, w, eps)
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps) * w


def without_mean(x: Any, w: Any, dout: Any, eps: Any = 1e-6) -> Any:
    """The gradient takes the root mean square for a constant."""
    _, dw = NORM_BACKWARD(x, w, dout, eps)
    return dout * w / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps), dw


def last_use_wins(ids: Any, dout: Any, vocab: int) -> Any:
    """Rows are written to the table, not added."""
    result = EMBED(ids, dout, vocab)
    result[ids.reshape(-1)] = dout.reshape(-1, dout.shape[-1])
    return result


def rounds(new_len: int, orig_len: int, rope_factor: float = 1.0) -> float:
    """The factor is rounded to the nearest whole number, not up."""
    FACTOR(new_len, orig_len, rope_factor)
    return float(max(1, round(new_len / (orig_len * rope_factor))))


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"longlora.{name}", f"longlora.{operation}", law, bug, call, **rest)


MUTANTS = (
    of("lora_forward", "no-rank", "agreement", "alpha is not divided by the rank",
       altering(LORA, scale_left_out)),
    of("lora_forward", "drops-everywhere", "agreement", "dropout acts on the frozen part",
       drops_everywhere),
    of("lora_forward", "da-scale", "gradient", "dA is scaled twice", LORA,
       backward=spoiling(LORA_BACKWARD, scaled_twice)),
    of("lora_merge", "merge-no-rank", "agreement", "alpha is not divided by the rank",
       altering(MERGE, scale_left_out)),
    of("lora_merge", "in-place", "agreement", "the frozen weights are overwritten",
       merges_in_place),
    of("rmsnorm", "eps-outside", "agreement", "eps is added to the root", eps_outside),
    of("rmsnorm", "no-mean", "gradient", "the root mean square is taken for a constant", NORM,
       backward=without_mean),
    of("embedding_backward", "last-wins", "agreement", "a token's last use overwrites the others",
       last_use_wins),
    of("interpolation_factor", "rounds", "agreement", "the factor is rounded to the nearest",
       rounds),
    of("interpolate_positions", "floors", "agreement", "positions are whole numbers again",
       spoiling(POSITIONS, np.floor)),
)  # fmt: skip
