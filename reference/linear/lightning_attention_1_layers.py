"""TransNormerLLM's layers in parts, and their gradients: clauses S4, S8 and S14 of
`lightning_attention_1`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.linear.lightning_attention_1_checks import (
    BLOCK_WEIGHTS,
    Params,
    check_block,
    check_gla,
)
from attnspec.reference.linear.lightning_attention_1_decay import (
    decay_attend,
    decay_attend_recurrence_backward,
)
from attnspec.reference.linear.lightning_attention_1_rows import (
    lrpe,
    lrpe_backward,
    sglu_backward,
    srms_norm,
    srms_norm_backward,
    weight_gradient,
)
from attnspec.reference.linear.lightning_attention_2_batches import (
    attend_padded,
    attend_padded_backward,
)
from attnspec.reference.primitives.sigmoid import sigmoid, silu, silu_slope


class Heads(NamedTuple):
    """S4: what a token mixer's one product gives, before any activation."""

    q: np.ndarray  # (..., H, T, d), as k and v
    k: np.ndarray
    v: np.ndarray
    u: np.ndarray  # (..., T, D)


def project(x: np.ndarray, Wqkvu: np.ndarray, H: int) -> Heads:
    """S4: q, k, v by head and u of x (..., T, D); Wqkvu (D, 4 D).

    >>> q, k, v, u = project(np.ones((1, 2)), np.arange(16.0).reshape(2, 8), 2)
    >>> q.ravel(), u.ravel()
    (array([ 8., 10.]), array([20., 22.]))
    """
    q, k, v, u = np.split(x @ Wqkvu, 4, axis=-1)
    return Heads(split_heads(q, H), split_heads(k, H), split_heads(v, H), u)


def split_heads(x: np.ndarray, H: int) -> np.ndarray:
    """S4: (..., T, D) to (..., H, T, d), heads outermost in D.

    >>> split_heads(np.arange(4.0)[None], 2)[1]
    array([[2., 3.]])
    """
    return np.swapaxes(x.reshape(*x.shape[:-1], H, x.shape[-1] // H), -2, -3)


def merge_heads(o: np.ndarray) -> np.ndarray:
    """S8: (..., H, T, d) to (..., T, H d).

    >>> merge_heads(np.array([[[1.0]], [[2.0]]]))
    array([[1., 2.]])
    """
    rows = np.swapaxes(o, -2, -3)
    return rows.reshape(*rows.shape[:-2], rows.shape[-2] * rows.shape[-1])


def gated_norm(
    o: np.ndarray, u: np.ndarray, *, gate: str = "linear", norm: str = "srms", eps: float = 1e-6
) -> np.ndarray:
    """S8: the gate times the norm over all heads, (..., T, D), of o (..., H, T, d), u (..., T, D).

    >>> gated_norm(np.array([[[3.0]], [[4.0]]]), np.array([[5.0, 10.0]]), eps=0.0).round(4)
    array([[ 4.2426, 11.3137]])
    """
    return gate_of(u, gate) * srms_norm(_centred(merge_heads(o), norm), eps)


def gate_of(u: np.ndarray, gate: str) -> np.ndarray:
    """S8: u itself, or its sigmoid.

    >>> gate_of(np.array([0.0]), "sigmoid")
    array([0.5])
    """
    return u if gate == "linear" else sigmoid(u)


def _centred(m: np.ndarray, norm: str) -> np.ndarray:
    """A layer norm is the root mean square norm of a row without its mean."""
    if norm == "srms":
        return m
    return m - np.sum(m, axis=-1, keepdims=True) / max(m.shape[-1], 1)


def tnl_gla_backward(
    x: np.ndarray,
    params: Params,
    state: np.ndarray | None,
    offset: int,
    dy: np.ndarray,
    dstate: np.ndarray | None = None,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """S14: dx, the gradients of `params` by name and that of the state, of `tnl_gla`.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> one = np.ones((1, 1))
    >>> tnl_gla_backward(one, weights, None, 0, one, eps=0.0)[1]["Wo"]
    array([[1.]])
    """
    check_gla(x, params, state, offset, v_activation, gate, norm, eps)
    check_shaped("dy", dy, x.shape)
    return mix_backward(
        x, params, state, offset, dy, dstate, v_activation=v_activation, gate=gate, norm=norm,
        eps=eps,
    )  # fmt: skip


def tnl_block_backward(
    x: np.ndarray,
    params: Params,
    state: np.ndarray | None,
    offset: int,
    dy: np.ndarray,
    dstate: np.ndarray | None = None,
    *,
    v_activation: bool = False,
    gate: str = "linear",
    norm: str = "srms",
    eps: float = 1e-6,
) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """S14: dx, the gradients of `params` by name and that of the state, of `tnl_block`.

    >>> weights = {"Wqkvu": np.zeros((1, 4)), "Wo": np.zeros((1, 1)), "slopes": np.zeros(1)}
    >>> weights |= {name: np.zeros((1, 1)) for name in ("Wv", "Wu", "Wd")}
    >>> tnl_block_backward(np.ones((1, 1)), weights, None, 0, np.ones((1, 1)))[0]
    array([[1.]])
    """
    check_block(x, params, state, offset, v_activation, gate, norm, eps)
    check_shaped("dy", dy, x.shape)
    flags: dict[str, Any] = {"v_activation": v_activation, "gate": gate, "norm": norm, "eps": eps}
    mixed, _ = mix(srms_norm(x, eps), params, state, offset, **flags)
    middle = x + mixed
    through, *of_channels = sglu_backward(
        srms_norm(middle, eps), params["Wv"], params["Wu"], params["Wd"], dy
    )
    dmiddle = dy + srms_norm_backward(middle, eps, through)
    through, gradients, dS0 = tnl_gla_backward(
        srms_norm(x, eps), params, state, offset, dmiddle, dstate, **flags
    )
    gradients |= dict(zip(BLOCK_WEIGHTS, of_channels, strict=True))
    return dmiddle + srms_norm_backward(x, eps, through), gradients, dS0


def mix(
    x: np.ndarray,
    params: Params,
    state: np.ndarray | None,
    offset: int,
    valid: np.ndarray | None = None,
    *,
    v_activation: bool,
    gate: str,
    norm: str,
    eps: float,
) -> tuple[np.ndarray, np.ndarray]:
    """S4-S8: y and the state of `tnl_gla`, whose arguments are taken as right.

    With `valid` (S12), padded tokens do not count; what y holds there means nothing.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> flags = {"v_activation": False, "gate": "linear", "norm": "srms", "eps": 0.0}
    >>> mix(np.ones((2, 1)), weights, None, 0, **flags)[0].ravel()
    array([1., 1.])
    """
    q, k, v, u = project(x, params["Wqkvu"], params["slopes"].shape[0])
    q, k, v = silu(q), silu(k), silu(v) if v_activation else v
    if params.get("theta") is not None:
        q, k = lrpe(q, params["theta"], offset), lrpe(k, params["theta"], offset)
    if valid is None:
        o, state = decay_attend(q, k, v, params["slopes"], state)
    else:
        o, state = attend_padded(q, k, v, params["slopes"], valid, state)
    return gated_norm(o, u, gate=gate, norm=norm, eps=eps) @ params["Wo"], state


def mix_backward(
    x: np.ndarray,
    params: Params,
    state: np.ndarray | None,
    offset: int,
    dy: np.ndarray,
    dstate: np.ndarray | None = None,
    valid: np.ndarray | None = None,
    *,
    v_activation: bool,
    gate: str,
    norm: str,
    eps: float,
) -> tuple[np.ndarray, dict[str, Any], np.ndarray]:
    """S14: the gradients of `mix`, whose arguments are taken as right.

    With `valid` (S12), x and dy are 0 at padded tokens, and so is what they get.

    >>> weights = {"Wqkvu": np.ones((1, 4)), "Wo": np.ones((1, 1)), "slopes": np.zeros(1)}
    >>> flags = {"v_activation": False, "gate": "linear", "norm": "srms", "eps": 0.0}
    >>> one = np.ones((1, 1))
    >>> mix_backward(one, weights, None, 0, one, valid=np.array([True]), **flags)[1]["Wo"]
    array([[1.]])
    """
    H = params["slopes"].shape[0]
    Wqkvu, Wo, theta = params["Wqkvu"], params["Wo"], params.get("theta")
    heads = project(x, Wqkvu, H)
    q, k = silu(heads.q), silu(heads.k)
    v = silu(heads.v) if v_activation else heads.v
    lifted_q, lifted_k = (
        (q, k) if theta is None else (lrpe(q, theta, offset), lrpe(k, theta, offset))
    )
    if valid is None:
        o, _ = decay_attend(lifted_q, lifted_k, v, params["slopes"], state)
    else:
        o, _ = attend_padded(lifted_q, lifted_k, v, params["slopes"], valid, state)
    rows = _centred(merge_heads(o), norm)
    normed, opened = srms_norm(rows, eps), gate_of(heads.u, gate)
    dh = dy @ np.swapaxes(Wo, 0, 1)
    du = dh * normed
    if gate == "sigmoid":
        du = du * opened * sigmoid(-heads.u)
    drows = _centred(srms_norm_backward(rows, eps, dh * opened), norm)
    do = split_heads(drows, H)
    if valid is None:
        dq, dk, dv, dslopes, dS0 = decay_attend_recurrence_backward(
            lifted_q, lifted_k, v, params["slopes"], state, do, dstate
        )
    else:
        dq, dk, dv, dslopes, dS0 = attend_padded_backward(
            lifted_q, lifted_k, v, params["slopes"], valid, state, do, dstate
        )
    gradients = {"Wo": weight_gradient(opened * normed, dy), "slopes": dslopes}
    if theta is not None:
        dq, from_q = lrpe_backward(q, theta, offset, dq)
        dk, from_k = lrpe_backward(k, theta, offset, dk)
        gradients["theta"] = from_q + from_k
    dq, dk = dq * silu_slope(heads.q), dk * silu_slope(heads.k)
    if v_activation:
        dv = dv * silu_slope(heads.v)
    dz = np.concatenate([merge_heads(dq), merge_heads(dk), merge_heads(dv), du], axis=-1)
    gradients["Wqkvu"] = weight_gradient(x, dz)
    dx = dz @ np.swapaxes(Wqkvu, 0, 1)
    return dx, {name: gradients.get(name) for name in params}, dS0
