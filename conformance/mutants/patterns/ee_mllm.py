"""Wrong kernels of composite attention: two softmaxes, rows at wrong positions, restless images."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, altering, replacing, right, spoiling
from attnspec.reference.dense.attention import attend
from attnspec.reference.patterns import (
    ee_mllm,
    ee_mllm_attention,
    ee_mllm_gradient,
    ee_mllm_layers,
)

ALIGN = right("ee_mllm.aligner_update")
ATTEND = right("ee_mllm.composite_attention")
BACKWARD = ee_mllm_attention.composite_attention_backward
FLOPS = right("ee_mllm.flops")
LAYERS = right("ee_mllm.run_layers")
MASK = right("ee_mllm.composite_mask")
STEP = right("ee_mllm.layer_step")
ALIGN_BACK = ee_mllm_gradient.aligner_update_backward
PROJECT_BACK = ee_mllm_gradient.project_backward
STEP_BACK = ee_mllm_gradient.layer_step_backward
BLOCK = 8


def two_softmaxes(qt: Any, k: Any, v: Any, is_visual: Any, *rest: Any, **options: Any) -> Any:
    """Cross attention to images plus self attention to text, each normalised alone."""
    _, lse = ATTEND(qt, k, v, is_visual, *rest, **options)
    real = options.pop("key_mask", None)
    real = np.ones((len(k), k.shape[-2]), bool) if real is None else real
    parts = [
        ATTEND(qt, k, v, is_visual, *rest, key_mask=real & kind, **options)[0]
        for kind in (is_visual, ~is_visual)
    ]
    return parts[0] + parts[1], lse


def by_storage(arguments: dict[str, Any]) -> None:
    """The order in memory is taken for the order in the text."""
    arguments["pos"] = None


def top_left(is_visual: Any, positions: Any, image_visible: str = "causal") -> np.ndarray:
    """Row i of the queries sees the first i + 1 tokens, whichever token it belongs to."""
    mask = MASK(is_visual, positions, image_visible)
    text = np.flatnonzero(~is_visual)
    seen = np.zeros_like(mask)
    ranks = np.argsort(np.argsort(positions))
    seen[text] = ranks[None, :] <= np.arange(len(text))[:, None]
    return seen


def first_rows(qt: Any, k: Any, v: Any, is_visual: Any, *rest: Any, **options: Any) -> Any:
    """The queries are taken for those of the first text tokens, not of the last."""
    ATTEND(qt, k, v, is_visual, *rest, **options)
    text = np.flatnonzero(~is_visual)
    fewer = is_visual.copy()
    fewer[text[qt.shape[-2] :]] = True
    return ATTEND(qt, k, v, fewer, *rest, **options)


def images_in_order(arguments: dict[str, Any]) -> None:
    arguments["image_visible"] = "causal"


def rows_of_images(is_visual: Any, positions: Any, image_visible: str = "causal") -> np.ndarray:
    """An image token sees the text before it."""
    mask = MASK(is_visual, positions, image_visible)
    earlier = (positions[None, :] <= positions[:, None]) & ~is_visual[None, :]
    return mask | (earlier & is_visual[:, None])


def attend_with_nan(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    out, lse = attend(q, k, v, mask=mask, scale=scale)
    empty = np.isneginf(lse)[..., None]
    return np.where(empty, out.dtype.type(np.nan), out), lse


def leaks(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """Hidden values are multiplied by 0 instead of skipped."""
    out, lse = attend(q, k, v, mask=mask, scale=scale)
    return out + 0 * np.sum(v, axis=(-3, -2))[..., None, None, :], lse


def skip_tail(q: Any, k: Any, v: Any, *, mask: Any, scale: Any = None) -> Any:
    """Keys behind the last whole block are skipped."""
    whole = k.shape[-2] // BLOCK * BLOCK
    hidden = np.arange(k.shape[-2]) < (whole or k.shape[-2])
    return attend(q, k, v, mask=mask & hidden, scale=scale)


def first_padding(arguments: dict[str, Any]) -> None:
    mask = arguments["key_mask"]
    if mask is not None:
        arguments["key_mask"] = np.repeat(mask[:1], len(mask), axis=0)


def no_lse_gradient(arguments: dict[str, Any]) -> None:
    arguments["dlse"] = None


def no_values(Xv: Any, layer: Any, mode: str = "self") -> np.ndarray:
    """The attention output of an image token is 0, not its value."""
    return ALIGN(Xv, layer, "ffn" if mode == "self" else mode)


def tiled_values(Xv: Any, layer: Any, mode: str = "self") -> np.ndarray:
    """kv heads follow one another for the query heads, instead of staying with their group."""
    out = ALIGN(Xv, layer, mode)
    if mode != "self":
        return out
    h = ee_mllm_layers.normalise(Xv, layer.norm1, layer.eps)
    values = np.tile(h @ layer.Wv, layer.H // layer.Hk)
    return ee_mllm_layers.feed_forward(Xv + values @ layer.Wo, layer)


def without_second_norm(Xv: Any, layer: Any, mode: str = "self") -> np.ndarray:
    return ALIGN(Xv, layer._replace(norm2=np.ones_like(layer.norm2)), mode)


def renumbered(arguments: dict[str, Any]) -> None:
    """After the split each kind counts its own tokens, for the rotation and for the order."""
    arguments["pos_v"] = np.arange(len(arguments["pos_v"]))
    arguments["pos_t"] = len(arguments["pos_v"]) + np.arange(len(arguments["pos_t"]))


def aligned_first(Xt: Any, Xv: Any, layer: Any, pos_t: Any, pos_v: Any, mode: str = "self",
                  **options: Any) -> Any:  # fmt: skip
    """Text sees the image states that leave the layer, not those that come in."""
    _, images = STEP(Xt, Xv, layer, pos_t, pos_v, mode, **options)
    text, _ = STEP(Xt, images, layer, pos_t, pos_v, mode, **options)
    return text, images


def mixed_images(Xt: Any, Xv: Any, layer: Any, pos_t: Any, pos_v: Any, mode: str = "self",
                 **options: Any) -> Any:  # fmt: skip
    """Image tokens attend to one another."""
    text, images = STEP(Xt, Xv, layer, pos_t, pos_v, mode, **options)
    if mode != "self":
        return text, images
    return text, ee_mllm.dense_step(Xt, Xv, layer, pos_t, pos_v)[1]


def all_composite(arguments: dict[str, Any]) -> None:
    arguments["layers"] = None


def with_queries(Nt: int, Nv: int, D: int, F: int, layers: int) -> dict[str, int]:
    """Image tokens pay for a query projection."""
    cost = FLOPS(Nt, Nv, D, F, layers)
    return {**cost, "composite": cost["composite"] + 2 * layers * Nv * D * D}


def unseen_images(X: Any, layer: Any, positions: Any, dq: Any, dk: Any, dv: Any) -> Any:
    """Keys and values of images, which have no queries, are constants."""
    if dq is None:
        return np.zeros_like(X), ee_mllm_gradient.no_gradient(layer)
    return PROJECT_BACK(X, layer, positions, dq, dk, dv)


def text_alone(Xv: Any, layer: Any, dXv: Any, mode: str) -> Any:
    """Weights get no gradient from what becomes of the images."""
    return ALIGN_BACK(Xv, layer, dXv, mode)[0], ee_mllm_gradient.no_gradient(layer)


def constant_gain(result: Any) -> Any:
    """The gain of the first norm is a constant."""
    dXv, layer = result
    return dXv, layer._replace(norm1=np.zeros_like(layer.norm1))


def of(operation: str, name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return Mutant(f"ee_mllm.{name}", f"ee_mllm.{operation}", law, bug, call, **rest)


def mutant(name: str, law: str, bug: str, call: Any, **rest: Any) -> Mutant:
    return of("composite_attention", name, law, bug, call, **rest)


MUTANTS = (
    mutant("two-softmaxes", "agreement", "images and text are normalised apart", two_softmaxes),
    mutant("by-storage", "composite-storage", "positions are ignored",
           altering(ATTEND, by_storage)),
    mutant("top-left", "composite-future", "a row's number is its position",
           replacing(ATTEND, composite_mask=top_left)),
    mutant("first-rows", "agreement", "queries belong to the first text tokens", first_rows),
    mutant("images-in-order", "agreement", "all images are visible, but are not seen",
           altering(ATTEND, images_in_order)),
    mutant("empty-tile", "agreement", "a row that sees nothing is NaN",
           replacing(ATTEND, attend=attend_with_nan)),
    mutant("leak", "poison", "hidden values are multiplied by 0",
           replacing(ATTEND, attend=leaks)),
    mutant("skip-tail", "ragged", "keys after the last whole block are skipped",
           replacing(ATTEND, attend=skip_tail)),
    mutant("first-padding", "batch", "every entry of the batch uses the first one's padding",
           altering(ATTEND, first_padding)),
    mutant("no-dlse", "gradient", "the gradient through lse is dropped", ATTEND,
           backward=altering(BACKWARD, no_lse_gradient)),
    of("composite_mask", "images-see-text", "agreement", "image tokens see the text before them",
       rows_of_images),
    of("aligner_update", "no-values", "agreement", "the attention output of images is 0",
       no_values),
    of("aligner_update", "tiled-values", "agreement", "values are tiled over the query heads",
       tiled_values),
    of("aligner_update", "no-second-gain", "agreement", "the gain of the second norm is left out",
       without_second_norm),
    of("layer_step", "renumbered", "agreement", "positions are counted anew after the split",
       altering(STEP, renumbered)),
    of("layer_step", "aligned-first", "agreement", "text sees the images' new states",
       aligned_first),
    of("layer_step", "mixed-images", "images-alone", "image tokens attend to one another",
       mixed_images),
    of("aligner_update", "constant-gain", "gradient", "the first gain gets no gradient", ALIGN,
       backward=spoiling(ALIGN_BACK, constant_gain)),
    of("layer_step", "not-turned-back", "gradient", "gradients of keys keep their rotation", STEP,
       backward=replacing(STEP_BACK, rotate=lambda x, angles: x)),
    of("layer_step", "unseen-images", "gradient", "images' keys and values are constants", STEP,
       backward=replacing(STEP_BACK, project_backward=unseen_images)),
    of("layer_step", "text-alone", "gradient", "images give weights no gradient", STEP,
       backward=replacing(STEP_BACK, aligner_update_backward=text_alone)),
    of("run_layers", "all-composite", "agreement", "all layers are composite",
       altering(LAYERS, all_composite)),
    of("flops", "image-queries", "agreement", "image tokens pay for queries", with_queries),
)  # fmt: skip
