"""The fast path as the suite sees it: found through the entry point, like any stranger's kernels.

Every operation of every mechanism module is offered twice: on CPU tensors with Numba and on CUDA
tensors with Triton. What an engine does not support is stated here as a limit.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

try:
    from attnspec.fast import backend, mechanism_modules, tuning
except ModuleNotFoundError as missing:
    raise ImportError(
        f'{missing.name} is not installed: pip install "attnspec[fast]"', name=missing.name
    ) from missing

if TYPE_CHECKING:
    from attnspec.conformance import Kernel

HALF = ("float16", "bfloat16")


def kernels() -> Iterable[Kernel]:
    """A kernel for each operation, backend and device; what a module says in `CLAIMS` is added."""
    from attnspec.conformance import Kernel
    from attnspec.conformance.contract import contracts

    known = contracts()
    for slug, path in mechanism_modules().items():
        module = importlib.import_module(path)
        for operation in known:
            name = operation.partition(".")[2]
            if not operation.startswith(f"{slug}.") or not hasattr(module, name):
                continue
            for kind, device in (("numba", "cpu"), ("triton", "cuda")):
                claims = _claims(module, name, kind)
                if claims is None:
                    continue
                yield Kernel(
                    name=f"attnspec-{kind}",
                    operation=operation,
                    call=getattr(module, name),
                    array="torch",
                    device=device,
                    backend=kind,
                    **claims,
                )


def _claims(module: Any, name: str, kind: str) -> dict[str, Any] | None:
    """Defaults, overridden by the module's ``CLAIMS[name]`` and then its ``CLAIMS[name][kind]``.

    A backend that is None there is not offered.
    """
    claims: dict[str, Any] = {"dtypes": ("float32", *HALF), "launches": backend.launch_count}
    if kind == "triton":
        claims["reads_values"] = False
        claims["tuner"] = tuning.Tuner()
        claims["draws"] = {"d": (16, 80), "dv": (16, 48), "group": (1, 3)}
    own = dict(getattr(module, "CLAIMS", {}).get(name, {}))
    special = {other: own.pop(other, {}) for other in backend.BACKENDS}
    return None if special[kind] is None else {**claims, **own, **special[kind]}
