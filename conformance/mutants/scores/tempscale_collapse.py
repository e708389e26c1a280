"""Wrong diagnostics of TempScale: the wrong axis, the wrong order, the wrong pairs."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.reference.scores.tempscale_collapse import dc, hc

GAIN = right("tempscale.filter_gain")
RETENTION = right("tempscale.retention")
ENTROPY = right("tempscale.attention_entropy")
BLOCK = 8


def padded_length(X: np.ndarray) -> np.ndarray:
    """The sum is divided by the length rounded up to whole blocks."""
    tokens = X.shape[-2]
    return dc(X) * X.dtype.type(tokens / (-(-tokens // BLOCK) * BLOCK))


def along_channels(X: np.ndarray) -> np.ndarray:
    return X - X.mean(axis=-1, keepdims=True)


def of_the_transpose(A: np.ndarray) -> np.ndarray:
    """A (I - J/T) in place of (I - J/T) A."""
    return np.linalg.svd(A - A.mean(axis=-1, keepdims=True), compute_uv=False)[..., 0]


def norm_of_all(A: np.ndarray) -> np.ndarray:
    """The norm over all singular values in place of the largest one."""
    return np.sqrt(np.sum(hc(A) ** 2, axis=(-2, -1)))


def uncentred(A: np.ndarray) -> np.ndarray:
    return np.linalg.svd(A, compute_uv=False)[..., 0]


def few_iterations(A: np.ndarray) -> np.ndarray:
    """A power iteration stopped after two rounds."""
    M = hc(A)
    x = np.zeros_like(M[..., 0]) + np.arange(1, M.shape[-1] + 1, dtype=A.dtype)
    for _ in range(2):
        x = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.float32(1e-30))
        x = np.einsum("...ij,...i->...j", M, np.einsum("...ij,...j->...i", M, x))
    return np.sqrt(np.linalg.norm(x, axis=-1)).astype(A.dtype)


def without_mean(arguments: dict[str, Any]) -> None:
    """A is applied to what differs between tokens only, although its rows need not sum to 1."""
    arguments["X"] = hc(arguments["X"])


def no_guard(A: np.ndarray, X: np.ndarray) -> np.ndarray:
    def size(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.sum(hc(x) ** 2, axis=(-2, -1)))

    with np.errstate(invalid="ignore", divide="ignore"):
        return size(A @ X) / size(X)


def spectrum(A: np.ndarray, axis: int = -2, power: int = 1, early: bool = False) -> np.ndarray:
    """The spectrum by a fast transform, with its usual mistakes."""
    size = np.abs(np.fft.rfft(A, axis=axis)) ** power
    if early:
        zero = size[..., :1, :]
        return np.mean(size / np.where(zero == 0, 1, zero), axis=-1).astype(A.dtype)
    s = np.mean(size, axis=-1 if axis == -2 else -2)
    return (s / np.where(s[..., :1] == 0, 1, s[..., :1])).astype(A.dtype)


def nan_for_no_weight(P: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return -np.sum(P * np.log(P), axis=-1)


def in_bits(entropy: np.ndarray) -> np.ndarray:
    return (entropy / np.log(2)).astype(entropy.dtype)


def with_itself(E: np.ndarray) -> np.ndarray:
    """The mean over all ordered pairs, each text with itself among them."""
    unit = E / np.linalg.norm(E, axis=-1, keepdims=True)
    return np.mean(unit @ np.swapaxes(unit, -1, -2), axis=(-2, -1))


def of_raw_vectors(E: np.ndarray) -> np.ndarray:
    first, second = np.triu_indices(E.shape[-2], 1)
    return np.mean((E @ np.swapaxes(E, -1, -2))[..., first, second], axis=-1)


def squared(E: np.ndarray) -> np.ndarray:
    return np.mean(np.sum(hc(E) ** 2, axis=-1), axis=-1)


def mutant(name: str, operation: str, law: str, bug: str, call: Any) -> Mutant:
    return Mutant(f"tempscale.{name}", f"tempscale.{operation}", law, bug, call)


MUTANTS = (
    mutant("padded-mean", "dc", "agreement", "the mean counts padding up to a whole block",
           padded_length),
    mutant("channel-mean", "hc", "agreement", "the mean runs along the channels", along_channels),
    mutant("transposed-gain", "filter_gain", "agreement", "the mean is taken from the rows",
           of_the_transpose),
    mutant("frobenius-gain", "filter_gain", "agreement", "all singular values count", norm_of_all),
    mutant("uncentred-gain", "filter_gain", "agreement", "the constant part is not taken out",
           uncentred),
    mutant("early-gain", "filter_gain", "agreement", "the power iteration has not converged",
           few_iterations),
    mutant("retention-of-hc", "retention", "agreement", "A is applied to HC[X], not to X",
           altering(RETENTION, without_mean)),
    mutant("retention-nan", "retention", "tiny", "a single token divides 0 by 0", no_guard),
    mutant("spectrum-along-keys", "token_spectrum", "agreement", "the transform runs along keys",
           lambda A: spectrum(A, axis=-1)),
    mutant("power-spectrum", "token_spectrum", "agreement", "magnitudes are squared",
           lambda A: spectrum(A, power=2)),
    mutant("early-division", "token_spectrum", "agreement", "columns are divided, then averaged",
           lambda A: spectrum(A, early=True)),
    mutant("entropy-nan", "attention_entropy", "agreement", "0 log 0 is NaN", nan_for_no_weight),
    mutant("entropy-in-bits", "attention_entropy", "agreement", "the logarithm has base 2",
           spoiling(ENTROPY, in_bits)),
    mutant("with-itself", "pairwise_cosine", "agreement", "each text is paired with itself too",
           with_itself),
    mutant("raw-products", "pairwise_cosine", "agreement", "the embeddings are not normalised",
           of_raw_vectors),
    mutant("squared-distance", "centre_distance", "agreement", "distances are squared", squared),
)  # fmt: skip
