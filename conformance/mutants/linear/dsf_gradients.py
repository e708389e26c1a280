"""Wrong gradients of `dsf`: what they forget, the states at both ends above all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from attnspec.conformance.mutants import Mutant, replacing, right
from attnspec.reference.linear import dsf_layer, dsf_mixers, dsf_rnn, dsf_ssm, dsf_system
from attnspec.reference.linear.dsf_recurrence import elementwise_scan

Backward = Callable[..., tuple[Any, ...]]


def da_of_new_state(a: Any, x: Any, h0: Any, dh: Any, dlast: Any) -> Any:
    """da = g h_t, not g h_(t-1)."""
    _, dx, dh0 = dsf_system.elementwise_scan_backward(a, x, h0, dh, dlast)
    return dx * elementwise_scan(a, x, h0)[0], dx, dh0


def delta_only_decays(
    Delta: Any, A: Any, b: Any, c: Any, u: Any, D: Any, h0: Any, dy: Any, dh: Any
) -> tuple[Any, ...]:
    """The gradient of Delta through the input is lost."""
    dDelta, *rest = dsf_ssm.s6_scan_backward(Delta, A, b, c, u, D, h0, dy, dh)
    du = rest[3] if D is None else rest[3] - D * dy
    return dDelta - du * u / np.where(Delta == 0, 1, Delta), *rest


def detached_eta(q: Any, k: Any, v: Any, state: Any, dy: Any, dh: Any, dz: Any) -> tuple[Any, ...]:
    """The normaliser of linear attention counts as a constant."""
    h0, z0 = dsf_mixers.check_pair(state, q, v)
    phi, psi = dsf_mixers.feature_map(q), dsf_mixers.feature_map(k)
    ones = np.ones_like(v[..., :1])
    eta, _ = dsf_mixers.read_scan(phi, psi, ones, z0[..., None, :])
    dphi, dpsi, dv, dh0 = dsf_mixers.read_scan_backward(phi, psi, v, h0, dy / eta, dh)
    dpsi = dpsi + dz[..., None, :]
    dstate = None if state is None else (dh0, dz)
    return dphi * dsf_mixers.feature_slope(q), dpsi * dsf_mixers.feature_slope(k), dv, dstate


def changing(backward: Backward, place: int, change: Callable[[Any], Any]) -> Backward:
    """One of the gradients changed."""

    def call(**a: Any) -> tuple[Any, ...]:
        made = list(backward(**a))
        made[place] = change(made[place])
        return tuple(made)

    return call


def alpha_below_0(**a: Any) -> tuple[Any, ...]:
    """relu(alpha) has a slope of 1 everywhere."""
    made = list(dsf_rnn.qlstm_backward(**a))
    above = dsf_rnn.qlstm_backward(**{**a, "alpha": max(a["alpha"], 0.0)})
    made[4] = above[4]
    return tuple(made)


def rows_end_here(seen: Any, weight: Any, dz: Any) -> tuple[Any, Any]:
    """The convolution hands nothing to the rows before the first token."""
    dseen, dweight = CONVOLUTION_BACKWARD(seen, weight, dz)
    dseen[..., : weight.shape[-1] - 1, :] = 0
    return dseen, dweight


def turned_filter(seen: Any, weight: Any, dz: Any) -> tuple[Any, Any]:
    """The gradient of the convolution's weight has its taps in the order of a true convolution."""
    dseen, dweight = CONVOLUTION_BACKWARD(seen, weight, dz)
    return dseen, np.ascontiguousarray(dweight[..., ::-1])


CONVOLUTION_BACKWARD = dsf_layer._convolution_backward


def without_last(backward: Backward, *names: str) -> Backward:
    """The last state's gradient is dropped: the state counts as a constant that nothing reads."""
    return lambda **a: backward(**{**a, **dict.fromkeys(names)})


def starts_constant(backward: Backward) -> Backward:
    """The state handed in, which comes last, has a gradient of 0."""

    def call(**a: Any) -> tuple[Any, ...]:
        *rest, first = backward(**a)
        if isinstance(first, tuple):
            return *rest, tuple(0 * x for x in first)
        return *rest, None if first is None else 0 * first

    return call


def mutant(name: str, bug: str, backward: Backward) -> Mutant:
    operation, _, short = name.partition(":")
    qualified = f"dsf.{operation}"
    return Mutant(f"dsf.{short}", qualified, "gradient", bug, right(qualified), backward)


LAST = "The last state has no gradient."
FIRST = "The state handed in counts as a constant."

MUTANTS = (
    mutant("elementwise_scan:new-state", "da is formed with the state after the token.",
           da_of_new_state),
    mutant("linear_attention:detached", "eta counts as a constant.", detached_eta),
    mutant("s6_scan:delta-decays", "Delta has no gradient through the input.", delta_only_decays),
    mutant("elementwise_scan:last-row", LAST,
           without_last(dsf_system.elementwise_scan_backward, "dlast")),
    mutant("dsf_scan:last-h", LAST, without_last(dsf_system.dsf_scan_backward, "dh")),
    mutant("linear_attention:last-values", LAST,
           without_last(dsf_mixers.linear_attention_backward, "dh")),
    mutant("linear_attention:last-sum", LAST,
           without_last(dsf_mixers.linear_attention_backward, "dz")),
    mutant("linear_attention:first-pair", FIRST,
           starts_constant(dsf_mixers.linear_attention_backward)),
    mutant("normalised_attention:first-products", FIRST,
           starts_constant(dsf_mixers.normalised_attention_backward)),
    mutant("s6_scan:last-s6", LAST, without_last(dsf_ssm.s6_scan_backward, "dh")),
    mutant("ssd_scan:first-ssd", FIRST, starts_constant(dsf_ssm.ssd_scan_backward)),
    mutant("qlstm:last-cell", LAST, without_last(dsf_rnn.qlstm_backward, "dh")),
    mutant("qlstm:alpha-grows", "dalpha has the sign of a decay that grows with alpha.",
           changing(dsf_rnn.qlstm_backward, 4, lambda x: -x)),
    mutant("qlstm:alpha-below", "relu(alpha) has a slope below 0.", alpha_below_0),
    mutant("qlstm_layer:gate-slope", "gelu counts as linear.",
           replacing(dsf_layer.qlstm_layer_backward, gelu_slope=np.ones_like)),
    mutant("qlstm_layer:first-rows", "The rows handed in count as constants.",
           replacing(dsf_layer.qlstm_layer_backward, _convolution_backward=rows_end_here)),
    mutant("qlstm_layer:turned", "The taps of the convolution's gradient are turned round.",
           replacing(dsf_layer.qlstm_layer_backward, _convolution_backward=turned_filter)),
    mutant("qlstm_layer:last-rows", "The last rows have no gradient.",
           without_last(dsf_layer.qlstm_layer_backward, "drows")),
    mutant("qlstm_layer:fixed-alpha", "alpha of a layer counts as a constant.",
           changing(dsf_layer.qlstm_layer_backward, 7, lambda x: 0 * x)),
    mutant("rg_lru:first-cell", FIRST, starts_constant(dsf_rnn.rg_lru_backward)),
)  # fmt: skip
