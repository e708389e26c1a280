"""LongLoRA against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns import longlora
from attnspec.reference.patterns.longlora import (
    grouped_attend,
    grouped_attend_backward,
    s2_backward,
)
from attnspec.reference.patterns.longlora_groups import (
    choose_group_size,
    group_starts,
    s2_mask,
    shift_heads,
)
from attnspec.reference.patterns.longlora_tuning import (
    embedding_backward,
    interpolate_positions,
    interpolation_factor,
    is_trained,
    lora_backward,
    lora_forward,
    lora_merge,
    rmsnorm,
    rmsnorm_backward,
)
from tests.differences import differences

quick = settings(max_examples=20, deadline=None, derandomize=True)
VARIANTS = ("segments", "roll")


def tensors(
    T: int = 16, H: int = 4, Hk: int = 2, batch: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = ((batch, H, T, 4), (batch, Hk, T, 4), (batch, Hk, T, 3))
    q, k, v = (random.standard_normal(shape) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_is_that_of_the_authors(golden: Callable[[str], Any], variant: str) -> None:
    case = golden(f"longlora__{variant}_mha")
    q, k, v = (case[name] for name in ("q", "k", "v"))
    G, atol = case["meta"]["params"]["group_size"], case["meta"]["tolerance"]
    assert choose_group_size(q.shape[-2], case["meta"]["params"]["group_size_ratio"]) == G
    out, lse = grouped_attend(q, k, v, G, variant)
    np.testing.assert_allclose(out, case["out"], atol=atol)
    gradients = s2_backward(q, k, v, out, lse, case["dout"], G, variant)
    for got, name in zip(gradients, ("dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(got, case[name], atol=atol)


def test_training_is_that_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("longlora__lora_plus")
    W, A, B, w, ids = (case[name] for name in ("W", "A", "B", "norm_weight", "ids"))
    alpha, eps = (case["meta"]["params"][name] for name in ("lora_alpha", "rms_eps"))
    x = case["embed"][ids]
    h = rmsnorm(x, w, eps)
    y = lora_forward(h, W, A, B, alpha)
    np.testing.assert_allclose(y @ case["mlp"].T, case["out"], atol=1e-12)
    dh, dA, dB = lora_backward(h, W, A, B, alpha, case["dout"] @ case["mlp"])
    dx, dw = rmsnorm_backward(x, w, dh, eps)
    dE = embedding_backward(ids, dx, len(case["embed"]))
    for got, name in ((dA, "dA"), (dB, "dB"), (dw, "d_norm"), (dE, "d_embed")):
        np.testing.assert_allclose(got, case[name], atol=1e-12)
    np.testing.assert_allclose(lora_merge(W, A, B, alpha), case["W_merged"], atol=1e-12)
    names = ("embed_tokens.weight", "input_layernorm.weight", "q_proj.lora_A.default.weight",
             "q_proj.lora_B.default.weight", "q_proj.base_layer.weight", "mlp.weight",
             "lm_head.weight")  # fmt: skip
    trained = [f"base_model.model.{name}" for name in names if is_trained(name)]
    assert trained == case["meta"]["trainable"]
    assert not is_trained("input_layernorm.weight", "embed")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("variant", "T", "G"),
    [("segments", 16, 4), ("segments", 13, 4), ("segments", 7, 3), ("segments", 5, 1),
     ("segments", 3, 8), ("roll", 16, 4), ("roll", 12, 6), ("roll", 4, 4)],
)  # fmt: skip
def test_groups_are_dense_attention_with_the_mask(
    variant: str, T: int, G: int, causal: bool
) -> None:
    q, k, v = tensors(T, 6, 3)
    mask = s2_mask(T, G, 6, variant, causal)
    expected = dense.attend(q, k, v, mask=mask)
    for got, want in zip(grouped_attend(q, k, v, G, variant, None, causal), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    random = np.random.default_rng(1)
    dout, dlse = random.standard_normal((2, 6, T, 3)), random.standard_normal((2, 6, T))
    for got, want in zip(
        grouped_attend_backward(q, k, v, G, variant, None, causal, dout=dout, dlse=dlse),
        dense.attend_backward(q, k, v, dout, dlse, mask=mask),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-12)


@quick
@given(T=st.integers(0, 40), G=st.integers(1, 12), H=st.integers(1, 5))
def test_starts_and_mask_agree(T: int, G: int, H: int) -> None:
    mask = s2_mask(T, G, H, causal=False)
    for h in range(H):
        starts = group_starts(T, G, h >= H // 2)
        assert np.all(np.diff(starts) > 0)
        segment = np.searchsorted(starts, np.arange(T), side="right")
        np.testing.assert_array_equal(mask[h], segment[:, None] == segment)


@pytest.mark.parametrize(("T", "G"), [(16, 4), (32, 8), (24, 2)])
def test_how_many_pairs_are_attended(T: int, G: int) -> None:
    plain, shifted = s2_mask(T, G, 2).sum(axis=(1, 2))
    g = G // 2
    assert plain == T * (G + 1) / 2
    assert shifted == (T - G) * (G + 1) / 2 + g * (g + 1)


def test_segments_never_look_ahead() -> None:
    q, k, v = tensors()
    before = grouped_attend(q, k, v, 4)[0]
    for t in range(15):
        later = [x.copy() for x in (q, k, v)]
        for x in later:
            x[..., t + 1 :, :] *= -2.0
        np.testing.assert_array_equal(
            grouped_attend(*later, 4)[0][..., : t + 1, :], before[..., : t + 1, :]
        )


def test_the_roll_lets_the_first_tokens_see_the_last() -> None:
    q, k, v = tensors()
    G, g, T = 4, 2, 16
    before = grouped_attend(q, k, v, G, "roll")[0]
    for t in range(T - 1):
        changed = v.copy()
        changed[..., t + 1 :, :] += 1.0
        moved = np.abs(grouped_attend(q, k, changed, G, "roll")[0] - before).max(axis=(0, 3)) > 0
        assert not moved[:2, : t + 1].any()
        assert not moved[2:, g : t + 1].any()
        assert moved[2:, : min(t + 1, g)].all()


def test_without_the_order_a_roll_joins_both_ends_of_the_text() -> None:
    T, G, g = 16, 4, 2
    cut, rolled = (s2_mask(T, G, 2, variant, causal=False)[1] for variant in VARIANTS)
    ends = np.minimum(np.arange(T), T - 1 - np.arange(T)) < g
    np.testing.assert_array_equal(rolled, np.where(ends[:, None] & ends, True, cut))


def test_variants_differ_in_the_first_rows_of_shifted_heads_only() -> None:
    q, k, v = tensors()
    cut, rolled = (grouped_attend(q, k, v, 4, variant)[0] for variant in VARIANTS)
    np.testing.assert_allclose(cut[:, :2], rolled[:, :2], atol=1e-12)
    np.testing.assert_allclose(cut[:, 2:, 2:], rolled[:, 2:, 2:], atol=1e-12)
    assert np.all(np.abs(cut - rolled)[:, 2:, :2].max(axis=-1) > 1e-6)


@pytest.mark.parametrize("G", [16, 20, 32, 40])
def test_what_is_dense_attention(G: int) -> None:
    q, k, v = tensors()
    got, expected = grouped_attend(q, k, v, G)[0], dense.attend(q, k, v, causal=True)[0]
    heads = slice(None) if G >= 32 else slice(0, 2)
    np.testing.assert_allclose(got[:, heads], expected[:, heads], atol=1e-12)


def test_a_roll_is_undone() -> None:
    x = tensors()[0]
    rolled = shift_heads(x, 4, -1)
    np.testing.assert_array_equal(rolled[:, 2, 0], x[:, 2, 2])
    np.testing.assert_array_equal(shift_heads(rolled, 4, 1), x)


def test_heads_may_be_permuted_within_a_half() -> None:
    q, k, v = tensors(H=4, Hk=4)
    out = grouped_attend(q, k, v, 4)[0]
    for order, same in (([1, 0, 3, 2], True), ([2, 3, 0, 1], False)):
        moved = grouped_attend(*(x[:, order] for x in (q, k, v)), 4)[0]
        assert np.allclose(moved, out[:, order]) is same


def test_moving_the_text_by_a_group_moves_the_output() -> None:
    """Here the rows behind the first group, with another group in front of them."""
    q, k, v = tensors(20)
    whole = grouped_attend(q, k, v, 4)[0]
    tail = grouped_attend(*(x[..., 4:, :] for x in (q, k, v)), 4)[0]
    np.testing.assert_allclose(whole[..., 6:, :], tail[..., 2:, :], atol=1e-12)


@quick
@given(data=st.data())
def test_padding_changes_nothing(data: st.DataObject) -> None:
    T, G = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 8))
    causal = data.draw(st.booleans())
    lengths = np.array(data.draw(st.lists(st.integers(0, T), min_size=2, max_size=2)))
    q, k, v = tensors(T)
    random = np.random.default_rng(1)
    dout, dlse = random.standard_normal((2, 4, T, 3)), random.standard_normal((2, 4, T))
    for x in (q, k, v):
        for n, length in enumerate(lengths):
            x[n, :, length:] = np.nan
    out, lse = grouped_attend(q, k, v, G, "segments", lengths, causal)
    gradients = grouped_attend_backward(
        q, k, v, G, "segments", lengths, causal, dout=dout, dlse=dlse
    )
    for n, length in enumerate(lengths):
        assert not out[n, :, length:].any()
        assert np.all(np.isneginf(lse[n, :, length:]))
        alone = [x[n, :, :length] for x in (q, k, v)]
        one = grouped_attend(*alone, G, causal=causal)
        np.testing.assert_allclose(out[n, :, :length], one[0], atol=1e-12)
        np.testing.assert_allclose(lse[n, :, :length], one[1], atol=1e-12)
        own = {"dout": dout[n, :, :length], "dlse": dlse[n, :, :length]}
        for whole, part in zip(
            gradients, grouped_attend_backward(*alone, G, causal=causal, **own), strict=True
        ):
            np.testing.assert_allclose(whole[n, :, :length], part, atol=1e-12)
            assert not whole[n, :, length:].any()


def test_segments_are_independent_attentions() -> None:
    q, k, v = tensors(13, 3, 3)
    out, lse = grouped_attend(q, k, v, 4)
    for heads, shifted in ((slice(0, 1), False), (slice(1, 3), True)):
        for first, last in pairwise([*group_starts(13, 4, shifted), 13]):
            cut = [x[:, heads, first:last] for x in (q, k, v)]
            alone = dense.attend(*cut, causal=True)
            np.testing.assert_allclose(out[:, heads, first:last], alone[0], atol=1e-12)
            np.testing.assert_allclose(lse[:, heads, first:last], alone[1], atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_is_the_slope_across_halves_of_one_kv_head(variant: str) -> None:
    """Two kv heads serve six query heads, so each half of them has its own share of a kv head."""
    q, k, v = tensors(4, 6, 2, 1)
    random = np.random.default_rng(1)
    dout, dlse = random.standard_normal((1, 6, 4, 3)), random.standard_normal((1, 6, 4))

    def loss() -> float:
        out, lse = grouped_attend(q, k, v, 2, variant, scale=0.7)
        return float(np.sum(out * dout) + np.sum(lse * dlse))

    gradients = grouped_attend_backward(q, k, v, 2, variant, scale=0.7, dout=dout, dlse=dlse)
    for x, gradient in zip((q, k, v), gradients, strict=True):
        np.testing.assert_allclose(gradient, differences(loss, x, 1e-6), atol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_adapter_gradient_is_the_slope(dropout: float) -> None:
    random = np.random.default_rng(0)
    x, W, A, B = (random.standard_normal(s) for s in ((2, 3, 4), (5, 4), (2, 4), (5, 2)))
    dout = random.standard_normal((2, 3, 5))
    options: dict[str, Any] = {}
    if dropout:
        options = {"keep": random.random(x.shape) > dropout, "dropout": dropout}
    gradients = lora_backward(x, W, A, B, 3.0, dout, **options)

    def loss() -> float:
        return float(np.sum(lora_forward(x, W, A, B, 3.0, **options) * dout))

    for argument, gradient in zip((x, A, B), gradients, strict=True):
        np.testing.assert_allclose(gradient, differences(loss, argument, 1e-6), atol=1e-7)


def test_merged_weights_do_what_the_adapter_does() -> None:
    random = np.random.default_rng(0)
    x, W, A, B = (random.standard_normal(s) for s in ((7, 6), (5, 6), (2, 6), (5, 2)))
    merged = lora_merge(W, A, B)
    np.testing.assert_allclose(x @ merged.T, lora_forward(x, W, A, B), atol=1e-12)
    assert np.linalg.matrix_rank(merged - W) == 2
    np.testing.assert_array_equal(lora_forward(x, W, A, np.zeros_like(B)), x @ W.T)


def test_norm_gradient_is_the_slope() -> None:
    random = np.random.default_rng(0)
    x, w, dout = (random.standard_normal(s) for s in ((2, 3, 4), (4,), (2, 3, 4)))
    for argument, gradient in zip((x, w), rmsnorm_backward(x, w, dout, 0.1), strict=True):
        slope = differences(lambda: float(np.sum(rmsnorm(x, w, 0.1) * dout)), argument, 1e-6)
        np.testing.assert_allclose(gradient, slope, atol=1e-7)


def test_positions_are_interpolated() -> None:
    assert interpolation_factor(8193, 4096) == 3.0
    assert interpolation_factor(4096, 4096) == interpolation_factor(100, 4096) == 1.0
    assert interpolation_factor(32768, 4096, 2.0) == 4.0
    half = np.array([1.0, 3.0], np.float32)
    assert interpolate_positions(half, 2.0).dtype == np.float32
    np.testing.assert_array_equal(interpolate_positions(half, 2.0), [0.5, 1.5])


def test_group_sizes() -> None:
    assert choose_group_size(12288, sft_group_size=8192) == 3072
    assert choose_group_size(12289, sft_group_size=8192) == 8192
    assert choose_group_size(9, 1 / 3) == 3
    for T, ratio in ((10, 1 / 3), (8, 0.3), (10, 0.3), (8192, 1 / 3)):
        with pytest.raises(ValueError, match=r"^ratio: got"):
            choose_group_size(T, ratio)


Q, K, V = tensors(8)
X, W, A, B = (np.ones(shape) for shape in ((3, 4), (5, 4), (2, 4), (5, 2)))
IDS = np.array([0, 2])
OUT, LSE = grouped_attend(Q, K, V, 4)
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (choose_group_size, (0,), {}, ValueError, "T"),
    (choose_group_size, (8, "1/4"), {}, TypeError, "ratio"),
    (choose_group_size, (8, 0.0), {}, ValueError, "ratio"),
    (choose_group_size, (8,), {"sft_group_size": 3}, ValueError, "sft_group_size"),
    (choose_group_size, (8,), {"sft_group_size": 2.0}, TypeError, "sft_group_size"),
    (group_starts, (-1, 2, True), {}, ValueError, "T"),
    (group_starts, (8, 0, True), {}, ValueError, "G"),
    (group_starts, (8, 2, 1), {}, TypeError, "shifted"),
    (s2_mask, (8, 2, 0), {}, ValueError, "H"),
    (s2_mask, (8, 2, 2, "cut"), {}, ValueError, "variant"),
    (s2_mask, (8, 2, 2, "roll", 1), {}, TypeError, "causal"),
    (s2_mask, (9, 2, 2, "roll"), {}, ValueError, "G"),
    (shift_heads, (Q, 3, 1), {}, ValueError, "G"),
    (shift_heads, (Q, 4, 0), {}, ValueError, "sign"),
    (shift_heads, (Q[:, :3], 4, 1), {}, ValueError, "x"),
    (shift_heads, ([1.0], 4, 1), {}, TypeError, "x"),
    (grouped_attend, (None, K, V, 4), {}, TypeError, "q"),
    (grouped_attend, (Q, K[..., :-1, :], V[..., :-1, :], 4), {}, ValueError, "k"),
    (grouped_attend, (Q, K, V, 2.0), {}, TypeError, "G"),
    (grouped_attend, (Q, K, V, 3, "roll"), {}, ValueError, "G"),
    (grouped_attend, (Q, K, V, 6, "roll"), {}, ValueError, "G"),
    (grouped_attend, (Q[:, :3], K[:, :1], V[:, :1], 4, "roll"), {}, ValueError, "q"),
    (s2_mask, (8, 2, 3, "roll"), {}, ValueError, "H"),
    (grouped_attend, (Q, K, V, 4), {"causal": None}, TypeError, "causal"),
    (grouped_attend, (Q, K, V, 4, "roll"), {"lengths": np.array([1, 2])}, ValueError, "lengths"),
    (grouped_attend, (Q, K, V, 4), {"lengths": np.array([1, 9])}, ValueError, "lengths"),
    (grouped_attend, (Q, K, V, 4), {"lengths": np.array([1])}, ValueError, "lengths"),
    (grouped_attend, (Q, K, V, 4), {"lengths": np.array([1.0, 2.0])}, TypeError, "lengths"),
    (grouped_attend, (Q, K, V, 4), {"lengths": [1, 2]}, TypeError, "lengths"),
    (s2_backward, (Q, K, V, OUT, LSE, None, 4), {}, TypeError, "dout"),
    (s2_backward, (Q, K, V, OUT, LSE[..., 1:], OUT, 4), {}, ValueError, "lse"),
    (s2_backward, (Q, K, V, OUT, LSE, OUT[:, :1], 4), {}, ValueError, "dout"),
    (s2_backward, (Q, K, V, OUT, LSE, OUT, 4), {"dlse": LSE[:, :1]}, ValueError, "dlse"),
    (s2_backward, (Q, K, V, OUT, LSE, OUT, 4), {"dlse": 1.0}, TypeError, "dlse"),
    (lora_forward, (X, W, A[:, 1:], B), {}, ValueError, "A"),
    (lora_forward, (X, W, A, B[1:]), {}, ValueError, "B"),
    (lora_forward, (X, W, A, B[:, 1:]), {}, ValueError, "B"),
    (lora_forward, (X, W, A[:0], B[:, :0]), {}, ValueError, "A"),
    (lora_forward, (X[:, 1:], W, A, B), {}, ValueError, "x"),
    (lora_forward, (X.astype(np.float32), W, A, B), {}, TypeError, "x"),
    (lora_forward, (X, W, A, B, 0), {}, ValueError, "alpha"),
    (lora_forward, (X, W, A, B, None), {}, TypeError, "alpha"),
    (lora_forward, (X, W, A, B), {"dropout": 1.0}, ValueError, "dropout"),
    (lora_forward, (X, W, A, B), {"keep": X}, TypeError, "keep"),
    (lora_forward, (X, W, A, B), {"keep": X[1:] > 0}, ValueError, "keep"),
    (lora_backward, (X, W, A, B, 1.0, None), {}, TypeError, "dout"),
    (lora_backward, (X, W, A, B, 1.0, X), {}, ValueError, "dout"),
    (lora_merge, (W[0], A, B), {}, ValueError, "W"),
    (lora_merge, (W, A.astype(np.float32), B), {}, TypeError, "A"),
    (is_trained, (3,), {}, TypeError, "name"),
    (is_trained, ("q", None), {}, TypeError, "trainable_params"),
    (rmsnorm, (X, X), {}, ValueError, "w"),
    (rmsnorm, (X, X[0], -1.0), {}, ValueError, "eps"),
    (rmsnorm_backward, (X, X[0], None), {}, TypeError, "dout"),
    (rmsnorm_backward, (X, X[0], X[:1]), {}, ValueError, "dout"),
    (embedding_backward, (IDS, X[:2], 2), {}, ValueError, "ids"),
    (embedding_backward, (IDS * 1.0, X[:2], 3), {}, TypeError, "ids"),
    (embedding_backward, (IDS, X, 3), {}, ValueError, "dout"),
    (embedding_backward, (IDS, X[:2], 0), {}, ValueError, "vocab"),
    (interpolation_factor, (0, 4), {}, ValueError, "new_len"),
    (interpolation_factor, (4, 2.5), {}, TypeError, "orig_len"),
    (interpolation_factor, (4, 4, 0.0), {}, ValueError, "rope_factor"),
    (interpolate_positions, ([1], 2.0), {}, TypeError, "pos"),
    (interpolate_positions, (IDS, 0), {}, ValueError, "factor"),
    (interpolate_positions, (IDS, "2"), {}, TypeError, "factor"),
)  # fmt: skip


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)


def test_inputs_stay_as_they_are() -> None:
    inputs = tensors(8)
    copies = [x.copy() for x in inputs]
    for variant in VARIANTS:
        grouped_attend_backward(*inputs, 4, variant, dout=np.ones((2, 4, 8, 3)))
    weights = [x.copy() for x in (W, A, B)]
    lora_merge(W, A, B)
    for x, copy in zip((*inputs, W, A, B), (*copies, *weights), strict=True):
        np.testing.assert_array_equal(x, copy)
    assert longlora.MECHANISM.slug == "longlora"
