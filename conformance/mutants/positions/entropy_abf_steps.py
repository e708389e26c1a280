"""Wrong kernels of Entropy-ABF's single steps: rotation, scale, layers and the entropy probe."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import right, spoiling
from attnspec.conformance.mutants.positions.entropy_abf import (
    FREQUENCIES,
    ROTATE,
    neighbours,
    of_the_position,
    one_layer_more,
    step,
)

GROWTH = right("entropy_abf.entropy_growth")
ENTROPY = right("entropy_abf.attention_entropy")


def nan_below_zero(positions: Any, c: float = 4096, floor: float = 1.0) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.maximum(np.log(positions + 1.0) / np.log(c), floor)


def other_way(x: Any, positions: Any, freqs: Any) -> Any:
    return ROTATE(x, -positions, freqs)


def over_d(d: int, base: float = 500000.0) -> Any:
    """The exponent is m/d."""
    return np.sqrt(FREQUENCIES(d, base))


def softmax_again(P: Any) -> Any:
    """The weights are taken for logits, as the released script does."""
    weights = np.exp(P)
    return ENTROPY(weights / weights.sum(axis=-1, keepdims=True))


def in_bits(entropy: Any) -> Any:
    return (entropy / np.log(2)).astype(entropy.dtype)


def average_first(P_by_length: Any) -> Any:
    """Documents are averaged before the entropy."""
    return GROWTH({n: P.mean(axis=0, keepdims=True) for n, P in P_by_length.items()})


def head_0_for_all(P_by_length: Any) -> Any:
    lengths, E = GROWTH(P_by_length)
    return lengths, np.zeros_like(E) + E[..., :1]


def as_they_come(P_by_length: Any) -> Any:
    """Lengths in the order of the mapping, beside entropies in ascending order."""
    return np.array(list(P_by_length)), GROWTH(P_by_length)[1]


MUTANTS = (
    step("neighbouring-pairs", "rope_rotate", "agreement", "neighbouring channels are paired",
         neighbours),
    step("other-way", "rope_rotate", "agreement", "the rotation has the other sign", other_way),
    step("gradient-other-way", "rope_rotate", "gradient", "the gradient is turned on, not back",
         ROTATE, backward=lambda x, positions, freqs, dout: ROTATE(dout, positions, freqs)),
    step("scale-of-position", "row_scale", "agreement", "ln(p) in place of ln(p + 1)",
         of_the_position),
    step("negative-nan", "row_scale", "agreement", "positions below 0 give NaN", nan_below_zero),
    step("exponent", "rope_frequencies", "agreement", "the exponent is m/d, not 2m/d", over_d),
    step("exempt-too-many", "layer_is_exempt", "agreement", "n_exempt itself is exempt",
         one_layer_more),
    step("softmax-again", "attention_entropy", "agreement", "weights are taken for logits",
         softmax_again),
    step("entropy-in-bits", "attention_entropy", "agreement", "the logarithm has base 2",
         spoiling(ENTROPY, in_bits)),
    step("average-first", "entropy_growth", "agreement", "weights are averaged, not entropies",
         average_first),
    step("head-0", "entropy_growth", "agreement", "head 0 stands for all", head_0_for_all),
    step("unsorted", "entropy_growth", "agreement", "lengths come in the order given",
         as_they_come),
)  # fmt: skip
