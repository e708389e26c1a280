"""What the layers of TransNormerLLM check: weights, states and options fit one another (K14)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnspec.reference.conventions import (
    check_array,
    check_bool,
    check_choice,
    check_integer,
    check_shaped,
    check_size,
)
from attnspec.reference.linear.flowformer_flows import check_eps
from attnspec.reference.linear.lightning_attention_1_rows import check_theta, check_weight
from attnspec.reference.linear.lightning_attention_2_chunks import check_slopes

Params = Mapping[str, Any]
GLA_WEIGHTS = ("Wqkvu", "Wo", "slopes")
BLOCK_WEIGHTS = ("Wv", "Wu", "Wd")
GATES = ("linear", "sigmoid")
NORMS = ("srms", "layer")


def check_gla(
    x: Any, params: Any, state: Any, offset: Any, v_activation: Any, gate: Any, norm: Any, eps: Any
) -> int:
    """K14: the number of heads, once x (..., T, D), the weights, the state and the options fit.

    >>> import numpy as np
    >>> check_gla(np.ones((1, 1)), {}, None, 0, False, "linear", "srms", 0.0)
    Traceback (most recent call last):
    ValueError: params: got no 'Wqkvu', expected Wqkvu, Wo, slopes
    """
    check_array("x", x, ("T", "D"))
    if not isinstance(params, Mapping):
        raise TypeError(f"params: got {type(params).__name__}, expected a mapping of arrays")
    check_names(params, GLA_WEIGHTS)
    check_slopes(params["slopes"], name="slopes")
    D, H = x.shape[-1], params["slopes"].shape[0]
    if H < 1 or D % H:
        raise ValueError(f"slopes: got {H} heads, expected a divisor of {D} (D, as in x)")
    check_weight("Wqkvu", params["Wqkvu"], (D, 4 * D), x)
    check_weight("Wo", params["Wo"], (D, D), x)
    if params.get("theta") is not None:
        check_theta(params["theta"], H, D // H)
    if state is not None:
        check_shaped("state", state, (*x.shape[:-2], *state_shape(params, D)))
        if state.dtype != x.dtype:
            raise TypeError(f"state: got dtype {state.dtype}, expected {x.dtype}, as x")
    check_integer("offset", offset, least=0)
    check_bool("v_activation", v_activation)
    check_choice("gate", gate, GATES)
    check_choice("norm", norm, NORMS)
    check_eps(eps)
    return H


def check_block(
    x: Any, params: Any, state: Any, offset: Any, v_activation: Any, gate: Any, norm: Any, eps: Any
) -> None:
    """K14: as `check_gla`, and the channel mixer's weights.

    >>> import numpy as np
    >>> check_block(np.ones((1, 1)), 5, None, 0, False, "linear", "srms", 0.0)
    Traceback (most recent call last):
    TypeError: params: got int, expected a mapping of arrays
    """
    check_gla(x, params, state, offset, v_activation, gate, norm, eps)
    check_names(params, (*GLA_WEIGHTS, *BLOCK_WEIGHTS))
    check_array("Wv", params["Wv"], ("D", "F"))
    check_size("Wv", params["Wv"].ndim, 2, "axes")
    D, F = x.shape[-1], params["Wv"].shape[1]
    for name, shape in (("Wv", (D, F)), ("Wu", (D, F)), ("Wd", (F, D))):
        check_weight(name, params[name], shape, x)


def state_shape(params: Params, D: int) -> tuple[int, int, int]:
    """S6: (H, d', d) of one sequence's state, d' = 2 d with LRPE.

    >>> import numpy as np
    >>> state_shape({"slopes": np.zeros(2), "theta": np.zeros((2, 3))}, 6)
    (2, 6, 3)
    """
    H = params["slopes"].shape[0]
    d = D // H
    return H, d if params.get("theta") is None else 2 * d, d


def check_names(params: Params, names: tuple[str, ...]) -> None:
    """K14: `params` has these names.

    >>> check_names({"a": 1}, ("a",))
    """
    for name in names:
        if name not in params:
            raise ValueError(f"params: got no {name!r}, expected {', '.join(names)}")
