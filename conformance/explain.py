"""One sentence on when a kernel is wrong, found by undoing one trait of the case at a time."""

from __future__ import annotations

from collections.abc import Callable

from attnspec.conformance.case import Case
from attnspec.conformance.contract import Contract


def conditions(contract: Contract, case: Case, fails: Callable[[Case], bool]) -> str:
    """The traits of a minimal failing `case` without which it passes.

    Each trait (a size, an option, the kind of values, the layout) is set to its simplest value
    while the others stay; if the kernel then passes, the trait is necessary.
    """
    needed = []
    for axis, length in case.sizes.items():
        lowest = min(contract.sizes[axis][0], 1) if axis in contract.sizes else 1
        simplest = max(lowest, contract.least.get(axis, 0))
        fewer = contract.fix({**case.sizes, axis: max(simplest, length - 1)})
        if length > simplest and not fails(case.with_(sizes=fewer)):
            needed.append(f"{axis} >= {length}" if length > 2 else f"{axis} > {length - 1}")
    for option in case.options:
        others = tuple(o for o in case.options if o != option)
        if not fails(case.with_(options=others)):
            needed.append(f"{option} is given")
    for name, value in case.parameters.items():
        default = contract.spec.signature.parameters[name].default
        has_default = default is not contract.spec.signature.empty
        if has_default and value != default and not fails(case.with_(parameters={name: default})):
            needed.append(f"{name} = {value}")
    if case.layout != "contiguous" and not fails(case.with_(layout="contiguous")):
        needed.append(f"the layout is {case.layout}")
    if case.values != "normal" and not fails(case.with_(values="normal")):
        needed.append(f"values are {case.values}")
    if not needed:
        return "wrong on the smallest cases of this law"
    return "wrong when " + " and ".join(needed)
