"""Composite attention against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns import ee_mllm
from attnspec.reference.patterns.ee_mllm import dense_step, layer_step, run_layers
from attnspec.reference.patterns.ee_mllm_attention import (
    composite_attention,
    composite_attention_backward,
    composite_mask,
)
from attnspec.reference.patterns.ee_mllm_layers import (
    Layer,
    aligner_update,
    feed_forward,
    flops,
    join_heads,
    normalise,
    project,
    split_heads,
)
from attnspec.reference.primitives.softmax import merge

TEXT = np.array([c == "t" for c in "ttvvvtvvtt"])


def tensors(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries of the five text tokens of `TEXT`, keys and values of all ten."""
    random = np.random.default_rng(seed)
    shapes = ((2, 4, 5, 4), (2, 2, 10, 4), (2, 2, 10, 3))
    q, k, v = (random.standard_normal(shape) for shape in shapes)
    return q, k, v


def make_layer(seed: int = 0, rope: float | None = 100.0) -> Layer:
    random = np.random.default_rng(seed)
    D, F, H, Hk, d, dv = 6, 7, 4, 2, 4, 3

    def weights(*shape: int) -> np.ndarray:
        return random.standard_normal(shape) / 2

    return Layer(
        1 + weights(D) / 4, weights(D, H * d), weights(D, Hk * d), weights(D, Hk * dv),
        weights(H * dv, D), 1 + weights(D) / 4, (weights(D, F), weights(D, F), weights(F, D)),
        H, Hk, rope,
    )  # fmt: skip


def states(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Xt, Xv and their positions; text stands before, between and after two images."""
    random = np.random.default_rng(seed)
    Xt, Xv = random.standard_normal((2, 4, 6)), random.standard_normal((2, 5, 6))
    return Xt, Xv, np.array([0, 4, 8, 9]), np.array([1, 2, 3, 6, 7])


@pytest.mark.parametrize("name", ["t5v12t6", "gqa_two_images"])
def test_text_and_image_rows_are_those_of_masked_attention(
    name: str, golden: Callable[[str], Any]
) -> None:
    case = golden(f"ee_mllm__{name}")
    visual, text = case["is_visual"], np.flatnonzero(~case["is_visual"])
    np.testing.assert_array_equal(composite_mask(visual, np.arange(23)), case["allowed"])
    out, lse = composite_attention(case["q"][:, :, text], case["k"], case["v"], visual)
    np.testing.assert_allclose(out, case["out"][:, :, text], atol=1e-10)
    np.testing.assert_allclose(lse, case["lse"][:, :, text], atol=1e-10)
    # Image rows of the dense form are the values themselves: one key of weight 1.
    images = case["out"][:, :, visual]
    values = np.repeat(case["v"], images.shape[1] // case["v"].shape[1], axis=1)
    np.testing.assert_allclose(images, values[:, :, visual], atol=1e-12)


@pytest.mark.parametrize("image_visible", ["causal", "all"])
def test_it_is_dense_attention_with_the_mask(image_visible: str) -> None:
    q, k, v = tensors()
    pos = np.array([3, 9, 4, 1, 7, 0, 2, 11, 5, 20])
    mask = composite_mask(~TEXT, pos, image_visible)[TEXT]
    for got, expected in zip(
        composite_attention(q, k, v, ~TEXT, pos, image_visible),
        dense.attend(q, k, v, mask=mask),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)
    seen = pos[None, :] <= pos[TEXT][:, None]
    if image_visible == "all":
        seen |= ~TEXT
    np.testing.assert_array_equal(mask, seen)


def test_without_images_it_is_causal_attention() -> None:
    _, k, v = tensors()
    q = np.random.default_rng(1).standard_normal((2, 4, 10, 4))
    for got, expected in zip(
        composite_attention(q, k, v, np.zeros(10, bool)),
        dense.attend(q, k, v, causal=True),
        strict=True,
    ):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_of_image_tokens_alone_the_dense_form_returns_the_values() -> None:
    _, k, v = tensors()
    q = np.random.default_rng(1).standard_normal((2, 4, 10, 4))
    out, _ = dense.attend(q, k, v, mask=composite_mask(np.ones(10, bool), np.arange(10)))
    np.testing.assert_array_equal(out, np.repeat(v, 2, axis=1))


def test_text_depends_on_images_by_their_keys_and_values_only() -> None:
    Xt, Xv, pos_t, pos_v = states()
    layer = make_layer()
    blind = layer._replace(Wk=0 * layer.Wk, Wv=0 * layer.Wv)
    for weights, same in ((blind, True), (layer, False)):
        before, after = (layer_step(Xt, X, weights, pos_t, pos_v)[0] for X in (Xv, 3 - Xv))
        assert np.array_equal(before, after) is same


def test_without_text_there_is_no_attention() -> None:
    q, k, v = tensors()
    out, lse = composite_attention(q[:, :, :0], k, v, np.ones(10, bool))
    assert out.shape == (2, 4, 0, 3)
    assert lse.shape == (2, 4, 0)
    layer = make_layer()
    Xt, Xv, _, pos_v = states()
    Xt, moved = layer_step(Xt[:, :0], Xv, layer, np.arange(0), pos_v)
    assert Xt.shape == (2, 0, 6)
    np.testing.assert_array_equal(moved, aligner_update(Xv, layer))


def test_the_first_text_token_sees_itself_alone() -> None:
    q, k, v = tensors()
    out, _ = composite_attention(q, k, v, ~TEXT)
    np.testing.assert_array_equal(out[:, :, 0], np.repeat(v[:, :, 0], 2, axis=1))


def test_storage_order_does_not_matter() -> None:
    q, k, v = tensors()
    pos = np.arange(10) * 3
    before, _ = composite_attention(q, k, v, ~TEXT, pos)
    images = np.flatnonzero(~TEXT)
    order = np.arange(10)
    order[images] = np.random.default_rng(2).permutation(images)
    after, _ = composite_attention(q, k[:, :, order], v[:, :, order], ~TEXT, pos[order])
    np.testing.assert_allclose(after, before, atol=1e-12)


def test_later_tokens_have_no_influence() -> None:
    q, k, v = tensors()
    before, _ = composite_attention(q, k, v, ~TEXT)
    for x in (k, v):
        x[:, :, 6:] *= -3
    after, _ = composite_attention(q, k, v, ~TEXT)
    np.testing.assert_array_equal(after[:, :, :3], before[:, :, :3])
    assert np.all(np.any(after[:, :, 3:] != before[:, :, 3:], axis=-1))


def test_decoding_is_prefill() -> None:
    q, k, v = tensors()
    out, lse = composite_attention(q, k, v, ~TEXT)
    for row, token in enumerate(np.flatnonzero(TEXT)):
        seen = slice(0, token + 1)
        got, logs = composite_attention(
            q[:, :, row : row + 1], k[:, :, seen], v[:, :, seen], ~TEXT[seen]
        )
        np.testing.assert_allclose(got[:, :, 0], out[:, :, row], atol=1e-12)
        np.testing.assert_allclose(logs[:, :, 0], lse[:, :, row], atol=1e-12)


def test_one_softmax_is_the_merge_of_images_and_text() -> None:
    q, k, v = tensors()
    parts = [
        composite_attention(q, k, v, ~TEXT, key_mask=np.stack([kind] * 2)) for kind in (TEXT, ~TEXT)
    ]
    merged = merge(*parts[0], *parts[1])
    for got, expected in zip(merged, composite_attention(q, k, v, ~TEXT), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_rows_that_see_nothing_are_zero_and_garbage_is_not_read() -> None:
    q, k, v = tensors()
    mask = np.ones((2, 10), bool)
    mask[1, :5] = False
    k[1, :, :5], v[1, :, :5] = np.nan, np.nan
    out, lse = composite_attention(q, k, v, ~TEXT, key_mask=mask)
    assert np.all(np.isfinite(out))
    assert np.all(out[1, :, :2] == 0)
    assert np.all(np.isneginf(lse[1, :, :2]))


def test_gradients_are_finite_differences_and_images_have_theirs() -> None:
    inputs = list(tensors())
    random = np.random.default_rng(3)
    dout, dlse = random.standard_normal((2, 4, 5, 3)), random.standard_normal((2, 4, 5))

    def loss(*x: np.ndarray) -> float:
        out, lse = composite_attention(*x, ~TEXT)
        return float(np.sum(dout * out) + np.sum(dlse * lse))

    gradients = composite_attention_backward(*inputs, ~TEXT, dout, dlse)
    assert np.all(np.any(gradients[1][:, :, ~TEXT] != 0, axis=-1))
    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(gradient.shape)
        sides = [
            loss(*(x + s * 1e-6 * direction if i == n else x for i, x in enumerate(inputs)))
            for s in (1, -1)
        ]
        np.testing.assert_allclose(
            np.sum(gradient * direction), (sides[0] - sides[1]) / 2e-6, atol=1e-6
        )


def test_a_layer_is_causal_attention_with_the_dense_mask() -> None:
    """In mode `self` both kinds of state are those of one masked pass over all tokens."""
    layer = make_layer()
    Xt, Xv, pos_t, pos_v = states()
    X, pos = np.concatenate([Xv, Xt], axis=1), np.concatenate([pos_v, pos_t])
    q, k, v = project(X, layer, pos)
    out, _ = dense.attend(q, k, v, mask=composite_mask(np.arange(9) < 5, pos))
    expected = feed_forward(X + join_heads(out) @ layer.Wo, layer)
    text, images = layer_step(Xt, Xv, layer, pos_t, pos_v)
    np.testing.assert_allclose(text, expected[:, 5:], atol=1e-12)
    np.testing.assert_allclose(images, expected[:, :5], atol=1e-12)


def test_modes_of_the_aligner() -> None:
    layer = make_layer()
    _, Xv, _, _ = states()
    np.testing.assert_array_equal(aligner_update(Xv, layer, "frozen"), Xv)
    np.testing.assert_array_equal(aligner_update(Xv, layer, "ffn"), feed_forward(Xv, layer))
    values = split_heads(normalise(Xv, layer.norm1, layer.eps) @ layer.Wv, 2)
    every = np.stack([values[:, h // 2] for h in range(4)], axis=1)
    expected = feed_forward(Xv + join_heads(every) @ layer.Wo, layer)
    np.testing.assert_allclose(aligner_update(Xv, layer), expected, atol=1e-12)


def test_image_states_are_a_function_of_the_image_alone() -> None:
    """In all layers; so their keys and values can be kept, for the same positions."""
    stack = [make_layer(seed) for seed in range(3)]
    Xt, Xv, pos_t, pos_v = states()
    _, before = run_layers(Xt, Xv, stack, pos_t, pos_v)
    _, after = run_layers(2 - Xt[:, :3], Xv, stack, pos_t[:3], pos_v)
    np.testing.assert_array_equal(after, before)
    Xv[:, 2] += 1
    _, changed = run_layers(Xt, Xv, stack, pos_t, pos_v)
    np.testing.assert_array_equal(np.any(changed != before, axis=(0, 2)), np.arange(5) == 2)
    # Keys and values kept from one prompt are those of another one, rotation included.
    prompts = [(Xt, Xv), (2 - Xt, Xv)]
    for layer in stack:
        kept, again = (project(images, layer, pos_v)[1:] for _, images in prompts)
        for x, y in zip(kept, again, strict=True):
            np.testing.assert_array_equal(x, y)
        prompts = [layer_step(*prompt, layer, pos_t, pos_v) for prompt in prompts]
    # Dense layers mix them.
    _, first = run_layers(Xt, Xv, stack, pos_t, pos_v, layers=())
    _, second = run_layers(2 * Xt, Xv, stack, pos_t, pos_v, layers=())
    assert np.any(first != second)


def test_composite_layers_are_those_that_are_named() -> None:
    stack = [make_layer(seed) for seed in range(2)]
    Xt, Xv, pos_t, pos_v = states()
    got = run_layers(Xt, Xv, stack, pos_t, pos_v, layers=(1,))
    middle = dense_step(Xt, Xv, stack[0], pos_t, pos_v)
    for x, expected in zip(got, layer_step(*middle, stack[1], pos_t, pos_v), strict=True):
        np.testing.assert_array_equal(x, expected)


def test_cost_counts_what_is_visible() -> None:
    Nt, Nv, D, F = 7, 12, 16, 40
    visible = composite_mask(np.arange(19) < Nv, np.arange(19))[Nv:].sum()
    assert visible == Nt * Nv + Nt * (Nt + 1) // 2
    cost = flops(Nt, Nv, D, F, 3)
    projections = Nt * (8 * D**2 + 6 * D * F) + Nv * (6 * D**2 + 6 * D * F)
    assert cost["composite"] == 3 * (projections + 4 * D * visible)
    dense_pairs = 19 * 20 // 2
    assert cost["dense"] == 3 * (19 * (8 * D**2 + 6 * D * F) + 4 * D * dense_pairs)
    assert flops(5, 0, D, F, 1)["dense"] == flops(5, 0, D, F, 1)["composite"]


def test_leading_axes_are_free_and_float32_stays() -> None:
    q, k, v = (x.astype(np.float32) for x in tensors())
    out, lse = composite_attention(q, k, v, ~TEXT)
    assert out.dtype == lse.dtype == np.float32
    np.testing.assert_array_equal(composite_attention(q[0], k[0], v[0], ~TEXT)[0], out[0])
    single = make_layer()
    narrow = single._replace(
        **{n: getattr(single, n).astype(np.float32)
           for n in ("norm1", "norm2", "Wq", "Wk", "Wv", "Wo")},
        ffn=tuple(w.astype(np.float32) for w in single.ffn),
    )  # fmt: skip
    Xt, Xv, pos_t, pos_v = states()
    text, images = layer_step(Xt.astype(np.float32), Xv.astype(np.float32), narrow, pos_t, pos_v)
    assert text.dtype == images.dtype == np.float32
    alone = layer_step(Xt[0], Xv[0], single, pos_t, pos_v)
    np.testing.assert_allclose(alone[0], layer_step(Xt, Xv, single, pos_t, pos_v)[0][0])


Q, K, V = tensors()
LAYER = make_layer()
XT, XV, POS_T, POS_V = states()
KINDS = ~TEXT
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (composite_mask, (KINDS * 1, np.arange(10)), {}, TypeError, "is_visual"),
    (composite_mask, (KINDS, np.arange(9)), {}, ValueError, "positions"),
    (composite_mask, (KINDS, np.zeros(10, int)), {}, ValueError, "positions"),
    (composite_mask, (KINDS, np.arange(10.0)), {}, TypeError, "positions"),
    (composite_mask, (KINDS, np.arange(10), "none"), {}, ValueError, "image_visible"),
    (composite_mask, (KINDS[None], np.arange(10)), {}, ValueError, "is_visual"),
    (composite_attention, (None, K, V, KINDS), {}, TypeError, "qt"),
    (composite_attention, (Q.repeat(2, axis=2), K, V, KINDS), {}, ValueError, "qt"),
    (composite_attention, (Q, K, V, KINDS[:9]), {}, ValueError, "is_visual"),
    (composite_attention, (Q, K, V, KINDS, np.arange(9)), {}, ValueError, "pos"),
    (composite_attention, (Q, K, V, KINDS), {"key_mask": np.ones((2, 10))}, TypeError, "key_mask"),
    (composite_attention, (Q, K, V, KINDS), {"key_mask": KINDS}, ValueError, "key_mask"),
    (composite_attention, (Q, K[:, :, :9], V, KINDS), {}, ValueError, "v"),
    (aligner_update, (None, LAYER), {}, TypeError, "Xv"),
    (aligner_update, (XV, LAYER, "none"), {}, ValueError, "mode"),
    (aligner_update, (XV, LAYER._replace(Wo=LAYER.Wq)), {}, ValueError, "layer"),
    (aligner_update, (XV, LAYER._replace(Hk=3)), {}, ValueError, "layer"),
    (aligner_update, (XV.astype(np.float32), LAYER), {}, TypeError, "Xv"),
    (layer_step, (XT, XV[:1], LAYER, POS_T, POS_V), {}, ValueError, "Xv"),
    (layer_step, (XT, XV, LAYER, POS_T[:2], POS_V), {}, ValueError, "pos_t"),
    (layer_step, (XT, XV, LAYER, POS_T, POS_V * 1.0), {}, TypeError, "pos_v"),
    (layer_step, (XT, XV, LAYER, POS_T, POS_V - 1), {}, ValueError, "pos_t"),
    (layer_step, (XT, XV, LAYER._replace(H=12, Hk=2), POS_T, POS_V), {}, ValueError, "layer"),
    (run_layers, (XT, XV, [LAYER], POS_T, POS_V, [1]), {}, ValueError, "layers"),
    (run_layers, (XT, XV, [LAYER], POS_T, POS_V, [0.5]), {}, TypeError, "layers"),
    (run_layers, (XT, XV, [LAYER], POS_T, POS_V, []), {"mode": "none"}, ValueError, "mode"),
    (
        run_layers,
        (XT, XV, [LAYER], POS_T, POS_V, []),
        {"image_visible": 1},
        ValueError,
        "image_visible",
    ),
    (run_layers, (XT, XV, [LAYER, LAYER._replace(Hk=3)], POS_T, POS_V), {}, ValueError, "layer"),
    (aligner_update, (XV, None), {}, TypeError, "layer"),
    (aligner_update, (XV, LAYER._replace(ffn=LAYER.ffn[:2])), {}, TypeError, "layer"),
    (aligner_update, (XV, LAYER._replace(rope=0.0)), {}, ValueError, "layer"),
    (aligner_update, (XV, LAYER._replace(eps="small")), {}, ValueError, "layer"),
    (flops, (-1, 1, 1, 1, 1), {}, ValueError, "Nt"),
    (flops, (1, 1, 0, 1, 1), {}, ValueError, "D"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)


def test_odd_head_sizes_have_no_rotation() -> None:
    odd = LAYER._replace(Wq=LAYER.Wq[:, :12], Wk=LAYER.Wk[:, :6])
    with pytest.raises(ValueError, match=r"^layer: got head size 3"):
        aligner_update(XV, odd)
    assert aligner_update(XV, odd._replace(rope=None)).shape == XV.shape


def test_inputs_stay_as_they_are() -> None:
    inputs = [*tensors(), *states()]
    copies = [x.copy() for x in inputs]
    composite_attention_backward(*inputs[:3], ~TEXT, np.ones((2, 4, 5, 3)))
    layer_step(inputs[3], inputs[4], LAYER, inputs[5], inputs[6])
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    assert ee_mllm.MECHANISM.slug == "ee_mllm"
