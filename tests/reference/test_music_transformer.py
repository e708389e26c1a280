"""Relative attention against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.conventions import causal_mask
from attnspec.reference.dense.attention import attend as dense
from attnspec.reference.scores.music_transformer import (
    attend,
    decode_relative,
    global_attention,
    global_logits,
    local_attention,
    local_logits,
    local_visibility,
    relative_logits,
    relative_logits_gather,
    relative_table_slice,
    relative_values,
    skew,
    skew_full,
    table_gradient,
    unskew,
)
from attnspec.reference.scores.music_transformer_gradients import (
    global_attention_backward,
    local_attention_backward,
)

quick = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 999)


def tokens(
    seed: int = 0, L: int = 7, rows: int = 7, heads: int = 4, kv: int = 2, d: int = 4
) -> Any:
    """q, k, v and a table for each head."""
    random = np.random.default_rng(seed)
    shapes = ((2, heads, L, d), (2, kv, L, d), (2, kv, L, 3), (heads, rows, d))
    return tuple(random.standard_normal(shape) for shape in shapes)


@pytest.mark.parametrize("name", ["global_causal_M_eq_L", "global_causal_M_lt_L"])
def test_global_form_is_that_of_the_authors(name: str, golden: Callable[[str], Any]) -> None:
    case = golden(f"music_transformer__{name}")
    q, k, v, E = (case[n] for n in ("q_scaled", "k", "v", "key_relative_embeddings"))
    mask = causal_mask(q.shape[-2], q.shape[-2])
    logits = global_logits(q, k, E, 1.0)
    np.testing.assert_allclose(logits[..., mask], case["logits"][..., mask], atol=1e-12)
    out, P = attend(logits, mask, v)
    np.testing.assert_allclose(P, case["weights"], atol=1e-12)
    np.testing.assert_allclose(out, case["out"], atol=1e-12)
    np.testing.assert_allclose(global_attention(q, k, v, E, scale=1.0), case["out"], atol=1e-12)


def test_local_form_is_that_of_the_authors(golden: Callable[[str], Any]) -> None:
    case = golden("music_transformer__local_causal_ragged")
    q, k, v, E = (case[n] for n in ("q_scaled", "k", "v", "relative_embeddings"))
    b = case["meta"]["block_length"]
    np.testing.assert_allclose(local_attention(q, k, v, E, b, scale=1.0), case["out"], atol=1e-12)


@pytest.mark.parametrize("L", [1, 2, 5, 8])
def test_skewing_moves_distances_onto_keys(L: int) -> None:
    R = np.random.default_rng(L).standard_normal((2, 3, L, L))
    S = skew(R)
    for i in range(L):
        for j in range(i + 1):
            np.testing.assert_array_equal(S[..., i, j], R[..., i, L - 1 - (i - j)])
    back = unskew(S)
    for i in range(L):
        np.testing.assert_array_equal(back[..., i, L - 1 - i :], R[..., i, L - 1 - i :])
    wide = np.random.default_rng(L).standard_normal((2, L, 2 * L - 1))
    full = skew_full(wide)
    for i in range(L):
        for j in range(L):
            np.testing.assert_array_equal(full[..., i, j], wide[..., i, L - 1 + j - i])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rows", [3, 7, 13, 21])
@pytest.mark.parametrize("shared", [True, False])
def test_skewed_logits_are_looked_up_ones(causal: bool, rows: int, shared: bool) -> None:
    q, _, _, E = tokens(rows=rows)
    E = E[0] if shared else E
    used = relative_table_slice(E, 7, causal)
    assert used.shape[-2] == (7 if causal else 13)
    R = relative_logits(q, used)
    S = skew(R) if causal else skew_full(R)
    expected = relative_logits_gather(q, E, 7, causal)
    seen = causal_mask(7, 7) if causal else np.ones((7, 7), bool)
    np.testing.assert_allclose(S[..., seen], expected[..., seen], atol=1e-12)


def test_tables_are_padded_with_zeros_cut_or_clipped() -> None:
    E = np.arange(1.0, 4.0)[:, None]
    np.testing.assert_array_equal(relative_table_slice(E, 5).ravel(), [0, 0, 1, 2, 3])
    np.testing.assert_array_equal(relative_table_slice(E, 2).ravel(), [2, 3])
    np.testing.assert_array_equal(relative_table_slice(E, 5, clip=True).ravel(), [1, 1, 1, 2, 3])
    np.testing.assert_array_equal(relative_table_slice(E, 3, False).ravel(), [0, 1, 2, 3, 0])
    np.testing.assert_array_equal(relative_table_slice(E, 1, False).ravel(), [2])
    clipped = relative_table_slice(E, 3, causal=False, clip=True)
    np.testing.assert_array_equal(clipped.ravel(), [1, 1, 2, 3, 3])


def test_a_clipped_table_gives_shaws_rule() -> None:
    q, k, v, E = tokens(rows=3)
    distance = np.arange(7)[:, None] - np.arange(7)[None, :]
    rel = np.einsum("bhid,hijd->bhij", q / 2, E[:, 2 - np.clip(distance, 0, 2)])
    logits = global_logits(q, k, 0 * E) + rel
    expected, _ = attend(logits, causal_mask(7, 7), v)
    got = global_attention(q, k, v, relative_table_slice(E, 7, clip=True))
    np.testing.assert_allclose(got, expected, atol=1e-12)
    assert not np.allclose(global_attention(q, k, v, E), expected, atol=1e-3)


@pytest.mark.parametrize("causal", [True, False])
def test_a_table_of_zeros_is_plain_attention(causal: bool) -> None:
    q, k, v, E = tokens()
    Ev = np.zeros((4, 7, 3))
    out = global_attention(q, k, v, 0 * E, Ev=Ev, causal=causal)
    np.testing.assert_allclose(out, dense(q, k, v, causal=causal)[0], atol=1e-12)


def test_logits_depend_on_the_distance_alone() -> None:
    q, k, _, E = tokens(L=9, rows=5)
    whole = global_logits(q, k, E)
    part = global_logits(q[..., 3:, :], k[..., 3:, :], E)
    seen = causal_mask(6, 6)
    np.testing.assert_allclose(whole[..., 3:, 3:][..., seen], part[..., seen], atol=1e-12)
    local, cut = local_logits(q, k, E, 2), local_logits(q[..., 2:, :], k[..., 2:, :], E, 2)
    both = local_visibility(9, 2)[2:, 2:] & local_visibility(7, 2)
    assert both.sum() > 14
    np.testing.assert_allclose(local[..., 2:, 2:][..., both], cut[..., both], atol=1e-12)
    far = np.arange(9)[:, None] - np.arange(9)[None, :] >= 5
    content = global_logits(q, k, 0 * E)
    np.testing.assert_allclose(whole[..., far], content[..., far], atol=1e-12)


def test_local_and_global_agree_where_they_see_the_same() -> None:
    q, k, v, E = tokens(L=11, rows=12)
    np.testing.assert_allclose(
        local_attention(q, k, v, E, 6), global_attention(q, k, v, E), atol=1e-12
    )
    local, whole = local_attention(q, k, v, E, 3), global_attention(q, k, v, E)
    np.testing.assert_allclose(local[..., :6, :], whole[..., :6, :], atol=1e-12)
    assert not np.allclose(local[..., 6:, :], whole[..., 6:, :])
    changed = v.copy()
    changed[..., :3, :] += 1
    np.testing.assert_array_equal(
        local_attention(q, k, changed, E, 3)[..., 6:, :], local[..., 6:, :]
    )


@pytest.mark.parametrize("L", [1, 5, 6, 7, 8])
def test_local_outputs_do_not_depend_on_what_follows(L: int) -> None:
    q, k, v, E = tokens(L=9, rows=12)
    whole = local_attention(q, k, v, E, 2)
    part = local_attention(*(x[..., :L, :] for x in (q, k, v)), E, 2)
    np.testing.assert_allclose(part, whole[..., :L, :], atol=1e-12)
    assert local_visibility(9, 2).sum(axis=1).tolist() == [1, 2, 3, 4, 3, 4, 3, 4, 3]


def test_masking_the_unordered_form_gives_the_ordered_one() -> None:
    q, k, v, E = tokens(rows=5)
    full = np.concatenate([E, np.ones((4, 4, 4))], axis=-2)
    out, _ = attend(global_logits(q, k, full, causal=False), causal_mask(7, 7), v)
    np.testing.assert_allclose(out, global_attention(q, k, v, E), atol=1e-12)


@quick
@given(seeds)
def test_relative_logits_are_linear_and_decoding_is_their_last_row(seed: int) -> None:
    q, k, v, E = tokens(seed, rows=5)
    other = tokens(seed + 1, rows=5)[3]
    mixed = relative_logits_gather(q, 2 * E - 3 * other, 7)
    parts = 2 * relative_logits_gather(q, E, 7) - 3 * relative_logits_gather(q, other, 7)
    np.testing.assert_allclose(mixed, parts, atol=1e-10)
    newest = decode_relative(q[..., -1, :], E, 7)
    np.testing.assert_allclose(newest, relative_logits_gather(q, E, 7)[..., -1, :] / 2, atol=1e-12)
    before = global_attention(*(x[..., :4, :] for x in (q, k, v)), E)
    np.testing.assert_allclose(global_attention(q, k, v, E)[..., :4, :], before, atol=1e-12)


def test_decoding_is_prefill_and_blocks_keep_few_keys() -> None:
    """A new token needs its own row; in blocks of 2 only keys of its block and the one before."""
    q, k, v, E = tokens(L=9, rows=5)
    whole, local = global_attention(q, k, v, E), local_attention(q, k, v, E, 2)
    for p in range(9):
        for first, expected in ((0, whole), (max(p // 2 - 1, 0) * 2, local)):
            keys, values = (np.repeat(x[:, :, first : p + 1], 2, axis=1) for x in (k, v))
            content = np.einsum("bhd,bhjd->bhj", q[:, :, p] / 2, keys)
            logits = content + decode_relative(q[:, :, p], E, p + 1 - first)
            out, _ = attend(logits[:, :, None], None, values)
            np.testing.assert_allclose(out[:, :, 0], expected[:, :, p], atol=1e-12)


@quick
@given(seeds)
def test_relative_logits_are_linear_in_the_queries(seed: int) -> None:
    q, _, _, E = tokens(seed, rows=5)
    other = tokens(seed + 1)[0]
    mixed = relative_logits_gather(2 * q - 3 * other, E, 7)
    parts = 2 * relative_logits_gather(q, E, 7) - 3 * relative_logits_gather(other, E, 7)
    np.testing.assert_allclose(mixed, parts, atol=1e-10)


def test_values_have_a_table_too() -> None:
    q, k, v, E = tokens()
    Ev = np.random.default_rng(3).standard_normal((4, 5, 3))
    _, P = attend(global_logits(q, k, E), causal_mask(7, 7), v)
    expected = np.zeros((2, 4, 7, 3))
    for i in range(7):
        for t in range(min(i + 1, 5)):
            expected[:, :, i] += P[:, :, i, i - t, None] * Ev[:, 4 - t]
    np.testing.assert_allclose(relative_values(P, Ev), expected, atol=1e-12)
    with_values = global_attention(q, k, v, E, Ev=Ev)
    np.testing.assert_allclose(with_values - global_attention(q, k, v, E), expected, atol=1e-12)
    local = local_attention(q, k, v, E, 2, Ev=Ev) - local_attention(q, k, v, E, 2)
    _, P = attend(local_logits(q, k, E, 2), None, v)
    np.testing.assert_allclose(local, relative_values(P, Ev), atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_of_a_table_of_values_is_a_tables_gradient(causal: bool) -> None:
    q, k, v, E = tokens(rows=9)
    random = np.random.default_rng(6)
    Ev, direction = random.standard_normal((2, 4, 9, 3))
    dout = random.standard_normal((2, 4, 7, 3))
    seen = causal_mask(7, 7) if causal else None
    _, P = attend(global_logits(q, k, E, causal=causal), seen, v)
    dEv = table_gradient(P, dout, 9 if causal else 5, causal)
    sides = [
        np.sum(dout * global_attention(q, k, v, E, Ev=Ev + s * direction, causal=causal))
        for s in (1, -1)
    ]
    np.testing.assert_allclose(np.sum(dEv * direction), (sides[0] - sides[1]) / 2, rtol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_the_tables_gradient_sums_over_pairs(causal: bool) -> None:
    q, _, _, _ = tokens()
    dlogits = np.random.default_rng(5).standard_normal((2, 4, 7, 7)) * np.tri(7)
    dE = table_gradient(dlogits, q, 5, causal)
    for t in range(5):
        expected = sum(
            np.einsum("bh,bhd->hd", dlogits[:, :, i, i - t], q[:, :, i]) for i in range(t, 7)
        )
        np.testing.assert_allclose(dE[:, 4 - t], expected, atol=1e-12)
    unused = table_gradient(dlogits, q, 9, causal)
    assert np.all(unused[:, :2] == 0)


@pytest.mark.parametrize("form", ["causal", "noncausal", "shared", "local", "values"])
def test_gradients_are_finite_differences(form: str) -> None:
    inputs = list(tokens(7, rows=9))
    if form == "shared":
        inputs[3] = inputs[3][0]
    random = np.random.default_rng(2)
    options: dict[str, Any] = {"scale": 0.7}
    if form == "values":
        options["Ev"] = random.standard_normal((4, 5, 3))
    if form == "noncausal":
        options["causal"] = False
    b = (2,) if form == "local" else ()
    forward = local_attention if b else global_attention
    backward: Any = local_attention_backward if b else global_attention_backward
    dout = random.standard_normal((2, 4, 7, 3))
    for n, gradient in enumerate(backward(*inputs, *b, dout, **options)):
        direction = random.standard_normal(gradient.shape)
        assert gradient.shape == inputs[n].shape
        sides = []
        for s in (1e-6, -1e-6):
            moved: Any = [x + s * direction if i == n else x for i, x in enumerate(inputs)]
            sides.append(np.sum(dout * forward(*moved, *b, **options)))
        numeric = (sides[0] - sides[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-5, atol=1e-6)


def test_leading_axes_are_free_float32_stays_and_inputs_too() -> None:
    arrays = [x.astype(np.float32) for x in tokens()]
    copies = [x.copy() for x in arrays]
    q, k, v, E = arrays
    out = global_attention(q, k, v, E)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(global_attention(q[0], k[0], v[0], E), out[0])
    assert all(x.dtype == np.float32 for x in global_attention_backward(q, k, v, E, out))
    assert local_logits(q, k, E, 2).dtype == np.float32
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)


X = np.zeros((2, 3, 2))
A = np.zeros((2, 3, 3))
T = np.zeros((2, 5, 2))
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (relative_table_slice, (T, 0), {}, ValueError, "L"),
    (relative_table_slice, (T[:, :4], 3, False), {}, ValueError, "E"),
    (relative_table_slice, (T[:, :0], 3), {}, ValueError, "E"),
    (relative_logits, (X, T[..., :1]), {}, ValueError, "Eused"),
    (relative_logits, (X, T.astype(np.float32)), {}, TypeError, "Eused"),
    (relative_logits_gather, (X, T, 4), {}, ValueError, "qs"),
    (relative_logits_gather, (X, np.zeros((3, 5, 2)), 3), {}, ValueError, "E"),
    (skew, (X,), {}, ValueError, "R"),
    (skew, (A.astype(int),), {}, TypeError, "R"),
    (unskew, ([1.0],), {}, TypeError, "S"),
    (skew_full, (A,), {}, ValueError, "R"),
    (global_logits, (X, X[:, :2], T), {}, ValueError, "k"),
    (global_logits, (X, X, T.astype(np.float32)), {}, TypeError, "E"),
    (local_visibility, (3, 0), {}, ValueError, "b"),
    (local_visibility, (3, 1.5), {}, TypeError, "b"),
    (local_logits, (X, X, T[:, :1], 1), {}, ValueError, "E"),
    (attend, (A, np.ones(3), X), {}, TypeError, "mask"),
    (attend, (A, np.ones(2, bool), X), {}, ValueError, "mask"),
    (attend, (A, None, X[:, :2]), {}, ValueError, "v"),
    (decode_relative, (X[:, 0], T, 0), {}, ValueError, "n_keys"),
    (relative_values, (X, T), {}, ValueError, "P"),
    (relative_values, (A, T.astype(np.float32)), {}, TypeError, "Ev"),
    (table_gradient, (A, X, 0), {}, ValueError, "M"),
    (table_gradient, (X, X, 1), {}, ValueError, "dlogits"),
    (global_attention, (X, X[..., :1], X, T), {}, ValueError, "k"),
    (global_attention, (X, X, X[:, :2], T), {}, ValueError, "v"),
    (global_attention, (X, X, X, T[:, :4]), {"causal": False}, ValueError, "E"),
    (local_attention, (X, X, X, T, True), {}, TypeError, "b"),
    (relative_table_slice, (T, 3, 1), {}, TypeError, "causal"),
    (relative_table_slice, (T, 3), {"clip": 1}, TypeError, "clip"),
    (relative_logits_gather, (X, T.astype(np.float32), 3), {}, TypeError, "E"),
    (global_logits, (X, X, T, "1"), {}, TypeError, "scale"),
    (local_logits, (X, X, T, 1, float("nan")), {}, ValueError, "scale"),
    (decode_relative, (X[:, 0], T.astype(np.float32), 2), {}, TypeError, "E"),
    (table_gradient, (A.astype(np.float32), X, 1), {}, TypeError, "dlogits"),
    (global_attention, (X, X, X, T), {"Ev": T[..., :1]}, ValueError, "Ev"),
    (global_attention, (X, X, X, T), {"Ev": T.astype(np.float32)}, TypeError, "Ev"),
    (local_attention, (X, X, X, T, 1), {"Ev": T[:, :1]}, ValueError, "Ev"),
    (global_attention_backward, (X, X, X[:, :2], T, X), {}, ValueError, "v"),
    (local_attention_backward, (X, X, X, T, 1, X[:, :2]), {}, ValueError, "dout"),
    (global_attention_backward, (X, X, X, T, None), {}, TypeError, "dout"),
)


@pytest.mark.parametrize(("function", "args", "options", "error", "name"), BAD)
def test_bad_input_is_named(
    function: Any, args: tuple[Any, ...], options: dict[str, Any], error: type, name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: got"):
        function(*args, **options)
