"""What TransNormerLLM's layers share: projections, the way out, and the checks of arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_choice,
    check_integer,
    check_tensor,
    product,
    wide_dtype,
)
from attnspec.fast.engines.rows import gated_norm as norm_rows
from attnspec.fast.engines.rows import lift
from attnspec.fast.linear.lightning_attention_1_rows import check_eps, check_theta, check_weight
from attnspec.fast.linear.lightning_attention_2_chunks import as_state, check_slopes

Params = Mapping[str, Any]
GLA_WEIGHTS = ("Wqkvu", "Wo", "slopes")
BLOCK_WEIGHTS = ("Wv", "Wu", "Wd")
GATES = ("linear", "sigmoid")
NORMS = ("srms", "layer")


class Options(NamedTuple):
    """The variants of a layer."""

    v_activation: Any
    gate: Any
    norm: Any
    eps: Any


class Inputs(NamedTuple):
    """Activated and lifted queries and keys, values by head, and the gate (batch, T, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    u: Tensor


def inputs_of(
    x: Tensor,
    params: Params,
    options: Options,
    backend: str | None,
    *,
    offset: int = 0,
    positions: Tensor | None = None,
) -> Inputs:
    """What the attention and the gate take from x (batch, T, D), in one product."""
    H, theta = params["slopes"].shape[0], params.get("theta")
    parts = product(x, params["Wqkvu"]).split(x.shape[2], -1)
    q, k, v = (part.unflatten(-1, (H, -1)).transpose(1, 2) for part in parts[:3])
    q, k = (
        lift(y, theta, positions=positions, offset=offset, activate=True, backend=backend)
        for y in (q, k)
    )
    if options.v_activation:
        v = lift(v, activate=True, backend=backend)
    return Inputs(q, k, v, parts[3])


def output_of(
    o: Tensor, u: Tensor, params: Params, options: Options, backend: str | None
) -> Tensor:
    """y (batch, T, D): the norm over all heads of o (batch, H, T, d), the gate and a product."""
    if options.norm == "layer":
        o = (o - o.mean((1, 3), keepdim=True, dtype=wide_dtype(o))).to(o.dtype)
    if options.gate == "sigmoid":
        u = u.sigmoid()
    return product(norm_rows(o, u, eps=options.eps, backend=backend), params["Wo"])


def check_gla(x: Any, params: Any, state: Any, offset: Any, options: Options) -> Tensor | None:
    """The state in the dtype of states, once x (batch, T, D) and all else fit one another."""
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    check_params(x, params)
    check_integer("offset", offset, least=0)
    check_options(options)
    return as_state("state", state, (x.shape[0], *state_shape(params, x.shape[2])), x)


def check_params(x: Tensor, params: Any) -> None:
    """The weights of a token mixer fit x (batch, T, D)."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: got {type(params).__name__}, expected a mapping of tensors")
    check_names(params, GLA_WEIGHTS)
    check_slopes(params["slopes"], name="slopes")
    D, H = x.shape[2], params["slopes"].shape[0]
    if H < 1 or D % H:
        raise ValueError(f"slopes: got {H} heads, expected a divisor of {D} (D, as in x)")
    check_weight("Wqkvu", params["Wqkvu"], (D, 4 * D), x)
    check_weight("Wo", params["Wo"], (D, D), x)
    if params.get("theta") is not None:
        check_theta(params["theta"], H, D // H, x)


def check_options(options: Options) -> None:
    if not isinstance(options.v_activation, bool):
        raise TypeError(f"v_activation: got {options.v_activation!r}, expected a bool")
    check_choice("gate", options.gate, GATES)
    check_choice("norm", options.norm, NORMS)
    check_eps(options.eps)


def check_channels(x: Tensor, params: Params) -> None:
    """The weights of the channel mixer fit x (batch, T, D)."""
    check_names(params, (*GLA_WEIGHTS, *BLOCK_WEIGHTS))
    check_tensor("Wv", params["Wv"], ("D", "F"), FLOATS)
    D, F = x.shape[2], params["Wv"].shape[1]
    for name, shape in (("Wv", (D, F)), ("Wu", (D, F)), ("Wd", (F, D))):
        check_weight(name, params[name], shape, x)


def check_names(params: Params, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in params:
            raise ValueError(f"params: got no {name!r}, expected {', '.join(names)}")


def state_shape(params: Params, D: int) -> tuple[int, int, int]:
    """(H, d', d) of one sequence's state, d' = 2 d with LRPE."""
    H = params["slopes"].shape[0]
    d = D // H
    return H, d if params.get("theta") is None else 2 * d, d
