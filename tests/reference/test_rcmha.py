"""RCMHA against outside evidence, its own properties and bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnspec.reference.dense.attention import attend as dense
from attnspec.reference.scores.rcmha import (
    attend,
    attend_segment,
    attend_segment_backward,
    content_scores,
    depthwise_causal_conv,
    depthwise_causal_conv_backward,
    init_state,
    memory_mask,
    project_heads,
    relative_attention,
    relative_attention_backward,
    relative_scores,
    relative_shift,
    step,
    update_memory,
)

quick = settings(max_examples=20, deadline=None, derandomize=True)
GOLDEN = ("mem5_t6", "t1_mem3")


def tokens(seed: int = 0, T: int = 4, M: int = 3, P: int = 9, heads: int = 2, dk: int = 3) -> Any:
    """Convolved q, k and v, and the tables R, b and u."""
    random = np.random.default_rng(seed)
    S = M + T
    shapes = (
        (2, heads, T, dk), (2, heads, S, dk), (2, heads, S, 5), (2 * P, heads, dk), (2 * P, heads),
        (heads, dk),
    )  # fmt: skip
    return tuple(random.standard_normal(shape) for shape in shapes)


def module(seed: int = 0, T: int = 5, M: int = 4, P: int = 12) -> dict[str, Any]:
    """The arguments of `attend_segment`."""
    random = np.random.default_rng(seed)
    shapes = {
        "x": (2, T, 6), "memory": (2, M, 6), "W": (4, 6, 6), "biases": (2, 6), "w": (3, 3, 3),
        "c": (3, 3), "R": (2 * P, 2, 3), "b": (2 * P, 2), "u": (2, 3),
    }  # fmt: skip
    return {name: random.standard_normal(shape) for name, shape in shapes.items()}


def by_token(x: np.ndarray) -> np.ndarray:
    """The authors' (tokens, batch, heads, dk) as (batch, heads, tokens, dk)."""
    return x.transpose(1, 2, 0, 3)


def tables(case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The stored rows P - S .. P + T - 1 as whole tables with P = S."""
    T, S = case["mask"].shape
    missing = S - T
    R, b = (
        np.concatenate([case[n], np.zeros((missing, *case[n].shape[1:]))])
        for n in ("pos_emb", "pos_bias")
    )
    return R, b, case["query_pos_bias"]


@pytest.mark.parametrize("name", GOLDEN)
def test_steps_are_those_of_the_authors(name: str, golden: Callable[[str], Any]) -> None:
    case = golden(f"rcmha__{name}")
    heads, M = case["meta"]["heads"], case["meta"]["memory"]
    R, b, u = tables(case)
    x, kv = (case[n].swapaxes(0, 1) for n in ("x", "kv"))
    convolved = []
    for who, source in (("query", x), ("key", kv), ("value", kv)):
        p = project_heads(
            source, case[f"{who}_0_linear_weight"].T, case.get(f"{who}_0_linear_bias"), heads
        )
        w, c = case[f"{who}_1_conv_weight"][:, 0], case[f"{who}_1_conv_bias"]
        convolved.append(depthwise_causal_conv(p, w, c)[0])
    q, k, v = convolved
    np.testing.assert_allclose(q, by_token(case["q_conv"]), atol=1e-12)
    np.testing.assert_allclose(k, by_token(case["k_conv"]), atol=1e-12)
    s = content_scores(q, u, k) + relative_scores(q, R, b, M)
    np.testing.assert_allclose(s, case["scores"].transpose(2, 3, 0, 1), atol=1e-12)
    mask = memory_mask(len(case["x"]), M)
    np.testing.assert_array_equal(mask, case["mask"])
    o, P = attend(s * q.shape[-1] ** -0.5, mask, v)
    np.testing.assert_allclose(P, case["attn"].transpose(2, 3, 0, 1), atol=1e-12)
    np.testing.assert_allclose(relative_attention(q, k, v, R, b, u), o, atol=1e-12)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_segment_is_that_of_the_authors(name: str, golden: Callable[[str], Any]) -> None:
    case = golden(f"rcmha__{name}")
    M = case["meta"]["memory"]
    who = ("query", "key", "value")
    W = np.stack([case[f"{n}_0_linear_weight"].T for n in who] + [case["output_weight"].T])
    biases = np.stack([case["value_0_linear_bias"], case["output_bias"]])
    w = np.stack([case[f"{n}_1_conv_weight"][:, 0] for n in who])
    c = np.stack([case[f"{n}_1_conv_bias"] for n in who])
    x, kv = (case[n].swapaxes(0, 1) for n in ("x", "kv"))
    out = attend_segment(x, kv[:, :M], W, biases, w, c, *tables(case))
    np.testing.assert_allclose(out, case["out"].swapaxes(0, 1), atol=1e-12)


@pytest.mark.parametrize(("T", "S"), [(1, 1), (1, 4), (3, 3), (4, 7), (6, 20)])
def test_shift_reads_what_its_definition_says(T: int, S: int) -> None:
    Bmat = np.random.default_rng(S).integers(-99, 99, (2, T, S + T)).astype(float)
    shifted = relative_shift(Bmat)
    for i in range(T):
        for j in range(S):
            np.testing.assert_array_equal(shifted[:, i, j], Bmat[:, i, T + j - i])


def test_without_tables_and_filters_it_is_causal_attention_over_memory_and_segment() -> None:
    q, k, v, R, b, u = tokens()
    out = relative_attention(q, k, v, 0 * R, 0 * b, 0 * u)
    np.testing.assert_allclose(out, dense(q, k, v, causal=True)[0], atol=1e-12)
    identity, zero = np.zeros((3, 3)), np.zeros(3)
    identity[:, -1] = 1
    np.testing.assert_array_equal(depthwise_causal_conv(k, identity, zero)[0], k)


@given(seed=st.integers(0, 99), T=st.integers(1, 6), M=st.integers(0, 6), spare=st.integers(0, 3))
@quick
def test_scores_are_looked_up_by_distance(seed: int, T: int, M: int, spare: int) -> None:
    P = M + T + spare
    q, k, _, R, b, u = tokens(seed, T, M, P)
    got = content_scores(q, u, k) + relative_scores(q, R, b, M)
    for i in range(T):
        for j in range(M + T):
            r = P + (j - M) - i
            expected = np.sum((q[:, :, i] + u) * k[:, :, j] + q[:, :, i] * R[r], axis=-1) + b[r]
            np.testing.assert_allclose(got[:, :, i, j], expected, atol=1e-12)


def test_scores_do_not_know_where_the_memory_ends() -> None:
    q, _, _, R, b, _ = tokens(T=5, M=3)
    np.testing.assert_allclose(
        relative_scores(q, R, b, 3)[:, :, 1:], relative_scores(q[:, :, 1:], R, b, 4), atol=1e-12
    )


def test_a_number_added_to_all_distances_changes_nothing_but_a_vector_does() -> None:
    q, k, v, R, b, u = tokens()
    out = relative_attention(q, k, v, R, b, u)
    np.testing.assert_allclose(relative_attention(q, k, v, R, b + 3.0, u), out, atol=1e-12)
    # A vector adds a constant to each row of scores only while it is the same at all distances.
    moved = R.copy()
    moved[: len(R) // 2 - 1] += 1.0
    assert np.abs(relative_attention(q, k, v, moved, b, u) - out).max() > 1e-3


def test_later_tokens_do_not_matter_to_the_whole() -> None:
    a = module()
    out = attend_segment(**a)
    a["x"] = a["x"].copy()
    a["x"][:, 3:] += 1.0
    np.testing.assert_array_equal(attend_segment(**a)[:, :3], out[:, :3])


@pytest.mark.parametrize("K", [1, 2, 3, 5])
@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_chunks_with_a_state_convolve_as_the_whole(K: int, chunk: int) -> None:
    random = np.random.default_rng(K)
    p, w, b = (random.standard_normal(s) for s in ((2, 2, 9, 4), (4, K), (4,)))
    whole, last = depthwise_causal_conv(p, w, b)
    state, parts = None, []
    for first in range(0, 9, chunk):
        y, state = depthwise_causal_conv(p[:, :, first : first + chunk], w, b, state)
        parts.append(y)
    np.testing.assert_allclose(np.concatenate(parts, axis=2), whole, atol=1e-12)
    np.testing.assert_array_equal(state, last)


def test_convolution_is_linear_and_moves_with_its_input() -> None:
    random = np.random.default_rng(2)
    p, w, zero = random.standard_normal((2, 8, 4)), random.standard_normal((4, 3)), np.zeros(4)
    y = depthwise_causal_conv(p, w, zero)[0]
    np.testing.assert_allclose(depthwise_causal_conv(3 * p, w, zero)[0], 3 * y, atol=1e-12)
    moved = depthwise_causal_conv(p[:, 2:], w, zero)[0]
    np.testing.assert_allclose(moved[:, 2:], y[:, 4:], atol=1e-12)
    impulse = np.zeros((1, 6, 4))
    impulse[:, 1] = 1
    response = depthwise_causal_conv(impulse, w, zero)[0][0]
    np.testing.assert_array_equal(response[1:4], w[:, ::-1].T)
    assert not response[0].any()
    assert not response[4:].any()


@pytest.mark.parametrize("cuts", [(2, 5), (1, 2, 3, 4, 5, 6), (3,)])
def test_a_carried_convolution_does_not_know_the_cuts_and_a_reset_one_does(
    cuts: tuple[int, ...],
) -> None:
    a = module(T=8, M=0)
    text, memory = a.pop("x"), a.pop("memory")
    whole = attend_segment(text, None, **a)
    for kind in ("carry", "reset"):
        parts, memory = [], None
        for first, last in zip((0, *cuts), (*cuts, 8), strict=True):
            segment = text[:, first:last]
            parts.append(attend_segment(segment, memory, **a, q_conv_state=kind))
            memory = update_memory(memory, segment, 99)
        same = np.allclose(np.concatenate(parts, axis=1), whole, atol=1e-12)
        assert same == (kind == "carry")


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_decoding_is_a_segment(chunk: int) -> None:
    a = module(T=8, M=0)
    W, biases, w, c, R, b, u = (a[n] for n in ("W", "biases", "w", "c", "R", "b", "u"))
    q, k, v = (
        project_heads(a["x"], W[n], biases[0] if n == 2 else None, 2) for n in range(3)
    )  # fmt: skip
    state, parts = init_state(q, 3), []
    for first in range(0, 8, chunk):
        new = (x[:, :, first : first + chunk] for x in (q, k, v))
        out, state = step(*new, w, c, R, b, u, state)
        parts.append(out)
    o = np.concatenate(parts, axis=2).swapaxes(1, 2).reshape(2, 8, 6)
    expected = attend_segment(a["x"], None, W, biases, w, c, R, b, u)
    np.testing.assert_allclose(o @ W[3] + biases[1], expected, atol=1e-12)


def test_gradients_are_finite_differences() -> None:
    for causal in (True, False):
        inputs = tokens()
        dout = np.random.default_rng(1).standard_normal((2, 2, 4, 5))
        compare(
            lambda *x, causal=causal: relative_attention(*x, causal=causal),
            relative_attention_backward(*inputs, dout, causal=causal), inputs, dout,
        )  # fmt: skip
    random = np.random.default_rng(3)
    shapes = ((2, 2, 4, 3), (3, 3), (3,), (2, 2, 2, 3))
    inputs = tuple(random.standard_normal(s) for s in shapes)
    dy, dstate = random.standard_normal((2, 2, 4, 3)), random.standard_normal((2, 2, 2, 3))
    compare(
        lambda *x: np.concatenate(depthwise_causal_conv(*x), axis=2),
        depthwise_causal_conv_backward(*inputs, dy, dstate), inputs,
        np.concatenate([dy, dstate], axis=2),
    )  # fmt: skip


@pytest.mark.parametrize("q_conv_state", ["reset", "carry"])
@pytest.mark.parametrize("memory", [0, 3])
def test_a_segments_gradients_are_finite_differences(memory: int, q_conv_state: str) -> None:
    random, P = np.random.default_rng(4), 4 + memory + 1
    shapes = ((2, 4, 6), (2, memory, 6), (4, 6, 6), (2, 6), (3, 3, 3), (3, 3), (2 * P, 2, 3),
              (2 * P, 2), (2, 3))  # fmt: skip
    inputs = tuple(random.standard_normal(shape) for shape in shapes)
    dout = random.standard_normal((2, 4, 6))
    gradients = attend_segment_backward(*inputs, dout, q_conv_state)
    compare(lambda *x: attend_segment(*x, q_conv_state), gradients, inputs, dout)
    x, _, *rest = inputs
    dx, dmemory, *_ = attend_segment_backward(x, None, *rest, dout, q_conv_state)
    assert dmemory is None
    if not memory:
        np.testing.assert_allclose(dx, gradients[0], atol=1e-12)
    with pytest.raises(ValueError, match=r"^dout: got"):
        attend_segment_backward(*inputs, dout[:1])


def compare(function: Any, gradients: Any, inputs: Any, upstream: np.ndarray) -> None:
    random = np.random.default_rng(9)
    for n, gradient in enumerate(gradients):
        direction = random.standard_normal(inputs[n].shape)
        moved = [
            np.sum(upstream * function(*inputs[:n], inputs[n] + s * direction, *inputs[n + 1 :]))
            for s in (1e-6, -1e-6)
        ]
        numeric = (moved[0] - moved[1]) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-6, atol=1e-7)


def test_distances_that_nobody_sees_have_no_gradient_and_are_not_read() -> None:
    q, k, v, R, b, u = tokens(T=4, M=3, P=9)
    dout = np.ones((2, 2, 4, 5))
    *_, dR, db, _ = relative_attention_backward(q, k, v, R, b, u, dout)
    seen = np.arange(9 - 6, 9 + 1)
    hidden = np.setdiff1d(np.arange(18), seen)
    assert not dR[hidden].any()
    assert not db[hidden].any()
    assert dR[seen].any(axis=(1, 2)).all()
    out = relative_attention(q, k, v, R, b, u)
    R[hidden], b[hidden] = np.nan, np.nan
    np.testing.assert_array_equal(relative_attention(q, k, v, R, b, u), out)
    assert all(np.isfinite(g).all() for g in relative_attention_backward(q, k, v, R, b, u, dout))


def test_one_token_without_memory_is_its_value() -> None:
    q, k, v, R, b, u = tokens(T=1, M=0)
    np.testing.assert_array_equal(relative_attention(q, k, v, R, b, u), v)


def test_weights_sum_to_one() -> None:
    q, k, v, R, b, u = tokens()
    _, P = attend(content_scores(q, u, k) + relative_scores(q, R, b, 3), memory_mask(4, 3), v)
    np.testing.assert_allclose(P.sum(axis=-1), 1.0)


def test_heads_and_batch_entries_change_places() -> None:
    q, k, v, R, b, u = tokens()
    out = relative_attention(q, k, v, R, b, u)
    turned = [x[::-1, ::-1] for x in (q, k, v)]
    got = relative_attention(*turned, R[:, ::-1], b[:, ::-1], u[::-1])
    np.testing.assert_allclose(got, out[::-1, ::-1], atol=1e-12)


def test_leading_axes_are_free() -> None:
    q, k, v, R, b, u = tokens()
    out = relative_attention(q, k, v, R, b, u)
    np.testing.assert_allclose(relative_attention(q[0], k[0], v[0], R, b, u), out[0], atol=1e-12)
    a = module()
    whole = attend_segment(**a)
    a["x"], a["memory"] = a["x"][1], a["memory"][1]
    np.testing.assert_allclose(attend_segment(**a), whole[1], atol=1e-12)


def test_memory_keeps_the_newest_tokens() -> None:
    old, new = np.arange(3.0)[:, None], np.arange(3.0, 5.0)[:, None]
    for length, expected in ((0, []), (1, [4]), (3, [2, 3, 4]), (9, [0, 1, 2, 3, 4])):
        np.testing.assert_array_equal(update_memory(old, new, length).ravel(), expected)
    np.testing.assert_array_equal(update_memory(None, new, 9), new)


q, k, v, R, b, u = tokens()
w3, c3 = np.ones((3, 3, 3)), np.ones((3, 3))
a = module()
part = {n: x for n, x in a.items() if n != "x"}
BAD: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    ("x", TypeError, lambda: project_heads([1.0], a["W"][0], None, 2)),
    ("W", ValueError, lambda: project_heads(a["x"], a["W"][0, :5], None, 2)),
    ("heads", ValueError, lambda: project_heads(a["x"], a["W"][0], None, 4)),
    ("heads", TypeError, lambda: project_heads(a["x"], a["W"][0], None, 2.0)),
    ("b", ValueError, lambda: project_heads(a["x"], a["W"][0], np.ones(5), 2)),
    ("w", ValueError, lambda: depthwise_causal_conv(q, np.ones((4, 3)), np.ones(3))),
    ("w", ValueError, lambda: depthwise_causal_conv(q, np.ones((3, 0)), np.ones(3))),
    ("b", ValueError, lambda: depthwise_causal_conv(q, w3[0], np.ones(2))),
    ("b", TypeError, lambda: depthwise_causal_conv(q, w3[0], np.ones(3, np.float32))),
    ("state", ValueError, lambda: depthwise_causal_conv(q, w3[0], c3[0], q[:, :, :1])),
    ("dy", ValueError, lambda: depthwise_causal_conv_backward(q, w3[0], c3[0], None, k)),
    (
        "dnew_state",
        ValueError,
        lambda: depthwise_causal_conv_backward(q, w3[0], c3[0], None, q, q[:, :, :1]),
    ),
    ("Bmat", ValueError, lambda: relative_shift(np.ones((3, 5)))),
    ("u", ValueError, lambda: content_scores(q, u[:1], k)),
    ("k", ValueError, lambda: content_scores(q, u, v)),
    ("k", ValueError, lambda: content_scores(q, u, k[:, :1])),
    ("R", ValueError, lambda: relative_scores(q, R[1:], b[1:], 3)),
    ("R", ValueError, lambda: relative_scores(q, R, b, 6)),
    ("R", ValueError, lambda: relative_scores(q, R[:, :1], b, 3)),
    ("b", ValueError, lambda: relative_scores(q, R, b[1:], 3)),
    ("M", ValueError, lambda: relative_scores(q, R, b, -1)),
    ("T", ValueError, lambda: memory_mask(-1, 2)),
    ("M", TypeError, lambda: memory_mask(1, True)),
    ("mask", ValueError, lambda: attend(np.ones((2, 2, 4, 7)), memory_mask(4, 2), v)),
    ("mask", TypeError, lambda: attend(np.ones((2, 2, 4, 7)), np.ones((4, 7)), v)),
    ("v", ValueError, lambda: attend(np.ones((2, 2, 4, 6)), None, v)),
    ("k", ValueError, lambda: relative_attention(q, k[:, :, :3], v, R, b, u)),
    ("v", ValueError, lambda: relative_attention(q, k, v[:, :, :6], R, b, u)),
    ("dout", TypeError, lambda: relative_attention_backward(q, k, v, R, b, u, None)),
    ("dout", ValueError, lambda: relative_attention_backward(q, k, v, R, b, u, q[:1])),
    ("k", ValueError, lambda: relative_attention_backward(q, k[:, :, :3], v, R, b, u, q)),
    ("mem_len", ValueError, lambda: update_memory(None, a["x"], -1)),
    ("old", ValueError, lambda: update_memory(a["x"][:1], a["x"], 4)),
    ("memory", ValueError, lambda: attend_segment(a["x"], **{**part, "memory": a["x"][:1]})),
    ("W", ValueError, lambda: attend_segment(a["x"], **{**part, "W": a["W"][:3]})),
    ("u", ValueError, lambda: attend_segment(a["x"], **{**part, "u": np.ones((3, 3))})),
    ("q_conv_state", ValueError, lambda: attend_segment(a["x"], **part, q_conv_state="keep")),
    ("K", ValueError, lambda: init_state(q, 0)),
    ("state", TypeError, lambda: step(q, q, q, w3, c3, R, b, u, None)),
    ("c", ValueError, lambda: step(q, q, q, w3, c3[:2], R, b, u, init_state(q, 3))),
    ("state", ValueError, lambda: step(q, q, q, w3, c3, R, b, u, init_state(q, 2))),
    ("k", ValueError, lambda: step(q, k, q, w3, c3, R, b, u, init_state(q, 3))),
]


@pytest.mark.parametrize(("name", "error", "call"), BAD)
def test_bad_input_is_named(name: str, error: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=f"^{name}: got "):
        call()
