"""MASFormer against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense import attention as dense
from attnspec.reference.patterns import masformer
from attnspec.reference.patterns.masformer import (
    block_attend,
    block_attend_backward,
    layer_attend,
    layer_attend_backward,
    window_attend,
    window_attend_backward,
)
from attnspec.reference.patterns.masformer_decoding import Cache, cache_after, decode_step
from attnspec.reference.patterns.masformer_spans import (
    block_mask,
    cache_rows_needed,
    layer_spans,
    reachability,
    relative_cost,
    span_mask,
    window_mask,
)
from tests.differences import differences

quick = settings(max_examples=20, deadline=None, derandomize=True)
Tensors = tuple[np.ndarray, np.ndarray, np.ndarray]
SPANS: list[tuple[Any, ...]] = [
    ("full",), ("block", 4, 0), ("block", 3, 1), ("block", 1, 2), ("block", 5, 2), ("block", 40, 0),
    ("window", 0), ("window", 1), ("window", 5), ("window", 40),
]  # fmt: skip


def tensors(T: int = 13, H: int = 4, Hk: int = 2, batch: int = 2, seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    shapes = ((batch, H, T, 4), (batch, Hk, T, 4), (batch, Hk, T, 3))
    q, k, v = (random.standard_normal(shape) for shape in shapes)
    return q, k, v


def upstream(T: int = 13, H: int = 4, batch: int = 2) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return random.standard_normal((batch, H, T, 3)), random.standard_normal((batch, H, T))


def test_blocks_are_those_of_a_third_party(golden: Callable[[str], Any]) -> None:
    case = golden("masformer__block_n0")
    q, k, v = (case[name] for name in ("q", "k", "v"))
    b, n = (case["meta"]["params"][name] for name in ("window_size", "look_backward"))
    np.testing.assert_allclose(block_attend(q, k, v, b, n)[0], case["out"], atol=1e-12)
    gradients = block_attend_backward(q, k, v, case["dout"], b, n)
    for got, name in zip(gradients, ("dq", "dk", "dv"), strict=True):
        np.testing.assert_allclose(got, case[name], atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("span", SPANS)
def test_layers_are_dense_attention_with_the_mask(span: tuple[Any, ...], causal: bool) -> None:
    q, k, v = tensors()
    mask = span_mask(13, span, causal)
    for got, want in zip(
        layer_attend(q, k, v, span, causal, 0.7),
        dense.attend(q, k, v, mask=mask, scale=0.7),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-12)
    dout, dlse = upstream()
    for got, want in zip(
        layer_attend_backward(q, k, v, dout, span, causal, 0.7, dlse=dlse),
        dense.attend_backward(q, k, v, dout, dlse, mask=mask, scale=0.7),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("span", [("block", 13, 0), ("block", 3, 4), ("window", 12), ("full",)])
def test_what_is_dense_attention(span: tuple[Any, ...]) -> None:
    q, k, v = tensors()
    got, expected = layer_attend(q, k, v, span), dense.attend(q, k, v, causal=True)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


def test_a_token_alone_is_its_own_value() -> None:
    q, k, v = tensors()
    dout, _ = upstream()
    own = np.repeat(v, 2, axis=1)
    for out, (dq, dk, dv) in (
        (block_attend(q, k, v, 1)[0], block_attend_backward(q, k, v, dout, 1)),
        (window_attend(q, k, v, 0)[0], window_attend_backward(q, k, v, dout, 0)),
    ):
        np.testing.assert_allclose(out, own, atol=1e-15)
        np.testing.assert_allclose(dq, 0, atol=1e-15)
        np.testing.assert_allclose(dk, 0, atol=1e-15)
        np.testing.assert_allclose(dv, dout.reshape(2, 2, 2, 13, 3).sum(axis=2), atol=1e-15)


@quick
@given(T=st.integers(0, 20), b=st.integers(1, 9), causal=st.booleans())
def test_blocks_are_independent_attentions(T: int, b: int, causal: bool) -> None:
    q, k, v = tensors(T)
    dout, dlse = upstream(T)
    out, lse = block_attend(q, k, v, b, 0, causal)
    gradients = block_attend_backward(q, k, v, dout, b, 0, causal, dlse=dlse)
    for first in range(0, T, b):
        rows = slice(first, first + b)
        cut = [x[..., rows, :] for x in (q, k, v)]
        alone = dense.attend(*cut, causal=causal)
        np.testing.assert_allclose(out[..., rows, :], alone[0], atol=1e-12)
        np.testing.assert_allclose(lse[..., rows], alone[1], atol=1e-12)
        expected = dense.attend_backward(*cut, dout[..., rows, :], dlse[..., rows], causal=causal)
        for got, want in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(got[..., rows, :], want, atol=1e-12)


@pytest.mark.parametrize("span", SPANS)
def test_nothing_depends_on_what_is_hidden(span: tuple[Any, ...]) -> None:
    q, k, v = tensors()
    before, mask = layer_attend(q, k, v, span)[0], span_mask(13, span)
    for u in range(13):
        changed = [x.copy() for x in (q, k, v)]
        for x in changed:
            x[..., u, :] *= -2.0
        after = layer_attend(*changed, span)[0]
        blind = ~mask[:, u]
        np.testing.assert_array_equal(after[..., blind, :], before[..., blind, :])
        moved = np.abs(after - before).max(axis=(0, 1, 3)) > 0
        np.testing.assert_array_equal(moved, mask[:, u])


@pytest.mark.parametrize("n", [0, 1])
def test_moving_the_text_by_blocks_moves_the_output(n: int) -> None:
    q, k, v = tensors(19)
    whole = block_attend(q, k, v, 4, n)[0]
    for shift, same in ((4, True), (8, True), (3, False), (5, False)):
        tail = block_attend(*(x[..., shift:, :] for x in (q, k, v)), 4, n)[0]
        assert np.allclose(whole[..., shift + 4 * n :, :], tail[..., 4 * n :, :]) is same


def test_moving_the_text_moves_windows_away_from_the_start() -> None:
    q, k, v = tensors(19)
    whole = window_attend(q, k, v, 3)[0]
    for shift in (1, 2, 5):
        tail = window_attend(*(x[..., shift:, :] for x in (q, k, v)), 3)[0]
        np.testing.assert_allclose(whole[..., shift + 3 :, :], tail[..., 3:, :], atol=1e-12)
        assert not np.allclose(whole[..., shift : shift + 3, :], tail[..., :3, :])


@quick
@given(
    T=st.integers(0, 24), b=st.integers(1, 7), n=st.integers(0, 3), c=st.integers(1, 4),
    causal=st.booleans(),
)  # fmt: skip
def test_masks_grow_with_what_is_visible(T: int, b: int, n: int, c: int, causal: bool) -> None:
    mask = block_mask(T, b, n, causal)
    assert not (mask & ~block_mask(T, b, n + 1, causal)).any()
    assert not (block_mask(T, b, 0, causal) & ~block_mask(T, c * b, 0, causal)).any()
    assert not (window_mask(T, n, causal) & ~window_mask(T, n + 1, causal)).any()
    t = np.arange(T)
    distance = t[:, None] // b - t // b
    near = np.abs(distance) <= n
    np.testing.assert_array_equal(mask, near & (t[:, None] >= t) if causal else near)
    assert window_mask(T, n).sum(axis=1).max(initial=0) <= n + 1


@quick
@given(data=st.data())
def test_steps_and_chunks_are_prefill(data: st.DataObject) -> None:
    span = data.draw(st.sampled_from(SPANS))
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6))
    T = sum(sizes)
    q, k, v = tensors(T)
    expected = layer_attend(q, k, v, span, scale=0.7)[0]
    cache, first, outs = cache_after(k[..., :0, :], v[..., :0, :], span), 0, []
    for size in sizes:
        new = slice(first, first + size)
        out, cache = decode_step(*(x[..., new, :] for x in (q, k, v)), cache, span, scale=0.7)
        first += size
        outs.append(out)
        rows = cache_rows_needed(first - 1, span) if first else 0
        np.testing.assert_array_equal(cache.k, k[..., first - rows : first, :])
        np.testing.assert_array_equal(cache.v, v[..., first - rows : first, :])
        assert cache.seen == first
    np.testing.assert_allclose(np.concatenate(outs, axis=-2), expected, atol=1e-12)


def test_decoding_goes_on_from_a_prompt() -> None:
    q, k, v = tensors()
    for span in SPANS:
        expected = layer_attend(q, k, v, span)[0]
        cache = cache_after(k[..., :7, :], v[..., :7, :], span)
        out, _ = decode_step(*(x[..., 7:, :] for x in (q, k, v)), cache, span)
        np.testing.assert_allclose(out, expected[..., 7:, :], atol=1e-12)


@pytest.mark.parametrize("span", SPANS)
def test_rows_of_the_cache_are_those_that_are_read(span: tuple[Any, ...]) -> None:
    for t, row in enumerate(span_mask(30, span)):
        assert cache_rows_needed(t, span) == row.sum()
    if span[0] == "block":
        _, b, n = span
        for t in range(30):
            assert cache_rows_needed(t, span) == min(t % b + 1 + n * b, t + 1)


def test_reach_of_stacks() -> None:
    T = 12
    block, wide, window, full = (
        block_mask(T, 3), block_mask(T, 4), window_mask(T, 1), span_mask(T, ("full",))
    )  # fmt: skip
    lower = np.tri(T, dtype=bool)
    for at in range(4):
        stack = [block, wide, window]
        stack.insert(at, full)
        np.testing.assert_array_equal(reachability(T, stack), lower)
    np.testing.assert_array_equal(reachability(T, [block] * 5), block)
    np.testing.assert_array_equal(reachability(T, [window] * 3), window_mask(T, 3))
    np.testing.assert_array_equal(reachability(T, []), np.eye(T, dtype=bool))
    product = (wide.astype(int) @ block.astype(int)) > 0
    np.testing.assert_array_equal(reachability(T, np.stack([block, wide])), product)
    other = (block.astype(int) @ wide.astype(int)) > 0
    np.testing.assert_array_equal(reachability(T, np.stack([wide, block])), other)
    assert np.any(product != other)


def test_reach_is_what_outputs_depend_on() -> None:
    T, spans = 10, [("block", 3, 0), ("window", 1), ("block", 4, 0)]
    x = np.random.default_rng(0).standard_normal((1, T, 3))

    def stack(x: np.ndarray) -> np.ndarray:
        for span in spans:
            x = x + layer_attend(x, x, x, span)[0]
        return x

    reached = reachability(T, [span_mask(T, span) for span in spans])
    for u in range(T):
        moved = x.copy()
        moved[:, u] += 1.0
        changed = np.abs(stack(moved) - stack(x)).max(axis=(0, 2)) > 0
        np.testing.assert_array_equal(changed, reached[:, u])


@quick
@given(
    T=st.integers(1, 40), L=st.integers(1, 6), size=st.integers(0, 45), data=st.data(),
    kind=st.sampled_from(["block", "window"]),
)  # fmt: skip
def test_cost_counts_entries_of_masks(
    T: int, L: int, size: int, data: st.DataObject, kind: str
) -> None:
    full = data.draw(st.integers(0, L))
    b, w = (size + 1, None) if kind == "block" else (None, size)
    sparse = block_mask(T, size + 1) if kind == "block" else window_mask(T, size)
    dense_pairs = T * (T + 1) / 2
    expected = (full * dense_pairs + (L - full) * sparse.sum()) / (L * dense_pairs)
    np.testing.assert_allclose(relative_cost(T, L, full, kind, b, w), expected, rtol=1e-14)


def test_costs_of_the_paper() -> None:
    for full, expected in ((4, 0.271), (8, 0.417), (0, 0.125)):
        assert round(relative_cost(8192, 24, full, "block", b=1024), 3) == expected


@pytest.mark.parametrize(("b", "n"), [(4, 0), (3, 1), (1, 0)])
def test_lse_grows_with_the_keys(b: int, n: int) -> None:
    q, k, v = tensors()
    part, whole = block_attend(q, k, v, b, n)[1], dense.attend(q, k, v, causal=True)[1]
    fewer = (block_mask(13, b, n).sum(axis=1) < np.arange(1, 14))[None, None]
    np.testing.assert_array_equal(part < whole - 1e-12, np.broadcast_to(fewer, part.shape))
    np.testing.assert_allclose(part, np.where(fewer, part, whole), atol=1e-12)


def test_schedules() -> None:
    def numbers(*args: Any) -> list[int]:
        return np.flatnonzero(layer_spans(*args)).tolist()

    assert numbers(24, 4) == [0, 1, 2, 3]
    assert numbers(24, 4, "top") == [20, 21, 22, 23]
    assert numbers(24, 4, "every") == [0, 6, 12, 18]
    assert numbers(7, 3, "every") == [0, 2, 4]
    assert numbers(5, 2, [3, 1]) == [1, 3]
    for placement in ("bottom", "top", "every", []):
        assert numbers(3, 0, placement) == []
    for placement in ("bottom", "top", "every", (2, 1, 0)):
        assert numbers(3, 3, placement) == [0, 1, 2]


@quick
@given(data=st.data())
def test_padding_changes_nothing(data: st.DataObject) -> None:
    T, span = data.draw(st.integers(1, 14)), data.draw(st.sampled_from(SPANS))
    causal = data.draw(st.booleans())
    lengths = np.array(data.draw(st.lists(st.integers(0, T), min_size=2, max_size=2)))
    q, k, v = tensors(T)
    dout, dlse = upstream(T)
    for x in (q, k, v):
        for row, length in enumerate(lengths):
            x[row, :, length:] = np.nan
    out, lse = layer_attend(q, k, v, span, causal, lengths=lengths)
    gradients = layer_attend_backward(q, k, v, dout, span, causal, lengths=lengths, dlse=dlse)
    for row, length in enumerate(lengths):
        assert not out[row, :, length:].any()
        assert np.all(np.isneginf(lse[row, :, length:]))
        alone = [x[row, :, :length] for x in (q, k, v)]
        one = layer_attend(*alone, span, causal)
        np.testing.assert_allclose(out[row, :, :length], one[0], atol=1e-12)
        np.testing.assert_allclose(lse[row, :, :length], one[1], atol=1e-12)
        expected = layer_attend_backward(
            *alone, dout[row, :, :length], span, causal, dlse=dlse[row, :, :length]
        )
        for whole, part in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(whole[row, :, :length], part, atol=1e-12)
            assert not whole[row, :, length:].any()


@pytest.mark.parametrize("causal", [True, False])
def test_masks_with_lengths(causal: bool) -> None:
    lengths = np.array([7, 0, 9])
    masks = block_mask(9, 4, 1, causal, lengths)
    for mask, length in zip(masks, lengths, strict=True):
        expected = np.zeros((9, 9), bool)
        expected[:length, :length] = block_mask(length, 4, 1, causal)
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("span", [("full",), ("block", 2, 0), ("block", 2, 1), ("window", 1)])
def test_gradient_is_the_slope(span: tuple[Any, ...]) -> None:
    q, k, v = tensors(5, 2, 1, 1)
    dout, dlse = upstream(5, 2, 1)

    def loss() -> float:
        out, lse = layer_attend(q, k, v, span, scale=0.7)
        return float(np.sum(out * dout) + np.sum(lse * dlse))

    gradients = layer_attend_backward(q, k, v, dout, span, scale=0.7, dlse=dlse)
    for x, gradient in zip((q, k, v), gradients, strict=True):
        assert np.all(np.abs(differences(loss, x, 1e-6) - gradient) < 1e-7)


def test_float32_stays_float32() -> None:
    q, k, v = (x.astype(np.float32) for x in tensors())
    for span in SPANS:
        out, lse = layer_attend(q, k, v, span, scale=0.5)
        step, _ = decode_step(q, k, v, cache_after(k[..., :0, :], v[..., :0, :], span), span)
        gradients = layer_attend_backward(q, k, v, out, span, lengths=np.array([5, 13]))
        assert {x.dtype for x in (out, lse, step, *gradients)} == {np.dtype(np.float32)}


Q, K, V = tensors(8)
DOUT = upstream(8)[0]
BLOCK = ("block", 4, 0)
EMPTY = cache_after(K[..., :0, :], V[..., :0, :], BLOCK)
LENGTHS = np.array([1, 9])
BAD: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], type, str], ...] = (
    (layer_spans, (0, 0), {}, ValueError, "L"),
    (layer_spans, (3, 4), {}, ValueError, "l"),
    (layer_spans, (3, 1.0), {}, TypeError, "l"),
    (layer_spans, (3, 1, "middle"), {}, ValueError, "placement"),
    (layer_spans, (3, 2, [1]), {}, ValueError, "placement"),
    (layer_spans, (3, 2, [1, 1]), {}, ValueError, "placement"),
    (layer_spans, (3, 1, [3]), {}, ValueError, "placement"),
    (layer_spans, (3, 1, [-1]), {}, ValueError, "placement"),
    (layer_spans, (3, 1, ["1"]), {}, TypeError, "placement"),
    (span_mask, (-1, BLOCK), {}, ValueError, "T"),
    (span_mask, (4, "full"), {}, TypeError, "span"),
    (span_mask, (4, ()), {}, TypeError, "span"),
    (span_mask, (4, ("sliding", 3)), {}, ValueError, "span"),
    (span_mask, (4, ("block", 3)), {}, ValueError, "span"),
    (span_mask, (4, ("full", 3)), {}, ValueError, "span"),
    (span_mask, (4, ("window", -1)), {}, ValueError, "span's w"),
    (span_mask, (4, ("block", 0, 0)), {}, ValueError, "span's b"),
    (span_mask, (4, BLOCK, 1), {}, TypeError, "causal"),
    (block_mask, (4, 0), {}, ValueError, "b"),
    (block_mask, (4, 2, -1), {}, ValueError, "n"),
    (block_mask, (4, 2.0), {}, TypeError, "b"),
    (block_mask, (4, 2, 0, True, [1]), {}, TypeError, "lengths"),
    (block_mask, (4, 2, 0, True, np.array([5])), {}, ValueError, "lengths"),
    (window_mask, (4, True), {}, TypeError, "w"),
    (cache_rows_needed, (-1, BLOCK), {}, ValueError, "t"),
    (cache_rows_needed, (1, None), {}, TypeError, "span"),
    (relative_cost, (0, 2, 1, "block", 4), {}, ValueError, "T"),
    (relative_cost, (8, 2, 3, "block", 4), {}, ValueError, "l"),
    (relative_cost, (8, 2, 1, "full"), {}, ValueError, "kind"),
    (relative_cost, (8, 2, 1, "block"), {}, TypeError, "b"),
    (relative_cost, (8, 2, 1, "window"), {}, TypeError, "w"),
    (relative_cost, (8, 2, 1, "block", 4, 4), {}, ValueError, "w"),
    (relative_cost, (8, 2, 1, "window", 4, 4), {}, ValueError, "b"),
    (reachability, (4, [np.ones((3, 3), bool)]), {}, ValueError, "schedule"),
    (reachability, (4, [np.ones((4, 4))]), {}, TypeError, "schedule"),
    (reachability, (4, np.ones((1, 1, 4, 4), bool)), {}, ValueError, "schedule"),
    (block_attend, (None, K, V, 4), {}, TypeError, "q"),
    (block_attend, (Q, K[..., 1:, :], V[..., 1:, :], 4), {}, ValueError, "k"),
    (block_attend, (Q, K, V, 0), {}, ValueError, "b"),
    (block_attend, (Q, K, V, 4, -1), {}, ValueError, "n"),
    (block_attend, (Q, K, V, 4, 0, None), {}, TypeError, "causal"),
    (block_attend, (Q, K, V, 4, 0, True, 0.0), {}, ValueError, "scale"),
    (block_attend, (Q, K, V, 4), {"lengths": LENGTHS}, ValueError, "lengths"),
    (block_attend, (Q, K, V, 4), {"lengths": LENGTHS[:1]}, ValueError, "lengths"),
    (block_attend, (Q, K, V, 4), {"lengths": LENGTHS / 2}, TypeError, "lengths"),
    (block_attend_backward, (Q, K, V, None, 4), {}, TypeError, "dout"),
    (block_attend_backward, (Q, K, V, Q, 4), {}, ValueError, "dout"),
    (block_attend_backward, (Q, K, V, DOUT, 4), {"dlse": DOUT}, ValueError, "dlse"),
    (window_attend, (Q, K, V, -1), {}, ValueError, "w"),
    (window_attend, (Q, K, V, 1, True, "1"), {}, TypeError, "scale"),
    (window_attend_backward, (Q, K, V, DOUT, 0.5), {}, TypeError, "w"),
    (layer_attend, (Q, K, V, "full"), {}, TypeError, "span"),
    (layer_attend_backward, (Q, K, V, DOUT, ("block",)), {}, ValueError, "span"),
    (cache_after, (K, V[..., 1:, :], BLOCK), {}, ValueError, "v"),
    (cache_after, (None, V, BLOCK), {}, TypeError, "k"),
    (decode_step, (Q, K[..., 1:, :], V[..., 1:, :], EMPTY, BLOCK), {}, ValueError, "k"),
    (decode_step, (Q, K, V, EMPTY, BLOCK), {"scale": -1.0}, ValueError, "scale"),
    (decode_step, (Q, K, V, EMPTY, ("block", 4)), {}, ValueError, "span"),
    (decode_step, (Q, K, V, (K, V), BLOCK), {}, TypeError, "cache"),
    (decode_step, (Q, K, V, Cache(K, V, 8), ("window", 2)), {}, ValueError, "cache.k"),
    (decode_step, (Q, K, V, EMPTY._replace(v=V), BLOCK), {}, ValueError, "cache.v"),
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
    for span in SPANS:
        layer_attend_backward(*inputs, DOUT, span, lengths=np.array([3, 8]))
        decode_step(*inputs, cache_after(K, V, span), span)
    for x, copy in zip(inputs, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
    assert masformer.MECHANISM.slug == "masformer"
