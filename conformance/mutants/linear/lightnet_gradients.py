"""Wrong gradients of LightNet's general rule and of its position encodings."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.mutants import altering, right, spoiling
from attnspec.conformance.mutants.linear.lightnet import tampered
from attnspec.reference.linear import lightnet
from attnspec.reference.linear.lightnet_scan import additive_rule_backward

RULE = right("lightnet.additive_rule")
LRPE = right("lightnet.md_lrpe")
TPE = right("lightnet.tpe")
MD_TPE = right("lightnet.md_tpe")
LRPE_BACKWARD = lightnet.md_lrpe_backward
TPE_BACKWARD = lightnet.tpe_backward
MD_TPE_BACKWARD = lightnet.md_tpe_backward


def keys_as_weights(q: Any, k: Any, v: Any, g: Any, state: Any, do: Any, *rest: Any) -> Any:
    """dk is that of the weighed key."""
    dq, dk, *others = additive_rule_backward(q, k, v, g, state, do, *rest)
    weights = lightnet.additive_gates(g)[0]
    safe = np.where(weights == 0, np.ones_like(weights), weights)
    return dq, (dk / safe if state is None else 0 * dk), *others


def detached_rule(result: Any) -> Any:
    """Gates are constants."""
    dq, dk, dv, dg, before = result
    return dq, dk, dv, np.zeros_like(dg), before


def uncentred_rule(q: Any, k: Any, v: Any, g: Any, state: Any, do: Any, *rest: Any) -> Any:
    """A gate's own share is not taken off: dg = k dk."""
    dq, dk, dv, dg, before = additive_rule_backward(q, k, v, g, state, do, *rest)
    return dq, dk, dv, k * dk + 0 * dg, before


def constant_sum(arguments: dict[str, Any]) -> None:
    """Nothing comes back from the last Delta."""
    arguments["dDelta"] = None


def constant_first_sum(result: Any) -> Any:
    """Delta is no part of the state that is differentiated."""
    *tokens, (ds, dDelta, dm) = result
    return *tokens, (ds, np.zeros_like(dDelta), dm)


def constant_angles(result: Any) -> Any:
    """theta is a constant."""
    dx, dtheta = result
    return dx, np.zeros_like(dtheta)


def turned_forwards(arguments: dict[str, Any]) -> None:
    """The way back turns as the way there did."""
    width = arguments["dout"].shape[-1] // 2
    sign = np.where(np.arange(2 * width) < width, 1, -1).astype(arguments["dout"].dtype)
    arguments["dout"] = arguments["dout"] * sign


def mean_over_axes(
    x: Any, theta: Any, shape: Any, l: int, dout: Any, *, lrpe_type: str = "cosine"
) -> Any:
    """Of a theta that several axes share, dtheta is a mean over them."""
    dx, dtheta = LRPE_BACKWARD(x, theta, shape, l, dout, lrpe_type=lrpe_type)
    return dx, dtheta / len(shape)


def decay_from_new_state(
    x: Any, qp: Any, kp: Any, lam: Any, state: Any, dy: Any, dstate: Any = None
) -> Any:
    """dlam multiplies the state with its token, not the one before it."""
    dx, dqp, dkp, dlam, before = TPE_BACKWARD(x, qp, kp, lam, state, dy, dstate)
    own = np.sum(dkp * kp, axis=-1)
    return dx, dqp, dkp, dlam + own, before


def state_not_carried(arguments: dict[str, Any]) -> None:
    """Nothing comes back from the last state."""
    arguments["dstate"] = None


def undecayed_first(
    x: Any, qp: Any, kp: Any, lam: Any, state: Any, dy: Any, dstate: Any = None
) -> Any:
    """The gradient of a state lacks the decay of the first token."""
    *others, before = TPE_BACKWARD(x, qp, kp, lam, state, dy, dstate)
    return *others, before / lam[:, None, None]


def swapped_parameters(result: Any) -> Any:
    """dqp and dkp change places."""
    dx, gradients = result
    return dx, tuple((dkp, dqp, dlam) for dqp, dkp, dlam in gradients)


def last_axis_back(x: Any, params: Any, axes: Any, dy: Any) -> Any:
    """dx comes back along the last axis only."""
    _, gradients = MD_TPE_BACKWARD(x, params, axes, dy)
    return MD_TPE_BACKWARD(x, params[-1:], axes[-1:], dy)[0], gradients


MUTANTS = (
    tampered("additive_rule:rule-keys", RULE, "gradient",
             "dk lacks the weight of its key.", backward=keys_as_weights),
    tampered("additive_rule:rule-detached", RULE, "gradient",
             "Gates are constants.", backward=spoiling(additive_rule_backward, detached_rule)),
    tampered("additive_rule:rule-uncentred", RULE, "gradient",
             "dg lacks the mean.", backward=uncentred_rule),
    tampered("additive_rule:rule-constant-sum", RULE, "gradient",
             "Nothing comes back from the last Delta.",
             backward=altering(additive_rule_backward, constant_sum)),
    tampered("additive_rule:rule-constant-first-sum", RULE, "gradient",
             "The Delta handed over is a constant.",
             backward=spoiling(additive_rule_backward, constant_first_sum)),
    tampered("md_lrpe:lrpe-constant-angles", LRPE, "gradient",
             "theta is a constant.", backward=spoiling(LRPE_BACKWARD, constant_angles)),
    tampered("md_lrpe:lrpe-turned-forwards", LRPE, "gradient",
             "The gradient is turned by a, not by -a.",
             backward=altering(LRPE_BACKWARD, turned_forwards)),
    tampered("md_lrpe:lrpe-mean", LRPE, "gradient",
             "dtheta is a mean over the axes.", backward=mean_over_axes),
    tampered("tpe:tpe-late-decay", TPE, "gradient",
             "dlam counts the token that has not decayed.", backward=decay_from_new_state),
    tampered("tpe:tpe-constant-state", TPE, "gradient",
             "Nothing comes back from the last state.",
             backward=altering(TPE_BACKWARD, state_not_carried)),
    tampered("tpe:tpe-undecayed-state", TPE, "gradient",
             "The gradient of the first state is not decayed.",
             backward=undecayed_first),
    tampered("md_tpe:md-tpe-swapped", MD_TPE, "gradient",
             "dqp and dkp change places.", backward=spoiling(MD_TPE_BACKWARD, swapped_parameters)),
    tampered("md_tpe:md-tpe-last-axis", MD_TPE, "gradient",
             "Only the last axis comes back.", backward=last_axis_back),
)  # fmt: skip
