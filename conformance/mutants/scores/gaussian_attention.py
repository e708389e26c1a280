"""Wrong kernels of Gaussian attention: other statistics, other products, other sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.scores import gaussian_attention as chapter

LAYER = right("gaussian_attention.multi_head")
BACKWARD = chapter.multi_head_backward
BLOCK = right("gaussian_attention.block")
BLOCK_BACKWARD = chapter.block_backward
CHUNKS = right("gaussian_attention.split_chunks")
STATS = right("gaussian_attention.axis_stats")
DENSITY = right("gaussian_attention.log_density")
NORMALISE = right("gaussian_attention.normalise")
APPLY = right("gaussian_attention.apply")
COLLAPSE = right("gaussian_attention.collapse")
IMPORTANCE = right("gaussian_attention.importance_factor")


def biased(z: Any, mask: Any = None, eps: float = 1e-8, axis: int = -1, **rest: Any) -> Any:
    """The variance is divided by l."""
    mu, var = STATS(z, mask, eps, axis, **rest)
    entries = z.shape[axis]
    return mu, (var - eps) * (entries - 1) / entries + eps


def eps_twice(z: Any, mask: Any = None, eps: float = 1e-8, axis: int = -1, **rest: Any) -> Any:
    mu, var = STATS(z, mask, eps, axis, **rest)
    return mu, var + eps


def difference_of_squares(
    z: Any, mask: Any = None, eps: float = 1e-8, axis: int = -1, **rest: Any
) -> Any:
    """The variance is the mean square less the squared mean."""
    if mask is not None:
        return STATS(z, mask, eps, axis, **rest)
    entries = z.shape[axis]
    mu = np.mean(z, axis=axis, keepdims=True)
    square = np.mean(z**2, axis=axis, keepdims=True)
    return mu, np.maximum(square - mu**2, 0) * (entries / (entries - 1)) + eps


def drop_padding(arguments: dict[str, Any]) -> None:
    """Padding is left out of the statistics without being asked."""
    arguments["exact_mask"] = True


def keep_padding(arguments: dict[str, Any]) -> None:
    arguments["exact_mask"] = False


def masked_entries(
    x: Any, axis: int, params: Any, mask: Any = None, *rest: Any, **more: Any
) -> Any:
    """Padded entries are weighed as zeros, not as what they are."""
    if mask is None or more.get("exact_mask"):
        return LAYER(x, axis, params, mask, *rest, **more)
    out, w = LAYER(np.where(mask, x, np.zeros_like(x)), axis, params, mask, *rest, **more)
    return np.where(mask, out, x), w


def other_combination(arguments: dict[str, Any]) -> None:
    """The mixture that the paper speaks of, or the product where the mixture is asked for."""
    arguments["combine"] = "sum" if arguments["combine"] == "product" else "product"


def in_logs(arguments: dict[str, Any]) -> None:
    """A softmax in log space, which needs no clamp."""
    arguments["clamp"] = "none"


def underflowing(logw: Any, eps: float, axis: int, clamp: str, mask: Any = None) -> Any:
    """The densities are multiplied in float32 and may all be 0 before they are summed."""
    if mask is not None:
        logw = np.where(mask, logw, np.full_like(logw, -np.inf))
    raw = np.exp(logw)
    total = np.sum(raw, axis=axis, keepdims=True)
    least = eps if clamp == "source" else float(np.finfo(np.float32).tiny)
    return raw / np.maximum(total, least)


def dropped(n: int, h: int) -> list[tuple[int, int]]:
    """The remainder belongs to no head."""
    return [(head * (n // h), (head + 1) * (n // h)) for head in range(h)]


def spread(n: int, h: int) -> list[tuple[int, int]]:
    """The remainder is spread over the first heads, as an array split does."""
    sizes = [n // h + (head < n % h) for head in range(h)]
    stops = np.cumsum(sizes).tolist()
    return [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def from_the_front(arguments: dict[str, Any]) -> None:
    """A negative axis is counted from the front."""
    if arguments["axis"] < 0:
        arguments["axis"] = -arguments["axis"]


def over_features(z: Any, w: Any, mask: Any = None) -> Any:
    """The weights are divided by their sum along the last axis."""
    total = np.sum(w, axis=-1, keepdims=True)
    return APPLY(z, w / np.where(total == 0, 1, total).astype(w.dtype), mask)


def plain_offset(z: Any, mu: Any, var: Any, delta: Any, c: Any, **rest: Any) -> Any:
    """The offset is not divided by the standard deviation."""
    y = ((z - mu) / np.sqrt(var))[..., None] - delta
    logs = -(y**2) / (2 * c**2) - np.log(2 * np.pi * c**2) / 2
    return _joined(logs, **rest)


def linear_width(z: Any, mu: Any, var: Any, delta: Any, c: Any, **rest: Any) -> Any:
    """The exponent is divided by |c|."""
    y = ((z - mu)[..., None] - delta) / np.sqrt(var)[..., None]
    logs = -(y**2) / (2 * np.abs(c)) - np.log(2 * np.pi * c**2) / 2
    return _joined(logs, **rest)


def without_constants(z: Any, mu: Any, var: Any, delta: Any, c: Any, **rest: Any) -> Any:
    y = ((z - mu)[..., None] - delta) / np.sqrt(var)[..., None]
    return _joined(-(y**2) / (2 * c**2), **rest)


def _joined(logs: Any, combine: str = "product") -> Any:
    if combine == "product":
        return np.sum(logs, axis=-1)
    top = np.max(logs, axis=-1, keepdims=True)
    return top[..., 0] + np.log(np.mean(np.exp(logs - top), axis=-1))


def padding_to_zero(z: Any, w: Any, mask: Any = None) -> Any:
    return z * w if mask is None else np.where(mask, z * w, np.zeros_like(z))


def multiplied(z: Any, w: Any, mask: Any = None) -> Any:
    """The mask multiplies what it hides."""
    return z * w if mask is None else z * w * mask + z * (1 - mask).astype(z.dtype)


def no_residual(x: Any, layers: Any, padding_value: Any = None, **rest: Any) -> Any:
    weights = []
    for axis, params in layers:
        mask = None if padding_value is None else x != padding_value
        x, w = LAYER(x, axis, params, mask, **rest)
        weights.append(w)
    return x, tuple(weights)


def no_padding(arguments: dict[str, Any]) -> None:
    arguments["padding_value"] = None


def same_axis(arguments: dict[str, Any]) -> None:
    """Every layer works along the first one's axis, if its heads fit there."""
    x, layers = arguments["x"], arguments["layers"]
    axis = layers[0][0]
    if all(x.shape[axis] // len(params[0]) >= 2 for _, params in layers):
        arguments["layers"] = tuple((axis, params) for _, params in layers)


def read_padding(z: Any, mask: Any = None, *rest: Any, **more: Any) -> Any:
    """Padding is multiplied by 0."""
    return STATS(z, mask, *rest, **more) if mask is None else _zeroed(z, mask, *rest, **more)


def _zeroed(z: Any, mask: Any, eps: float = 1e-8, axis: int = -1, exact_mask: bool = False) -> Any:
    entries = np.sum(mask, axis=axis, keepdims=True) if exact_mask else z.shape[axis]
    z0 = z * mask
    mu = np.sum(z0, axis=axis, keepdims=True) / np.maximum(entries, 1)
    away = (z0 - mu) * (mask if exact_mask else 1)
    var = np.sum(away**2, axis=axis, keepdims=True) / np.maximum(np.asarray(entries) - 1, 1) + eps
    return mu.astype(z.dtype), var.astype(z.dtype)


def constant_statistics(x: Any, axis: int, params: Any, dout: Any, *rest: Any, **more: Any) -> Any:
    """Mean and variance are taken for constants: the gradient keeps only the direct path."""
    dx, gaussians = BACKWARD(x, axis, params, dout, *rest, **more)
    return dx - np.mean(dx, axis=axis, keepdims=True), gaussians


def even(result: Any) -> Any:
    """dc has lost the sign of c."""
    dx, (ddelta, dc) = result
    return dx, (ddelta, np.abs(dc))


def no_dw(arguments: dict[str, Any]) -> None:
    arguments["dw"] = None


def through_the_sum(arguments: dict[str, Any]) -> None:
    """The gradient of a sum that the clamp has replaced."""
    arguments["clamp"] = "none"


def forget_residual(x: Any, layers: Any, dout: Any, *rest: Any, **more: Any) -> Any:
    return BLOCK_BACKWARD(x, layers, dout, *rest, **more) - dout


def step(name: str, law: str, bug: str, function: Any, call: Any, **rest: Any) -> Mutant:
    operation = f"gaussian_attention.{function.__name__}"
    return Mutant(f"gaussian_attention.{name}", operation, law, bug, call, **rest)


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return step(name, law, bug, LAYER, call, **rest)


MUTANTS = (
    mutant("biased", "agreement", "the variance is divided by l",
           replacing(LAYER, axis_stats=biased)),
    mutant("eps-twice", "agreement", "eps is added to the variance twice",
           replacing(LAYER, axis_stats=eps_twice)),
    mutant("padding-dropped", "agreement", "padding does not count in the statistics",
           altering(LAYER, drop_padding)),
    mutant("padding-as-zeros", "agreement", "padded entries are weighed as zeros", masked_entries),
    mutant("exact-ignored", "exact-padding", "padding counts although it is to be left out",
           altering(LAYER, keep_padding)),
    mutant("combination", "agreement", "densities are added where they are to be multiplied",
           altering(LAYER, other_combination)),
    mutant("log-space", "agreement", "a softmax in log space is never clamped",
           altering(LAYER, in_logs)),
    mutant("underflow", "agreement", "raw densities underflow before they are summed",
           replacing(LAYER, normalise=underflowing)),
    mutant("spread", "agreement", "the remainder is spread over the heads",
           replacing(LAYER, split_chunks=spread)),
    mutant("wrong-sum", "agreement", "weights are normalised along the last axis",
           replacing(LAYER, apply=over_features)),
    mutant("negative-axis", "agreement", "a negative axis is counted from the front",
           altering(LAYER, from_the_front)),
    mutant("plain-offset", "agreement", "offsets are not in units of the entries",
           replacing(LAYER, log_density=plain_offset)),
    mutant("constants", "agreement", "the constants of the densities are left out of the clamp",
           replacing(LAYER, log_density=without_constants)),
    mutant("constant-statistics", "gradient", "no gradient flows through mean and variance",
           LAYER, backward=constant_statistics),
    mutant("even-width", "gradient", "the gradient of a width has lost its sign", LAYER,
           backward=spoiling(BACKWARD, even)),
    mutant("no-dw", "gradient", "the gradient through the weights is dropped", LAYER,
           backward=altering(BACKWARD, no_dw)),
    mutant("clamped-gradient", "gradient", "the clamped sum gets a gradient", LAYER,
           backward=altering(BACKWARD, through_the_sum)),
    step("no-residual", "agreement", "the input is not added", BLOCK, no_residual),
    step("no-padding", "agreement", "the padding value is not looked for", BLOCK,
         altering(BLOCK, no_padding)),
    step("same-axis", "agreement", "every layer works along the first one's axis", BLOCK,
         altering(BLOCK, same_axis)),
    step("block-gradient", "gradient", "the residual has no gradient", BLOCK, BLOCK,
         backward=forget_residual),
    step("chunks-dropped", "agreement", "the remainder belongs to no head", CHUNKS, dropped),
    step("chunks-spread", "agreement", "the remainder is spread", CHUNKS, spread),
    step("cancelling", "agreement", "the variance is a difference of large squares", STATS,
         difference_of_squares, settings={"dtypes": ("float32",)}),
    step("stats-read", "poison", "padding is multiplied by 0", STATS, read_padding),
    step("linear-width", "agreement", "the exponent is divided by |c|", DENSITY, linear_width),
    step("no-clamp", "agreement", "the sum is not clamped", NORMALISE,
         altering(NORMALISE, in_logs)),
    step("padding-cleared", "agreement", "padded entries are set to 0", APPLY, padding_to_zero),
    step("padding-multiplied", "poison", "hidden weights are multiplied by 0", APPLY, multiplied),
    step("mean-of-offsets", "agreement", "the centre is the plain mean of the offsets", COLLAPSE,
         lambda delta, c: (delta.mean(-1), COLLAPSE(delta, c)[1])),
    step("from-zero", "agreement", "the least importance is not subtracted", IMPORTANCE,
         lambda w, axes: w.mean(axes) / w.mean(axes).max()),
)  # fmt: skip
