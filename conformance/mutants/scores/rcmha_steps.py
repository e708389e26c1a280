"""Wrong steps of RCMHA: filters flipped or leaking, shifts one off, the wrong tokens remembered."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, right, spoiling
from attnspec.reference.scores import rcmha

PROJECT = right("rcmha.project_heads")
CONV = right("rcmha.depthwise_causal_conv")
CONV_BACKWARD = rcmha.depthwise_causal_conv_backward
SHIFT = right("rcmha.relative_shift")
MASK = right("rcmha.memory_mask")
MEMORY = right("rcmha.update_memory")


def flipped(arguments: dict[str, Any]) -> None:
    """A true convolution: the last tap meets the oldest token."""
    arguments["w"] = arguments["w"][..., ::-1]


def centred(p: Any, w: Any, b: Any, state: Any = None) -> Any:
    """Zeros on both sides: a token sees those to come."""
    y, new_state = CONV(p, w, b, state)
    ahead = (w.shape[-1] - 1) // 2
    if not ahead or not p.shape[-2]:
        return y, new_state
    longer = np.concatenate([p, np.zeros_like(p, shape=(*p.shape[:-2], ahead, p.shape[-1]))], -2)
    return CONV(longer, w, b, state)[0][..., ahead:, :], new_state


def without_history(p: Any, w: Any, b: Any, state: Any = None) -> Any:
    """Chunks start from zeros although there is a state."""
    return CONV(p, w, b)[0], CONV(p, w, b, state)[1]


def short_chunks_forget(p: Any, w: Any, b: Any, state: Any = None) -> Any:
    """The new state is made from the rows of this chunk alone."""
    return CONV(p, w, b, state)[0], CONV(p, w, b)[1]


def along_channels(p: Any, w: Any, b: Any, state: Any = None) -> Any:
    """Each number mixed with those of the channels before it."""
    _, new_state = CONV(p, w, b, state)
    K, d = w.shape[-1], p.shape[-1]
    padded = np.concatenate([np.zeros_like(p, shape=(*p.shape[:-1], K - 1)), p], axis=-1)
    return b + sum(w[:, u] * padded[..., u : u + d] for u in range(K)), new_state


def first_head_only(p: Any, w: Any, b: Any, state: Any = None) -> Any:
    """The filters are those of the first head; the others have none."""
    y, new_state = CONV(p, w, b, state)
    return np.concatenate([y[..., :1, :, :], p[..., 1:, :, :]], axis=-3), new_state


def no_bias_gradient(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    dp, dw, db, dstate = gradients
    return dp, dw, np.zeros_like(db), dstate


def filter_gradient_flipped(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    dp, dw, db, dstate = gradients
    return dp, dw[..., ::-1], db, dstate


def no_state_gradient(*arguments: Any, **keywords: Any) -> Any:
    dp, dw, db, dstate = CONV_BACKWARD(*arguments, **keywords)
    return dp, dw, db, np.zeros_like(dstate)


def first_columns(Bmat: Any) -> Any:
    """The first S columns are kept in place of the last."""
    SHIFT(Bmat)
    T, columns = Bmat.shape[-2:]
    padded = np.concatenate([Bmat, np.zeros_like(Bmat[..., :1])], axis=-1)
    flat = padded.reshape(*Bmat.shape[:-2], T * (columns + 1))[..., : T * columns]
    return flat.reshape(Bmat.shape)[..., : columns - T]


def no_zero_column(Bmat: Any) -> Any:
    """The numbers are read as they are, unsheared."""
    SHIFT(Bmat)
    return Bmat[..., Bmat.shape[-2] :]


def column_on_the_left(Bmat: Any) -> Any:
    """The column of zeros goes before the others: one off."""
    return np.concatenate([SHIFT(Bmat)[..., 1:], SHIFT(Bmat)[..., :1]], axis=-1)


def mask_by_index(T: int, M: int) -> Any:
    MASK(T, M)
    return np.tri(T, M + T, dtype=bool)


def interleaved(x: Any, W: Any, b: Any, heads: int) -> Any:
    """Head h takes every heads-th column."""
    y = PROJECT(x, W, b, heads)
    flat = np.swapaxes(y, -2, -3).reshape(x.shape)
    return np.moveaxis(flat.reshape(*x.shape[:-1], x.shape[-1] // heads, heads), -1, -3)


def oldest_kept(old: Any, new: Any, mem_len: int) -> Any:
    """The first `mem_len` tokens are kept."""
    MEMORY(old, new, mem_len)
    kept = new if old is None else np.concatenate([old, new], axis=-2)
    return kept[..., :mem_len, :].copy()


def minus_zero(old: Any, new: Any, mem_len: int) -> Any:
    """A slice from -0 keeps everything."""
    MEMORY(old, new, mem_len)
    kept = new if old is None else np.concatenate([old, new], axis=-2)
    return kept[..., -mem_len:, :].copy()


def mutant(name: str, operation: str, law: str, call: Any, backward: Any = None) -> Mutant:
    """A mutant whose bug is what its name says."""
    return Mutant(
        f"rcmha.{name}", f"rcmha.{operation}", law, name.replace("-", " "), call, backward
    )


MUTANTS = (
    mutant("flipped-filter", "depthwise_causal_conv", "agreement", altering(CONV, flipped)),
    mutant("centred-filter", "depthwise_causal_conv", "prefix", centred),
    mutant("no-history", "depthwise_causal_conv", "agreement", without_history),
    mutant("short-chunk-forgets", "depthwise_causal_conv", "tiny", short_chunks_forget),
    mutant("filter-along-channels", "depthwise_causal_conv", "agreement", along_channels),
    mutant("first-head-filtered", "depthwise_causal_conv", "heads", first_head_only),
    mutant("filter-bias-gradient", "depthwise_causal_conv", "gradient", CONV,
           spoiling(CONV_BACKWARD, no_bias_gradient)),
    mutant("filter-gradient-flipped", "depthwise_causal_conv", "gradient", CONV,
           spoiling(CONV_BACKWARD, filter_gradient_flipped)),
    mutant("state-gradient-missing", "depthwise_causal_conv", "gradient", CONV, no_state_gradient),
    mutant("shift-first-columns", "relative_shift", "agreement", first_columns),
    mutant("shift-without-column", "relative_shift", "agreement", no_zero_column),
    mutant("shift-one-off", "relative_shift", "agreement", column_on_the_left),
    mutant("mask-by-index", "memory_mask", "agreement", mask_by_index),
    mutant("interleaved-heads", "project_heads", "agreement", interleaved),
    mutant("memory-keeps-oldest", "update_memory", "agreement", oldest_kept),
    mutant("memory-minus-zero", "update_memory", "agreement", minus_zero),
)  # fmt: skip
