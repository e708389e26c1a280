"""The law of gradients: every differentiable input, under a random upstream of awkward layout."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from attnspec.conformance.arrays import flatten, place_arguments, round_arguments
from attnspec.conformance.contract import Contract, Output
from attnspec.conformance.judge import expect
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import (
    Law,
    Strategy,
    draw_case,
    in_each_configuration,
    usual_widths,
    wide_tiles,
)
from attnspec.conformance.trial import EXPECTATIONS, Refused, Trial
from attnspec.conformance.values import make_values
from attnspec.conformance.violation import Violation


def upstream_names(contract: Contract) -> list[tuple[str, int]]:
    """Names of the reference gradient's upstream arguments, with the output each belongs to.

    That of an output ``state.k`` is dk.
    """
    gradient = contract.spec.gradient
    assert gradient is not None
    parameters = inspect.signature(gradient).parameters
    outputs = [output.name.rpartition(".")[2] for output in contract.outputs]
    return [(f"d{name}", i) for i, name in enumerate(outputs) if f"d{name}" in parameters]


def cases(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    return draw_case(contract, kernel, dtype, cross=True, layouts=("contiguous", "transposed"))


def wide_cases(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Any lengths, and those that fill tiles."""
    values = ("normal",)
    short = draw_case(contract, kernel, dtype, widths=usual_widths(contract), values=values)
    return short | wide_tiles(contract, kernel, dtype, values)


def any_cases(contract: Contract, kernel: Kernel, dtype: str) -> Strategy:
    """Those of both laws, as far as heads are usually so wide."""
    usual = cases(contract, kernel, dtype)
    return usual | wide_cases(contract, kernel, dtype) if usual_widths(contract) else usual


def differentiates(contract: Contract, kernel: Kernel) -> bool:
    return kernel.differentiates and contract.spec.gradient is not None


def check(trial: Trial) -> None:
    """Gradients agree with the reference's own, for every differentiable input."""
    contract, case = trial.contract, trial.case
    gradient = contract.spec.gradient
    assert gradient is not None
    arguments = _learned(contract, trial.arguments(), case.dtype)
    truth = contract.outputs_of(contract.spec.function(**arguments))
    upstream = {}
    for name, index in upstream_names(contract):
        shape = np.shape(truth[contract.outputs[index].name])
        upstream[name] = np.asarray(make_values("normal", case.generator(name), shape, "other"))
    upstream = round_arguments(upstream, case.dtype)
    # An optional array that is absent is None to a gradient, which may have no defaults.
    absent = {n: None for n in contract.optional if n in inspect.signature(gradient).parameters}
    given = {**absent, **arguments, **upstream}
    present = [name for name in contract.differentiable if arguments.get(name) is not None]
    outputs = tuple(
        Output(leaf, row_axes=min(x.ndim, 1), cancels=f"d{name}" in contract.cancelling)
        for name in present
        for leaf, x in zip(
            _leaf_names(name, arguments[name]), _leaves(arguments[name]), strict=True
        )
    )
    expectation = EXPECTATIONS.get(
        ("gradient", case.key),
        lambda: expect(
            lambda **given: _select(contract, gradient(**given), present),
            given,
            outputs,
            case.dtype,
        ),
    )
    try:
        if trial.kernel.backward is not None:
            got = _explicit(trial, given, present)
        else:
            got = _autograd(trial, arguments, upstream, present)
    except Refused as refusal:
        raise Violation("gradient", f"refused a case it claims: {refusal}") from None
    trial.compare(outputs, got, expectation)


def _learned(contract: Contract, arguments: dict[str, Any], dtype: str) -> dict[str, Any]:
    """`arguments` in which numbers that can be learned are arrays without axes."""
    numbers = {
        name: np.asarray(value)
        for name in contract.differentiable
        if isinstance(value := arguments.get(name), float)
    }
    return arguments | round_arguments(numbers, dtype)


def _leaf_names(name: str, argument: Any) -> list[str]:
    """The gradients of an argument: one, or one for each array of a tuple or a dictionary."""
    if isinstance(argument, dict):
        return [f"d{name}.{key}" for key, value in argument.items() if _learns(value)]
    if not isinstance(argument, tuple):
        return [f"d{name}"]
    return [f"d{name}[{place}]" for place, leaf in enumerate(flatten(argument)) if _learns(leaf)]


def _leaves(argument: Any) -> list[Any]:
    """The arrays of an argument, or the number that it is."""
    if isinstance(argument, (tuple, dict)):
        return [leaf for leaf in flatten(argument) if _learns(leaf)]
    return [] if argument is None else [argument]


def _learns(leaf: Any) -> bool:
    """Whether a part of an argument has a gradient: None and a layer's plain numbers have none."""
    return leaf is not None and type(leaf) not in (int, float)


def _select(contract: Contract, gradients: Any, present: list[str]) -> tuple[Any, ...]:
    """The gradients of the present arguments, those of a container one after the other."""
    if len(contract.differentiable) == 1:
        gradients = (gradients,)
    by_name = dict(zip(contract.differentiable, gradients, strict=True))
    return tuple(leaf for name in present for leaf in _leaves(by_name[name]))


def _explicit(
    trial: Trial, arguments: Mapping[str, Any], present: list[str]
) -> dict[str, np.ndarray]:
    kernel, contract = trial.kernel, trial.contract
    assert kernel.backward is not None
    assert contract.spec.gradient is not None
    placed = place_arguments(kernel.arrays, arguments, trial.case.layout, trial.case.dtype)
    parameters = inspect.signature(contract.spec.gradient).parameters
    with trial.guarded():
        result = kernel.backward(**{n: placed[n] for n in parameters if n in placed})
    chosen = _select(contract, result, present)
    names = [leaf for name in present for leaf in _leaf_names(name, arguments[name])]
    return {name: kernel.arrays.get(g) for name, g in zip(names, chosen, strict=True)}


def _autograd(
    trial: Trial,
    arguments: Mapping[str, Any],
    upstream: Mapping[str, np.ndarray],
    present: list[str],
) -> dict[str, np.ndarray]:
    import torch

    kernel, contract = trial.kernel, trial.contract
    placed = place_arguments(kernel.arrays, arguments, trial.case.layout, trial.case.dtype)
    # An upstream gradient in transposed storage is what a following matmul hands back.
    above = place_arguments(kernel.arrays, upstream, "transposed", trial.case.dtype)
    leaves = [leaf.requires_grad_() for name in present for leaf in _leaves(placed[name])]
    with trial.guarded():
        outputs = contract.outputs_of(contract.call(kernel.call, placed))
        pairs = [
            (outputs[contract.outputs[index].name], above[name])
            for name, index in upstream_names(contract)
        ]
        # A number of tokens depends on none of them; without any that does, torch says so.
        pairs = [pair for pair in pairs if pair[0].requires_grad] or pairs
        gradients = torch.autograd.grad(
            [out for out, _ in pairs],
            leaves,
            [grad.to(out.dtype) for out, grad in pairs],
            allow_unused=True,
        )
    got = {}
    names = [leaf for name in present for leaf in _leaf_names(name, arguments[name])]
    for name, leaf, gradient in zip(names, leaves, gradients, strict=True):
        value = torch.zeros_like(leaf) if gradient is None else gradient
        got[name] = kernel.arrays.get(value)
    return got


LAWS = (
    Law(
        "gradient",
        "The gradient of every differentiable input is the reference's.",
        ("K4", "K10"),
        cases,
        check,
        applies=differentiates,
        examples=0.7,
    ),
    Law(
        "wide-gradient",
        "So are gradients of heads with 64 and 128 channels, in full tiles too.",
        ("K10",),
        wide_cases,
        check,
        applies=lambda contract, kernel: (
            differentiates(contract, kernel) and bool(usual_widths(contract))
        ),
        examples=0.6,
    ),
    Law(
        "configured-gradient",
        "Every tuning configuration has the right gradients by itself.",
        ("K10",),
        any_cases,
        in_each_configuration(check),
        applies=lambda contract, kernel: bool(kernel.configs) and differentiates(contract, kernel),
        examples=0.2,
    ),
)
