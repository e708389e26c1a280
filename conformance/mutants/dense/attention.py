"""Wrong kernels of dense attention, most of them seen in well-known libraries."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.conventions import repeat_heads
from attnspec.reference.dense import attention
from attnspec.reference.dense.attention_gradient import score_gradient
from attnspec.reference.dense.attention_steps import visible
from attnspec.reference.primitives.softmax import softmax_lse

ATTEND = right("attention.attend")
BACKWARD = attention.attend_backward
BLOCK = 8


def top_left(q_tokens: int, k_tokens: int) -> np.ndarray:
    return np.arange(k_tokens)[None, :] <= np.arange(q_tokens)[:, None]


def visible_top_left(
    q_tokens: int, k_tokens: int, *, causal: bool = False, mask: Any = None
) -> np.ndarray:
    allowed = visible(q_tokens, k_tokens, mask=mask)
    return allowed & top_left(q_tokens, k_tokens) if causal else allowed


def interleaved(arguments: dict[str, Any]) -> None:
    """Query head h reads kv head h % kv_heads."""
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    if all(isinstance(x, np.ndarray) and x.ndim > 2 for x in (q, k, v)) and k.shape[-3]:
        order = np.arange(q.shape[-3]) % k.shape[-3]
        if k.shape[-3] == v.shape[-3]:
            arguments["k"], arguments["v"] = k[..., order, :, :], v[..., order, :, :]


def finite_fill(scores: np.ndarray, mask: Any = None) -> Any:
    if mask is not None:
        scores = np.where(mask, scores, np.float32(-1e4))
    return softmax_lse(scores)


def no_maximum(scores: np.ndarray, mask: Any = None) -> Any:
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(scores) if mask is None else np.exp(np.where(mask, scores, -np.inf))
        total = weights.sum(axis=-1, keepdims=True)
        safe = np.where(total == 0, 1, total).astype(scores.dtype)
        lse = np.where(total == 0, -np.inf, np.log(safe))[..., 0]
        return weights / safe, lse.astype(scores.dtype)


def nan_when_empty(scores: np.ndarray, mask: Any = None) -> Any:
    weights, lse = softmax_lse(scores, mask)
    return np.where(np.isneginf(lse)[..., None], np.float32(np.nan), weights), lse


def skip_tail(arguments: dict[str, Any]) -> None:
    whole = arguments["k"].shape[-2] // BLOCK * BLOCK
    if whole and not arguments["causal"] and arguments["mask"] is None:
        arguments["k"] = arguments["k"][..., :whole, :]
        arguments["v"] = arguments["v"][..., :whole, :]


def read_as_contiguous(arguments: dict[str, Any]) -> None:
    for name in ("q", "k", "v"):
        x = arguments[name]
        strides = np.cumprod([x.itemsize, *x.shape[:0:-1]])[::-1]
        arguments[name] = np.lib.stride_tricks.as_strided(x, x.shape, strides)


def without_last_channel(arguments: dict[str, Any]) -> None:
    q = arguments["q"]
    if isinstance(q, np.ndarray) and q.shape[-1] % 64 == 0:
        arguments["q"] = np.where(np.arange(q.shape[-1]) == q.shape[-1] - 1, 0, q).astype(q.dtype)


def half_dk_of_full_tiles(*args: Any, **kwargs: Any) -> Any:
    dq, dk, dv = BACKWARD(*args, **kwargs)
    return dq, 0.5 * dk if dk.shape[-1] % 64 == 0 else dk, dv


def mask_of_first_entry(arguments: dict[str, Any]) -> None:
    if arguments["mask"] is not None:
        arguments["mask"] = arguments["mask"][:1]


def eleven_bits(arguments: dict[str, Any]) -> None:
    """Operands rounded to TF32: ten explicit bits of mantissa."""
    for name in ("q", "k", "v"):
        bits = np.ascontiguousarray(arguments[name]).view(np.uint32)
        arguments[name] = ((bits + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def scaled_in_place(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
    result = ATTEND(q, k, v, **options)
    q *= np.float32(0.5)
    return result


def wrap_32_bits(arguments: dict[str, Any]) -> None:
    """Offsets kept in 32 bits: what lies beyond reads as the first entry."""
    for name in ("q", "k", "v"):
        x = arguments[name]
        for axis, stride in enumerate(x.strides):
            if stride // x.itemsize >= 2**31:
                arguments[name] = np.repeat(np.take(x, [0], axis), x.shape[axis], axis)


def tail_not_written(result: Any) -> Any:
    out, lse = result
    unwritten = np.empty_like(out)
    rows = out.shape[-2] - out.shape[-2] % BLOCK if out.shape[-2] > BLOCK else out.shape[-2]
    unwritten[..., :rows, :] = out[..., :rows, :]
    return unwritten, lse


def leaks_masked_values(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    return weights @ repeat_heads(v, weights.shape[-3])


class CachedByShape:
    """Keeps the result of the first call of each shape, as a graph replayed without its inputs."""

    def __init__(self) -> None:
        self.scales: dict[Any, Any] = {}

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
        scale = self.scales.setdefault((q.shape, k.shape), q[:1].sum() if q.size else 0)
        wrong = q if scale == (q[:1].sum() if q.size else 0) else q * np.float32(1.5)
        self.scales[q.shape, k.shape] = q[:1].sum() if q.size else 0
        return ATTEND(wrong, k, v, **options)


class Racing:
    """Gives one of two roundings of the last row, call by call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        out, lse = ATTEND(*args, **options)
        self.calls += 1
        out = out.copy()
        if self.calls % 2 and out.size:
            out[..., -1, :] *= np.float32(1 + 2**-23)
        return out, lse


class Tuned:
    """A kernel with two configurations, of which the second skips the last key, and halves dk."""

    def __init__(self) -> None:
        self.wrong = False

    def __call__(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
        if self.wrong and not options.get("causal") and options.get("mask") is None:
            k, v = k[..., :-1, :], v[..., :-1, :]
        return ATTEND(q, k, v, **options)

    def backward(self, **given: Any) -> Any:
        dq, dk, dv = BACKWARD(**given)
        return dq, (0.5 * dk if self.wrong else dk), dv

    @contextmanager
    def second(self) -> Any:
        self.wrong = True
        try:
            yield
        finally:
            self.wrong = False


def crop_to_fit(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
    if not all(isinstance(x, np.ndarray) and x.ndim == 4 for x in (q, k, v)):
        return ATTEND(q, k, v, **options)
    tokens = min(k.shape[-2], v.shape[-2])
    return ATTEND(q, k[..., :tokens, :], v[..., :tokens, :], **options)


def future_maximum(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
    """Rescales by a maximum over all keys, later ones too: right up to rounding."""
    out, lse = ATTEND(q, k, v, **options)
    if not options.get("causal") or not out.size:
        return out, lse
    top = np.abs(attention.score(q, k)).max(axis=-1)
    return out, ((lse - top) + top).astype(lse.dtype)


def forget_row_term(weights: Any, values: Any, dout: Any, dlse: Any = None) -> Any:
    ds, row_term = score_gradient(weights, values, dout, dlse)
    return ds + weights * row_term[..., None], row_term


def first_of_group(x: np.ndarray, kv_heads: int) -> np.ndarray:
    return x[..., :: x.shape[-3] // kv_heads, :, :]


def unit_upstream(arguments: dict[str, Any]) -> None:
    arguments["dout"] = np.ones_like(arguments["dout"])


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


tuned = Tuned()


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"attention.{name}", "attention.attend", law, bug, call, **rest)


MUTANTS = (
    mutant("no-scale", "agreement", "the scale 1/sqrt(d) is left out",
           altering(ATTEND, lambda a: a.update(scale=1.0 if a["scale"] is None else a["scale"]))),
    mutant("lse-base-2", "agreement", "lse is in base 2",
           spoiling(ATTEND, lambda r: (r[0], (r[1] / np.log(2)).astype(np.float32)))),
    mutant("top-left", "lengths", "causal order is aligned at the top left",
           replacing(ATTEND, visible=visible_top_left)),
    mutant("interleaved-heads", "heads", "query head h reads kv head h % kv_heads",
           altering(ATTEND, interleaved)),
    mutant("finite-fill", "magnitude", "masked scores are -1e4, and large logits see them",
           replacing(ATTEND, softmax_lse=finite_fill)),
    mutant("no-maximum", "magnitude", "exp without subtracting the maximum overflows",
           replacing(ATTEND, softmax_lse=no_maximum)),
    mutant("nan-empty-row", "lengths", "a row that sees nothing is NaN",
           replacing(ATTEND, softmax_lse=nan_when_empty)),
    mutant("skip-tail", "ragged", "keys after the last whole block are skipped",
           altering(ATTEND, skip_tail)),
    mutant("unwritten-tail", "ragged", "rows after the last whole block are never written",
           spoiling(ATTEND, tail_not_written)),
    mutant("contiguous", "layout", "strides are made up from the shape",
           altering(ATTEND, read_as_contiguous)),
    mutant("first-mask", "batch", "every entry of the batch uses the first entry's mask",
           altering(ATTEND, mask_of_first_entry)),
    mutant("tf32", "precision", "float32 operands are rounded to TF32",
           altering(ATTEND, eleven_bits)),
    mutant("in-place", "agreement", "q is scaled in place", scaled_in_place),
    mutant("wrap-32", "far", "offsets are computed in 32 bits", altering(ATTEND, wrap_32_bits)),
    mutant("leak", "poison", "masked values are multiplied by 0 instead of skipped",
           replacing(ATTEND, combine=leaks_masked_values)),
    mutant("stale", "stateless", "the second call of a shape reuses what the first computed",
           CachedByShape()),
    mutant("racing", "repeatable", "the last row depends on who finishes first", Racing()),
    mutant("second-config", "configurations", "one tuning configuration skips the last key",
           tuned, settings={"configs": {"first": tuned.second}}),
    mutant("second-gradient", "configured-gradient", "one tuning configuration halves dk", ATTEND,
           backward=tuned.backward, settings={"configs": {"first": tuned.second}}),
    mutant("fallback", "launched", "another implementation answers, the kernel is never launched",
           ATTEND, settings={"launches": lambda: 0}),
    mutant("beyond-limit", "limits", "a head size outside the stated limit is computed anyway",
           ATTEND, settings={"limits": {"d": range(1, 9)}}),
    mutant("crop", "refusal", "keys and values of different lengths are cropped to fit",
           crop_to_fit),
    mutant("future-maximum", "prefix", "the rounding of a row depends on later keys",
           future_maximum),
    mutant("no-delta", "gradient", "the softmax gradient lacks its row term", ATTEND,
           backward=replacing(BACKWARD, score_gradient=forget_row_term)),
    mutant("first-of-group", "gradient", "dk and dv are those of the first head of the group",
           ATTEND, backward=replacing(BACKWARD, sum_groups=first_of_group)),
    mutant("last-channel", "precision", "heads that fill a tile lack their last channel in scores",
           altering(ATTEND, without_last_channel)),
    mutant("wide-dk", "wide-gradient", "dk of heads that fill a tile is half of what it is",
           ATTEND, backward=half_dk_of_full_tiles),
    mutant("unit-upstream", "gradient", "the upstream gradient is taken to be 1", ATTEND,
           backward=altering(BACKWARD, unit_upstream)),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
           backward=altering(BACKWARD, no_lse_gradient)),
)  # fmt: skip
