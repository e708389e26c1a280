"""Contracts of pointer networks: scores, log-probabilities, losses and glimpses.

Points, hulls, triangulations and tours are in `pointer_networks_geometry`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Array, BadValue, Contract, Output
from attnspec.conformance.contracts.scores.pointer_networks_steps import (
    allowed_slots,
    log_probabilities,
    logs_for_loss,
    loss_targets,
    real_steps,
    some_mask,
    some_steps,
    training_targets,
)

# D, the width of the states, is called d here: laws of head sizes are laws of it too.
SIZES = {"batch": (1, 2), "steps": (1, 12), "slots": (1, 16), "d": (1, 16), "A": (1, 16)}
PAIRS = {"batch": (1, 2), "steps": (1, 12), "slots": (1, 24)}


def nan_where_masked(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    mask = arguments["mask"]
    if mask is not None:
        mask = mask if mask.ndim == 3 else mask[:, None, :]
        arguments["scores"] = np.where(mask, arguments["scores"], np.nan)
    return arguments


def nan_beside_targets(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN everywhere but at the targets of real steps."""
    logp, targets, real = (arguments[name] for name in ("logp", "targets", "target_mask"))
    read = np.arange(logp.shape[-1]) == targets[..., None]
    if real is not None:
        read &= real[..., None]
    return {**arguments, "logp": np.where(read, logp, np.nan)}


def nan_in_padding(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in states of slots that no step may point at, and of steps that are not real."""
    mask, real = arguments.get("mask"), arguments.get("target_mask")
    if mask is not None:
        seen = mask if mask.ndim == 2 else mask.any(axis=1)
        arguments["e"] = np.where(seen[..., None], arguments["e"], np.nan)
    if real is not None:
        arguments["d"] = np.where(real[..., None], arguments["d"], np.nan)
    return arguments


def nan_in_unseen(arguments: dict[str, Any], case: Case) -> dict[str, Any]:
    """NaN in the states of slots to which no step points."""
    seen = np.exp(arguments["logp"]).any(axis=-2)
    return {**arguments, "e": np.where(seen[..., None], arguments["e"], np.nan)}


def padded(option: str) -> Any:
    return lambda case: case.with_(options=(option,))


def no_slot(a: dict[str, Any]) -> np.ndarray:
    return np.zeros(a["e"].shape[:-1], bool)


E = Array("e", "batch slots d", role="key")
D = Array("d", "batch steps d", role="query")
WEIGHTS = (Array("W1", "A d"), Array("W2", "A d"), Array("v", "A"))
BIASES = (Array("b1", "A", optional=True), Array("b2", "A", optional=True))
WRONG_STATES = (
    ("decoder states of another width", "W2", lambda a: a["W2"].repeat(2, axis=1)),
    ("encoder states of another width", "W1", lambda a: a["W1"].repeat(2, axis=1)),
    ("projections of different widths", "W2", lambda a: a["W2"].repeat(2, axis=0)),
    ("a projection with a batch", "W1", lambda a: a["W1"][None]),
    ("v of another width", "v", lambda a: a["v"].repeat(2)),
    ("v as a matrix", "v", lambda a: a["v"][:, None]),
    ("a bias of another width", "b1", lambda a: a["v"].repeat(2)),
    ("an integer bias", "b2", lambda a: np.zeros(a["v"].shape, np.int64)),
    ("another batch in d", "d", lambda a: a["d"].repeat(3, axis=0)),
)

CONTRACTS = (
    Contract(
        operation="pointer_networks.pointer_scores",
        sizes=SIZES,
        queries="steps",
        keys="slots",
        arrays=(E, D, *WEIGHTS, *BIASES),
        outputs=(Output("out", wide=True),),
        linear_in=("v",),
        neutral={
            "b1": lambda case: np.zeros(case.shape("A")),
            "b2": lambda case: np.zeros(case.shape("A")),
        },
        bad_inputs=WRONG_STATES,
    ),
    Contract(
        operation="pointer_networks.pointer_log_probs",
        sizes=PAIRS,
        queries="steps",
        keys="slots",
        least={"slots": 1},
        arrays=(
            Array("scores", "batch steps slots", role="query"),
            Array("mask", "batch slots", make=some_mask),
        ),
        outputs=(Output("out", wide=True),),
        poison=nan_where_masked,
        bad_inputs=(
            BadValue(
                "a step that may point nowhere", "mask", lambda a: np.zeros(a["scores"].shape, bool)
            ),
            ("an integer mask", "mask", lambda a: np.ones(a["scores"].shape, np.int64)),
            ("a mask without a batch", "mask", lambda a: np.ones(a["scores"].shape[-1], bool)),
            ("scores of no slot", "scores", lambda a: a["scores"][..., :0]),
        ),
    ),
    Contract(
        operation="pointer_networks.pointer_loss",
        sizes=PAIRS,
        queries="steps",
        keys="slots",
        least={"steps": 1, "slots": 1},
        arrays=(
            Array("logp", "batch steps slots", make=logs_for_loss),
            Array("targets", "batch steps", make=loss_targets),
            Array("target_mask", "batch steps", make=some_steps),
        ),
        outputs=(Output("out", wide=True, row_axes=0),),
        poison=nan_beside_targets,
        bad_inputs=(
            ("a target that is no slot", "targets", lambda a: a["targets"] * 0 + 99),
            ("a negative target", "targets", lambda a: a["targets"] * 0 - 1),
            ("fractional targets", "targets", lambda a: a["targets"] + 0.5),
            ("targets of another length", "targets", lambda a: a["targets"][:, 1:]),
            ("no real step", "target_mask", lambda a: np.zeros(a["targets"].shape, bool)),
            ("an integer mask", "target_mask", lambda a: np.ones(a["targets"].shape, np.int64)),
            ("integers", "logp", lambda a: np.zeros(a["logp"].shape, np.int64)),
        ),
    ),
    Contract(
        operation="pointer_networks.pointer_cross_entropy",
        sizes=SIZES,
        queries="steps",
        keys="slots",
        least={"steps": 1, "slots": 1},
        arrays=(
            E,
            D,
            *WEIGHTS,
            Array("targets", "batch steps", make=training_targets),
            Array("mask", "batch slots", make=allowed_slots, optional=True),
            Array("target_mask", "batch steps", make=real_steps, optional=True),
            *BIASES,
        ),
        outputs=(Output("out", wide=True, row_axes=0),),
        poison=nan_in_padding,
        neutral={
            "b1": lambda case: np.zeros(case.shape("A")),
            "b2": lambda case: np.zeros(case.shape("A")),
            "mask": lambda case: np.ones(case.shape("batch slots"), bool),
        },
        cells={
            "noncausal cross": lambda case: case.with_(sizes={"slots": case.sizes["steps"] + 3}),
            "left": padded("mask"),
            "right": padded("target_mask"),
        },
        bad_inputs=(
            *WRONG_STATES,
            ("a target that is no slot", "targets", lambda a: a["targets"] * 0 + 99),
            ("targets of another length", "targets", lambda a: a["targets"][:, 1:]),
            ("a mask that allows nothing", "mask", no_slot),
            ("no real step", "target_mask", lambda a: np.zeros(a["targets"].shape, bool)),
        ),
    ),
    Contract(
        operation="pointer_networks.glimpse",
        sizes=SIZES,
        queries="steps",
        keys="slots",
        least={"slots": 1},
        arrays=(
            E,
            Array("logp", "batch steps slots", make=log_probabilities),
            WEIGHTS[0],
            BIASES[0],
        ),
        outputs=(Output("out"),),
        key_arrays=("e", "logp"),
        poison=nan_in_unseen,
        neutral={"b1": lambda case: np.zeros(case.shape("A"))},
        bad_inputs=(
            ("another number of slots", "logp", lambda a: a["logp"].repeat(2, axis=-1)),
            ("another batch in logp", "logp", lambda a: a["logp"].repeat(3, axis=0)),
            ("a projection of another width", "W1", lambda a: a["W1"].repeat(2, axis=1)),
            ("a bias of another width", "b1", lambda a: np.ones(a["W1"].shape[0] + 1)),
        ),
    ),
)
