"""Wrong kernels of Lightning Attention-2's quadratic form, decode step, slopes and mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.dtypes import round_to
from attnspec.conformance.mutants import Mutant, replacing, right, spoiling
from attnspec.reference.linear import lightning_attention_2 as lightning

LEFT = right("lightning_attention_2.attend_left")
STEP = right("lightning_attention_2.decode_step")
MASK = right("lightning_attention_2.decay_mask")


def reads_before_writing(S: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray,
                         s: np.ndarray) -> Any:  # fmt: skip
    _, new = STEP(S, q, k, v, s)
    return (np.exp(-s).astype(q.dtype)[:, None, None] * (q @ S)).astype(q.dtype), new


def decays_after_writing(result: Any, s: np.ndarray) -> Any:
    o, S = result
    return o, np.exp(-s).astype(S.dtype)[:, None, None] * S


def step_then_decay(S: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray,
                    s: np.ndarray) -> Any:  # fmt: skip
    return decays_after_writing(STEP(S, q, k, v, s), s)


def sixteen_bit_state(result: Any) -> Any:
    o, S = result
    return o, round_to(S, "float16").astype(S.dtype)


def from_zero(n_heads: int) -> np.ndarray:
    s = lightning.slopes(n_heads)
    return np.concatenate([[0.0], s[:-1]])


def one_layer_more(n_heads: int, layer: int, n_layers: int) -> np.ndarray:
    lightning.layer_slopes(n_heads, layer, n_layers)
    return lightning.slopes(n_heads) * (1 - layer / n_layers + 1e-5)


def next_power(n_heads: int) -> np.ndarray:
    lightning.slopes(n_heads)
    power = 1 << (n_heads - 1).bit_length()
    return 2.0 ** (-8.0 * np.arange(1, power + 1) / power)[:n_heads]


def strict_mask(result: np.ndarray) -> np.ndarray:
    return result * (1 - np.eye(result.shape[-1], dtype=result.dtype))


def guarded_scores(q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Values are clipped at 3, to be safe."""
    if isinstance(v, np.ndarray) and v.dtype.kind == "f":
        v = np.clip(v, -3, 3)
    return LEFT(q, k, v, s)


def not_masked(T: int, s: np.ndarray) -> np.ndarray:
    """The gradient's mask is symmetric, as that of no causal order."""
    M = MASK(T, s)
    return np.maximum(M, np.swapaxes(M, -1, -2))


def mutant(name: str, law: str, bug: str, call: Any, operation: str, **rest: Any) -> Mutant:
    name, operation = (f"lightning_attention_2.{x}" for x in (name, operation))
    return Mutant(name, operation, law, bug, call, **rest)


MUTANTS = (
    mutant("symmetric-gradient", "gradient", "the gradient's mask is not causal", LEFT,
           "attend_left", backward=replacing(lightning.backward_left, decay_mask=not_masked)),
    mutant("clipped", "linearity", "values are clipped", guarded_scores, "attend_left"),
    mutant("no-diagonal", "agreement", "a token does not see itself",
           spoiling(MASK, strict_mask), "decay_mask"),
    mutant("read-first", "agreement", "a step reads the state before it writes",
           reads_before_writing, "decode_step"),
    mutant("decay-last", "stream", "a step decays the state behind the write", step_then_decay,
           "decode_step"),
    mutant("16-bit-state", "stream", "the state is kept in 16 bits",
           spoiling(STEP, sixteen_bit_state), "decode_step"),
    mutant("slopes-from-0", "agreement", "the first head does not decay", from_zero, "slopes"),
    mutant("next-power", "agreement", "slopes of 12 heads are the first of those of 16",
           next_power, "slopes"),
    mutant("one-layer-more", "agreement", "the layer factor divides by L", one_layer_more,
           "layer_slopes"),
)  # fmt: skip
