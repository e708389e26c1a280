"""Laws of TransNormerLLM alone: what is relative, what the joint norm takes away, who is alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law, Strategy, draw_case
from attnspec.conformance.trial import Trial

LAYERS = ("lightning_attention_1.tnl_gla", "lightning_attention_1.tnl_block")


def _fresh(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, options=())


def check_offset(trial: Trial) -> None:
    """From a zero state only differences of positions count.

    Frequencies are multiples of 1/64, so that every angle is exact however far it is. States have
    phases of their own and are left out: the reference's stands in their place.
    """
    arguments = trial.arguments()
    theta = arguments["params"]["theta"]
    if theta is not None:
        exact = {**arguments["params"], "theta": np.round(64 * theta) / 64}
        arguments = {**arguments, "params": exact}
    moved = {**arguments, "offset": arguments["offset"] + 5}
    trial.judge({**trial.run(moved), "state": _truth(trial, arguments)["state"]}, arguments)


def _truth(trial: Trial, arguments: dict[str, Any]) -> dict[str, Any]:
    """The reference's outputs, which stand where the kernel's are not asked for."""
    return trial.contract.outputs_of(trial.contract.call(trial.contract.spec.function, arguments))


def check_joint_norm(trial: Trial) -> None:
    """All of v four times as large, and epsilon sixteen times: the norm takes the factor away."""
    arguments = {**trial.arguments(), "v_activation": False, "eps": 1e-2, "norm": "srms"}
    D = arguments["x"].shape[-1]
    W = arguments["params"]["Wqkvu"].copy()
    W[:, 2 * D : 3 * D] *= 4.0
    larger = {**arguments, "params": {**arguments["params"], "Wqkvu": W}, "eps": 0.16}
    outputs = trial.run(larger)
    trial.judge({**outputs, "state": outputs["state"] / 4.0}, arguments)


def check_degree(trial: Trial) -> None:
    """Rows twice as large give a result four times as large: exact in binary."""
    arguments = trial.arguments()
    outputs = trial.run({**arguments, "x": 2.0 * arguments["x"]})
    trial.judge({"y": outputs["y"] / 4.0}, arguments)


LAWS = (
    Law(
        "common-offset",
        "Moving every position by a common offset changes no output of a fresh layer.",
        ("K13",),
        _fresh,
        check_offset,
        applies=lambda contract, kernel: contract.operation in LAYERS,
        examples=0.3,
    ),
    Law(
        "joint-norm",
        "A factor of all values is taken away by the norm, whose epsilon grows with its square.",
        ("K10",),
        _fresh,
        check_joint_norm,
        applies=lambda contract, kernel: contract.operation == LAYERS[0],
        examples=0.3,
    ),
    Law(
        "second-degree",
        "The channel mixer is homogeneous of degree two.",
        ("K10",),
        draw_case,
        check_degree,
        applies=lambda contract, kernel: contract.operation == "lightning_attention_1.sglu",
        examples=0.3,
    ),
)
