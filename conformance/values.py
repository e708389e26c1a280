"""Kinds of data. Each is a way real kernels have gone wrong while iid Gaussians looked fine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np


def _normal(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    return rng.standard_normal(shape)


def _peaky(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Logits spread over tens: one or two keys take all the weight."""
    return rng.standard_normal(shape) * (4.0 if role in ("query", "key") else 1.0)


def _flat(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Nearly equal logits: outputs average out, and padding that is counted shows."""
    return rng.standard_normal(shape) * (0.01 if role in ("query", "key") else 1.0)


def _ties(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Small integers: every dot product is exact in every dtype, and most of them are tied."""
    return rng.integers(-2, 3, shape).astype(np.float64)


def _one_hot(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """One channel of each row is 1: an index mixed up is a different row, not a small error."""
    x = np.zeros(shape)
    if x.size:
        place = rng.integers(0, shape[-1], shape[:-1])[..., None]
        np.put_along_axis(x, place, 1.0, axis=-1)
    return x


def _structured(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Rows in runs of a common direction, so that whole blocks matter or do not."""
    if len(shape) < 2:
        return rng.standard_normal(shape)
    run = 8
    directions = rng.standard_normal((*shape[:-2], -(-shape[-2] // run), shape[-1]))
    rows = np.repeat(directions, run, axis=-2)[..., : shape[-2], :]
    return rows + 0.1 * rng.standard_normal(shape)


def _huge(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Logits of 1e4 and more: exp without its running maximum overflows."""
    if role not in ("query", "key"):
        return rng.standard_normal(shape)
    return 200.0 * np.sign(rng.standard_normal(shape)) * (1 + rng.random(shape))


@cache
def _captured() -> dict[str, np.ndarray]:
    with np.load(str(files("attnspec.conformance") / "data" / "minilm_qkv.npz")) as data:
        return {name: data[name].astype(np.float64) for name in ("query", "key", "value")}


def _real(rng: np.random.Generator, shape: tuple[int, ...], role: str) -> np.ndarray:
    """Rows and channels of queries, keys and values captured from a trained encoder."""
    if role == "other" or len(shape) < 2 or 0 in shape:
        return rng.standard_normal(shape)
    source = _captured()[role]  # (layers, heads, tokens, d)
    layers, heads, tokens, d = source.shape
    out = np.empty(shape)
    flat = out.reshape(-1, *shape[-2:])
    start = int(rng.integers(0, tokens))
    for n in range(len(flat)):
        head = source[n % layers, (n // layers) % heads]
        rows = (start + np.arange(shape[-2])) % tokens
        flat[n] = head[rows][:, np.arange(shape[-1]) % d]
    return out


KINDS: dict[str, Callable[[np.random.Generator, tuple[int, ...], str], np.ndarray]] = {
    "normal": _normal,
    "peaky": _peaky,
    "flat": _flat,
    "ties": _ties,
    "one-hot": _one_hot,
    "structured": _structured,
    "huge": _huge,
    "real": _real,
}


def make_values(
    kind: str, rng: np.random.Generator, shape: tuple[int, ...], role: str
) -> np.ndarray:
    """float64 data of a `kind` for an array that plays `role`."""
    return KINDS[kind](rng, shape, role)


def bad_integers(name: str, least: int = 1) -> tuple[tuple[str, str, Any], ...]:
    """For `Contract.bad_inputs`: values of `name` that are no integer of at least `least`."""
    wrong = (least - 1, 2.5, True)
    return tuple((f"{name} = {value}", name, lambda a, value=value: value) for value in wrong)


def longer(x: np.ndarray) -> np.ndarray:
    """x (..., tokens, d) with its last token twice."""
    return np.concatenate([x, x[..., -1:, :]], axis=-2)


def feed_tokens(
    whole: Mapping[str, Any], held: Any, first: int, last: int, *, state: str = "state"
) -> dict[str, Any]:
    """For `Stream.feed`: tokens [first, last) of q, k and v, after the `state` that is `held`."""
    tokens = {name: whole[name][..., first:last, :] for name in ("q", "k", "v")}
    return {**whole, **tokens, state: held}
