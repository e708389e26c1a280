r"""Entropy-ABF, the probe: how the entropy of attention grows with the length of the prompt.

A query that may look at more keys spreads its weights over more of them. Where the entropy keeps
growing beyond the training length, attention does what it never learned to do; the first two layers
are the exception, and this is what shows it.

Definition
----------
S8. **Probe.** For the last query of prompts of one length, the entropy
:math:`-\sum_j p_j \ln p_j` (0 ln 0 = 0) of each head's weights, averaged over documents; and how
that grows with the length.

Paper and code
--------------
The authors' script applies the softmax to weights that are normalised already, so that its values
lie near the logarithm of the length, takes head 0 only and averages the weights over documents
before the entropy. S8 is the exact form.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from attnspec.reference.conventions import check_array
from attnspec.reference.primitives.entropy import entropy


def attention_entropy(P: np.ndarray) -> np.ndarray:
    """S8: the entropy (...), natural, of weights P (..., keys).

    >>> attention_entropy(np.array([0.5, 0.5, 0.0])).round(4)
    np.float64(0.6931)
    """
    check_array("P", P, ("keys",))
    if np.any(P < 0):
        raise ValueError(f"P: got {P.min()}, expected weights >= 0")
    return entropy(P)


def entropy_growth(P_by_length: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """S8: lengths (n), ascending, and the mean entropies E (n, layers, heads) over documents.

    `P_by_length` gives for each length the weights (documents, layers, heads, length) of the last
    query. The mean of E over its heads is the curve of a layer.

    >>> lengths, E = entropy_growth({2: np.full((1, 1, 1, 2), 0.5), 1: np.ones((1, 1, 1, 1))})
    >>> lengths, E.ravel().round(4)
    (array([1, 2]), array([0.    , 0.6931]))
    """
    if not isinstance(P_by_length, Mapping) or not P_by_length:
        raise TypeError("P_by_length: got no mapping, expected weights for one length or more")
    lengths = sorted(P_by_length)
    for length in lengths:
        P = P_by_length[length]
        check_array("P_by_length", P, ("documents", "layers", "heads", "length"))
        expected = (*P_by_length[lengths[0]].shape[1:3], length)
        if P.ndim != 4 or P.shape[1:] != expected or not len(P):
            raise ValueError(
                f"P_by_length: got shape {P.shape}, expected (documents, "
                f"{', '.join(map(str, expected))})"
            )
    E = np.stack([np.mean(attention_entropy(P_by_length[n]), axis=0) for n in lengths])
    return np.array(lengths), E
