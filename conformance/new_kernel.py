"""Write a commented file to start a kernel from: it already runs under ``attnspec conform``."""

from __future__ import annotations

import inspect
from importlib.resources import files
from pathlib import Path

from attnspec.conformance.contract import find_contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws import laws_for


def kernel_source(operation: str, name: str = "kernel") -> str:
    """Python source of a kernel of `operation` that calls the reference, ready to be replaced.

    `name` is that of the module it is written for.
    """
    from jinja2 import Environment

    contract = find_contract(operation)
    spec = contract.spec
    template = files("attnspec.conformance").joinpath("templates/kernel.py.j2").read_text()
    kernel = Kernel("template", operation, spec.function)
    parameters = list(spec.signature.parameters.values())
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    return (
        Environment(trim_blocks=True, lstrip_blocks=True)
        .from_string(template)
        .render(
            operation=operation,
            name=name,
            module=spec.function.__module__,
            function=spec.name,
            signature=str(inspect.Signature(plain)),
            call=", ".join(
                p.name if p.kind is not p.KEYWORD_ONLY else f"{p.name}={p.name}" for p in parameters
            ),
            doc=inspect.getdoc(spec.function) or "",
            outputs=[f"{o.name} ({o.kind}, {o.dtype} dtype)" for o in contract.outputs],
            laws=[(law.name, law.promise) for law in laws_for(contract, kernel)],
        )
    )


def write_kernel(operation: str, path: Path) -> None:
    """Write the file, and its folder; an existing file is never overwritten (FileExistsError)."""
    if path.exists():
        raise FileExistsError(f"path: got {path}, expected a file that does not exist yet")
    source = kernel_source(operation, path.stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
