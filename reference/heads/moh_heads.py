"""MoH's heads: attention in active rows, the gated mix of its outputs, decoding (S6, S7, S11).

The clauses are those of `moh`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_attention_inputs, check_size
from attnspec.reference.dense import attention as dense
from attnspec.reference.dense.attention import State


def head_outputs(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    active: np.ndarray | None = None,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
) -> np.ndarray:
    """S6: h (..., heads, q_tokens, dv), 0 in the rows that are not active.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), v (..., kv_heads, k_tokens, dv);
    `active` bool (..., q_tokens, heads), in the layout of gates, all heads unless given; `key_mask`
    bool (..., k_tokens), True = a real key.

    >>> q, v = np.zeros((2, 1, 1)), np.array([[[4.0], [8.0]]])
    >>> head_outputs(q, np.zeros((1, 2, 1)), v, np.array([[True, False]])).ravel()
    array([6., 0.])
    """
    mask = _mask(q, k, v, active, key_mask)
    return dense.attend(q, k, v, causal=causal, mask=mask, scale=scale)[0]


def head_outputs_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    active: np.ndarray | None,
    dout: np.ndarray,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S8: dq, dk, dv of `head_outputs`, shaped as q, k, v; dout of inactive rows is not used.

    >>> one = np.ones((2, 1, 1))
    >>> head_outputs_backward(one, one, one, np.array([[True, False]]), one)[2].ravel()
    array([1., 0.])
    """
    mask = _mask(q, k, v, active, key_mask)
    check_array("dout", dout, ("heads", "q_tokens", "dv"))
    if active is not None:
        rows = np.swapaxes(active, -1, -2)[..., None]
        q = np.where(rows, q, np.zeros_like(q))
        dout = np.where(rows, dout, np.zeros_like(dout))
    return dense.attend_backward(q, k, v, dout, causal=causal, mask=mask, scale=scale)


def mix_heads(
    gates: np.ndarray, head_outputs: np.ndarray, Wo: np.ndarray, bo: np.ndarray | None = None
) -> np.ndarray:
    """S7: out (..., tokens, D) of gates (..., tokens, H) and head_outputs (..., H, tokens, dv).

    Wo (D, H * dv), bo (D,).

    >>> h = np.array([[[2.0]], [[3.0]]])
    >>> mix_heads(np.array([[1.0, 0.5]]), h, np.array([[1.0, 10.0]]), np.array([100.0]))
    array([[117.]])
    """
    check_mix(gates, head_outputs, Wo, bo)
    mixed = _concatenated(np.swapaxes(gates, -1, -2)[..., None] * head_outputs)
    out = np.einsum("...tw,ow->...to", mixed, Wo)
    return out if bo is None else out + bo


def mix_heads_backward(
    gates: np.ndarray,
    head_outputs: np.ndarray,
    Wo: np.ndarray,
    bo: np.ndarray | None,
    dout: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S8: the gradients of gates, head_outputs, Wo and bo.

    >>> one = np.ones((1, 1, 1))
    >>> [x.item() for x in mix_heads_backward(2 * one[0], 3 * one, 5 * one[0], None, one[0])]
    [15.0, 10.0, 6.0, 1.0]
    """
    check_mix(gates, head_outputs, Wo, bo)
    check_array("dout", dout, ("tokens", "D"))
    factors = np.swapaxes(gates, -1, -2)[..., None]
    wide = dout @ Wo
    split = wide.reshape(*wide.shape[:-1], gates.shape[-1], head_outputs.shape[-1])
    dmixed = np.swapaxes(split, -2, -3)
    dgates = np.einsum("...htv,...htv->...th", dmixed, head_outputs)
    leading = tuple(range(dout.ndim - 2))
    mixed = _concatenated(factors * head_outputs)
    dWo = np.sum(np.einsum("...to,...tw->...ow", dout, mixed), axis=leading)
    return dgates, factors * dmixed, dWo, np.sum(dout, axis=(*leading, -2))


def step(
    state: State,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    active: np.ndarray | None = None,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, State]:
    """S11: h (..., heads, tokens, dv) of new tokens, and the state that includes them.

    Arguments as in `head_outputs`; the first state is dense attention's `init_state`.

    >>> one = np.ones((1, 1, 1))
    >>> h, state = step(State(one[:, :0], one[:, :0]), one, one, 5 * one, np.array([[False]]))
    >>> h.item(), state.v.item()
    (0.0, 5.0)
    """
    check_attention_inputs(q, k, v)
    check_size("k", k.shape[-2], q.shape[-2], "tokens, as in q")
    for name, old, new in (("state.k", state.k, k), ("state.v", state.v, v)):
        if (*old.shape[:-2], old.shape[-1]) != (*new.shape[:-2], new.shape[-1]):
            raise ValueError(f"{name}: got shape {old.shape}, expected that of {new.shape}")
    keys = np.concatenate([state.k, k], axis=-2)
    values = np.concatenate([state.v, v], axis=-2)
    return head_outputs(q, keys, values, active, causal=True, scale=scale), State(keys, values)


def _concatenated(x: np.ndarray) -> np.ndarray:
    """(..., heads, tokens, dv) to (..., tokens, heads * dv)."""
    x = np.swapaxes(x, -2, -3)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _mask(q: Any, k: Any, v: Any, active: Any, key_mask: Any) -> np.ndarray | None:
    """Who may see whom, causality aside, and the checks of all arguments."""
    check_attention_inputs(q, k, v)
    mask: np.ndarray | None = None
    if active is not None:
        check_array("active", active, ("q_tokens", "heads"), dtype="bool")
        expected = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        if active.shape != expected:
            raise ValueError(f"active: got shape {active.shape}, expected {expected}")
        mask = np.swapaxes(active, -1, -2)[..., None]
    if key_mask is not None:
        check_array("key_mask", key_mask, ("k_tokens",), dtype="bool")
        expected = (*k.shape[:-3], k.shape[-2])
        if key_mask.shape != expected:
            raise ValueError(f"key_mask: got shape {key_mask.shape}, expected {expected}")
        real = key_mask[..., None, None, :]
        mask = real if mask is None else mask & real
    return mask


def check_mix(gates: Any, head_outputs: Any, Wo: Any, bo: Any) -> None:
    """S7, K14: the arguments of `mix_heads` fit one another.

    >>> check_mix(np.ones((1, 2)), np.ones((2, 1, 3)), np.ones((4, 5)), None)
    Traceback (most recent call last):
    ValueError: Wo: got 5, expected 6 (H * dv, as in head_outputs)
    """
    check_array("gates", gates, ("tokens", "H"))
    check_array("head_outputs", head_outputs, ("H", "tokens", "dv"))
    check_array("Wo", Wo, ("D", "H * dv"))
    given = {"gates": gates, "Wo": Wo}
    if bo is not None:
        check_array("bo", bo, ("D",))
        given["bo"] = bo
    for name, x in given.items():
        if x.dtype != head_outputs.dtype:
            raise TypeError(
                f"{name}: got dtype {x.dtype}, expected {head_outputs.dtype}, as head_outputs"
            )
    *leading, heads, tokens, dv = head_outputs.shape
    if gates.shape != (*leading, tokens, heads):
        raise ValueError(f"gates: got shape {gates.shape}, expected {(*leading, tokens, heads)}")
    if Wo.ndim != 2:
        raise ValueError(f"Wo: got shape {Wo.shape}, expected (D, {heads * dv})")
    check_size("Wo", Wo.shape[1], heads * dv, "H * dv, as in head_outputs")
    if bo is not None and bo.shape != Wo.shape[:1]:
        raise ValueError(f"bo: got shape {bo.shape}, expected {Wo.shape[:1]}, as in Wo")
